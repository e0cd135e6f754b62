"""What a page's HTML holds: its tables, its text, its tags."""

from html.parser import HTMLParser
from pathlib import Path

from cllm.bench.matrix_results import MatrixResults
from cllm.report.benchmark import write_report

VOID = {"meta", "br"}


class Reader(HTMLParser):
    """Collects tables, tags and text, and fails where tags are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.text += "\n"

    def handle_data(self, data):
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def tables_of(self, *columns: str) -> list[dict[str, str]]:
        """The rows of the last table with exactly these columns."""
        *_, found = [table for table in self.tables if table[0] == list(columns)]
        return [dict(zip(found[0], row, strict=True)) for row in found[1:]]

    def table(self, *columns: str) -> list[dict[str, str]]:
        """The rows of the only table with these columns."""
        (found,) = [table for table in self.tables if set(columns) <= set(table[0])]
        return [dict(zip(found[0], row, strict=True)) for row in found[1:]]


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def page_of(results: MatrixResults, folder: Path, **more) -> tuple[Reader, str]:
    """The report's HTML, read, and its Markdown."""
    html, markdown = write_report(results, folder, **more)
    return read(html.read_text()), markdown.read_text()
