"""Tables in Markdown."""

from collections.abc import Collection, Iterable, Sequence


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[str] = ()) -> str:
    """Lines of one table. Columns named in `numbers` are aligned to the right; a bar in a text is escaped."""
    rule = ["---:" if column in numbers else "---" for column in columns]
    lines = [[text.replace("|", "\\|") for text in line] for line in (columns, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))
