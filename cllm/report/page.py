"""A report as data, and the same report as Markdown and as one HTML file without anything to load."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True, slots=True)
class Value:
    """A table's cell: what is shown, what it sorts by (None: the text), and whether it is to be read as uncertain."""

    text: str
    order: float | None = None
    noise: bool = False


NOTHING = Value("–")


@dataclass(frozen=True, slots=True)
class Table:
    """Columns named in `numbers` are aligned to the right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]
    numbers: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Plot:
    """An SVG element whose colours are CSS variables, and what it shows."""

    title: str
    svg: str


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    text: tuple[str, ...] = ()
    parts: tuple[Table | Plot, ...] = ()
    notes: tuple[str, ...] = ()  # below the parts, one a line


def as_markdown(title: str, sections: Sequence[Section]) -> str:
    """Plots are left out."""
    blocks = [f"# {title}"]
    for section in sections:
        blocks += [f"## {section.title}", *section.text]
        blocks += [_markdown_table(part) for part in section.parts if isinstance(part, Table)]
        if section.notes:
            blocks.append("\n".join(f"- {note}" for note in section.notes))
    return "\n\n".join(blocks) + "\n"


def as_html(title: str, sections: Sequence[Section]) -> str:
    """A whole document: follows the reader's dark or light setting, and a click on a column's head sorts by it."""
    body = "\n".join(map(_html_section, sections))
    return _DOCUMENT.format(title=escape(title), style=_STYLE, body=body, script=_SCRIPT)


def _markdown_table(table: Table) -> str:
    rule = ["---:" if column in table.numbers else "---" for column in table.columns]
    rows = [[_markdown(value) for value in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(table.columns), rule, *rows])


def _markdown(value: Value) -> str:
    return value.text.replace("|", "\\|") + (" ≈" if value.noise else "")


def _html_section(section: Section) -> str:
    lines = [f"<section>\n<h2>{escape(section.title)}</h2>", *(f"<p>{escape(text)}</p>" for text in section.text)]
    plots = [part for part in section.parts if isinstance(part, Plot)]
    lines += [_html_table(part) for part in section.parts if isinstance(part, Table)]
    if plots:
        lines.append(f'<div class="plots">{"".join(map(_html_plot, plots))}</div>')
    if section.notes:
        lines.append(f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in section.notes)}</ul>")
    return "\n".join([*lines, "</section>"])


def _html_plot(plot: Plot) -> str:
    return f"<figure>{plot.svg}<figcaption>{escape(plot.title)}</figcaption></figure>"


def _html_table(table: Table) -> str:
    head = "".join(
        f'<th scope="col"{_number_class(column, table)}><button type="button">{escape(column)}</button></th>'
        for column in table.columns
    )
    rows = "\n".join(f"<tr>{''.join(_html_cells(row, table))}</tr>" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'


def _html_cells(row: Sequence[Value], table: Table) -> list[str]:
    return [
        f"<td{_number_class(column, table)}{_order(value)}>{escape(value.text)}{_NOISE if value.noise else ''}</td>"
        for column, value in zip(table.columns, row, strict=True)
    ]


def _number_class(column: str, table: Table) -> str:
    return ' class="number"' if column in table.numbers else ""


def _order(value: Value) -> str:
    return "" if value.order is None else f' data-order="{value.order:.6g}"'


_NOISE = ' <abbr title="within noise">≈</abbr>'

_DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""

_STYLE = """
:root { --ground: #ffffff; --text: #1a1f26; --soft: #5b6673; --rule: #d9dee4; --head: #f3f5f7;
  --c0: #1f6feb; --c1: #c2410c; --c2: #15803d; --c3: #9333ea; --c4: #b8860b; --c5: #0e7490; --c6: #be185d;
  --c7: #64748b }
@media (prefers-color-scheme: dark) {
  :root { --ground: #12161b; --text: #e4e8ed; --soft: #98a4b1; --rule: #2c343d; --head: #1b2128;
    --c0: #6ea8ff; --c1: #ff9d66; --c2: #5fd38a; --c3: #c99bff; --c4: #e5c15c; --c5: #55cbe0; --c6: #ff85b8;
    --c7: #a3b1c2 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--text); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1440px; margin: 0 auto; padding: 1rem clamp(.75rem, 3vw, 2rem) 4rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
p, li { max-width: 75ch } ul { padding-left: 1.2rem; color: var(--soft) }
.scroll { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top;
  white-space: nowrap }
td { max-width: 36rem } td:last-child { white-space: normal }
th { background: var(--head) } th button { all: unset; cursor: pointer; font-weight: 600; white-space: nowrap }
th button:focus-visible { outline: 2px solid var(--c0) }
th[aria-sort=ascending] button::after { content: " ▲" } th[aria-sort=descending] button::after { content: " ▼" }
.number { text-align: right } tbody tr:hover { background: var(--head) }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--ground) }
th:first-child, tbody tr:hover td:first-child { background: var(--head) }
abbr { color: var(--soft); text-decoration: none; cursor: help }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem }
figure { margin: 0 } figure svg { width: 100%; height: auto; display: block }
figcaption { color: var(--soft); font-size: .87rem }
svg text { fill: var(--text); font: 11px system-ui, sans-serif } svg .soft { fill: var(--soft) }
svg .rule { stroke: var(--rule); stroke-width: 1 }
"""

_SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "descending" ||
      (!head.hasAttribute("aria-sort") && !head.classList.contains("number"));
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const order = row => row.cells[column].dataset.order;
    const text = row => row.cells[column].textContent;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [order(a), order(b)];
      if (head.classList.contains("number")) {
        if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
        return up ? x - y : y - x;
      }
      return (up ? 1 : -1) * text(a).localeCompare(text(b), undefined, { numeric: true });
    });
    table.tBodies[0].append(...rows);
  }));
}
"""
