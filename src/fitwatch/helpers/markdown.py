"""Markdown for logged texts."""

from collections.abc import Iterable


def table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """Format a Markdown table with a header row.

    Args:
        head: The column titles.
        rows: The cells of each row, converted with `str`; ``|`` is escaped.
    """
    cells = [[str(cell).replace("|", "&#124;") for cell in row] for row in [head, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|---" * len(cells[0]) + "|", *lines[1:]])
