"""A report as data, and the same report as Markdown and as one HTML file without anything to load."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from cllm.report.lines import line_key
from cllm.report.style import SCRIPT, STYLE
from cllm.report.tables import markdown_table

_LONG = 48  # characters from which on a text may be broken into lines


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
    title: str = ""


@dataclass(frozen=True, slots=True)
class Plot:
    """An SVG element whose colours are CSS variables, and what it shows."""

    title: str
    svg: str


@dataclass(frozen=True, slots=True)
class Plots:
    """Plots of the same lines, which `names` names in the order of their colours."""

    title: str
    names: tuple[str, ...]
    plots: tuple[Plot, ...]


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    text: tuple[str, ...] = ()
    parts: tuple[Table | Plots, ...] = ()
    notes: tuple[str, ...] = ()  # below the parts, one a line


@dataclass(frozen=True, slots=True)
class Absent:
    """A section for which the results hold nothing, and what they would have to hold."""

    title: str
    why: str


def as_markdown(title: str, summary: Sequence[str], sections: Sequence[Section]) -> str:
    """Plots are left out, and sections of plots alone."""
    blocks = [f"# {title}", *summary]
    for section in sections:
        if section.parts and not any(isinstance(part, Table) for part in section.parts):
            continue
        blocks += [f"## {section.title}", *section.text]
        blocks += [_markdown_table(part) for part in section.parts if isinstance(part, Table)]
        if section.notes:
            blocks.append("\n".join(f"- {note}" for note in section.notes))
    return "\n\n".join(blocks) + "\n"


def as_html(title: str, summary: Sequence[str], sections: Sequence[Section]) -> str:
    """A whole document: follows the reader's dark or light setting, and a click on a column's head sorts by it."""
    lead = "".join(f"<p>{escape(text)}</p>" for text in summary)
    links = "".join(f'<li><a href="#{_anchor(section)}">{escape(section.title)}</a></li>' for section in sections)
    return _DOCUMENT.format(
        title=escape(title),
        style=STYLE,
        summary=lead,
        contents=links,
        body="\n".join(map(_html_section, sections)),
        script=SCRIPT,
    )


def _markdown_table(table: Table) -> str:
    rows = [[value.text + " ≈" * value.noise for value in row] for row in table.rows]
    lines = markdown_table(table.columns, rows, table.numbers)
    return f"### {table.title}\n\n{lines}" if table.title else lines


def _anchor(section: Section) -> str:
    return re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-")


def _html_section(section: Section) -> str:
    lines = [f'<section id="{_anchor(section)}">\n<h2>{escape(section.title)}</h2>']
    lines += [f"<p>{escape(text)}</p>" for text in section.text]
    for part in section.parts:
        lines.append(_html_table(part, section.title) if isinstance(part, Table) else _html_plots(part))
    if section.notes:
        lines.append(f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in section.notes)}</ul>")
    return "\n".join([*lines, "</section>"])


def _html_plots(group: Plots) -> str:
    names = "".join(f"<li>{line_key(index)} {escape(name)}</li>" for index, name in enumerate(group.names))
    legend = f'<ul class="legend">{names}</ul>' if len(group.names) > 1 else ""
    figures = "".join(
        f"<figure><figcaption>{escape(plot.title)}</figcaption>{plot.svg}</figure>" for plot in group.plots
    )
    return f'<h3>{escape(group.title)}</h3>\n{legend}<div class="plots">{figures}</div>'


def _html_table(table: Table, section: str) -> str:
    heading = f"<h3>{escape(table.title)}</h3>\n" if table.title else ""
    head = "".join(
        f'<th scope="col"{_class(column, table)}><button type="button">{escape(column)}</button></th>'
        for column in table.columns
    )
    rows = "\n".join(f"<tr>{''.join(_html_cells(row, table))}</tr>" for row in table.rows)
    # A region that scrolls must be reachable from the keyboard.
    region = f'class="scroll" role="region" tabindex="0" aria-label="{escape(table.title or section)}"'
    return f"{heading}<div {region}><table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"


def _html_cells(row: Sequence[Value], table: Table) -> list[str]:
    return [
        f"<td{_class(column, table, value)}{_order(value)}>{escape(value.text)}{_NOISE if value.noise else ''}</td>"
        for column, value in zip(table.columns, row, strict=True)
    ]


def _class(column: str, table: Table, value: Value = NOTHING) -> str:
    if column in table.numbers:
        return ' class="number"'
    return ' class="long"' if len(value.text) > _LONG else ""


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
<div class="summary">{summary}</div>
<nav aria-label="Contents"><ol>{contents}</ol></nav>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""
