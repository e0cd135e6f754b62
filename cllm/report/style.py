"""The look and the behaviour of the report's page: style sheet and script, both part of the file."""

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --text: #1a1f26; --soft: #566170; --rule: #d9dee4;
  --head: #f3f5f7; --link: #1a5fd0;
  --c0: #1f6feb; --c1: #c2410c; --c2: #15803d; --c3: #9333ea; --c4: #a16207; --c5: #0e7490; --c6: #be185d;
  --c7: #64748b }
@media screen and (prefers-color-scheme: dark) {
  :root { --ground: #12161b; --text: #e4e8ed; --soft: #9ba7b4; --rule: #2c343d; --head: #1b2128; --link: #8ab8ff;
    --c0: #6ea8ff; --c1: #ff9d66; --c2: #5fd38a; --c3: #c99bff; --c4: #e5c15c; --c5: #55cbe0; --c6: #ff85b8;
    --c7: #a3b1c2 } }
* { box-sizing: border-box }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100% }
body { margin: 0; background: var(--ground); color: var(--text); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1440px; margin: 0 auto; padding: 1rem clamp(.75rem, 3vw, 2rem) 4rem }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem }
h3 { font-size: .93rem; margin: 1.6rem 0 .6rem } h3 + .scroll { margin-top: 0 }
p, li { max-width: 75ch; overflow-wrap: break-word } ul { padding-left: 1.2rem; color: var(--soft) }
a { color: var(--link) }
nav ol { columns: 18rem; column-gap: 2rem; padding-left: 1.4rem; margin: .5rem 0; font-size: .87rem }
nav li { break-inside: avoid }
.summary p { font-size: 1.05rem; margin: .45rem 0 }
.scroll { overflow-x: auto; margin: 1rem 0 }
.scroll:focus-visible, th button:focus-visible { outline: 2px solid var(--c0); outline-offset: -2px }
table { border-collapse: separate; border-spacing: 0; font-size: .87rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top;
  white-space: nowrap }
td.long { white-space: normal; min-width: 16rem; max-width: 40rem; overflow-wrap: anywhere }
th { background: var(--head); vertical-align: bottom }
th button { all: unset; cursor: pointer; font-weight: 600; white-space: nowrap }
th[aria-sort=ascending] button::after { content: " ▲" } th[aria-sort=descending] button::after { content: " ▼" }
.number { text-align: right } tbody tr:hover { background: var(--head) }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--ground) }
th:first-child, tbody tr:hover td:first-child { background: var(--head) }
abbr { color: var(--soft); text-decoration: none; cursor: help }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1.2rem }
figure { margin: 0; break-inside: avoid } figure svg { width: 100%; max-width: 34rem; height: auto; display: block }
figcaption { font-size: .87rem; font-weight: 600; margin-bottom: .3rem }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; list-style: none; padding: 0; font-size: .8rem;
  margin: 1rem 0 .8rem; color: var(--text) }
.legend svg { width: 28px; height: 8px; vertical-align: middle }
svg text { fill: var(--text); font: 11px system-ui, sans-serif } svg .soft { fill: var(--soft) }
svg .rule { stroke: var(--rule) } svg .level { stroke: var(--soft); stroke-dasharray: 5 4 }
@media (max-width: 40rem) {
  td:first-child, th:first-child { max-width: 8.5rem; white-space: normal } }
@media print {
  @page { size: A4 landscape; margin: 12mm }
  main { max-width: none; padding: 0 } nav { display: none } h2, h3 { break-after: avoid } tr { break-inside: avoid }
  body { font-size: 9.5pt } table { font-size: 6.5pt } .scroll { overflow: visible }
  th, td { padding: .15rem .25rem; white-space: normal } th button { white-space: normal }
  td:first-child { position: static; background: none }
  td.long { min-width: 0 } .plots { grid-template-columns: repeat(3, 1fr) } }
"""

SCRIPT = """
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
