"""Puts the tables that a benchmark prints into the documentation."""

from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs/benchmarks.md"


def write(name: str, text: str) -> None:
    """Replace what stands between ``<!-- name: begin -->`` and ``<!-- name: end -->`` on the page."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    page = PAGE.read_text()
    head, tail = page[: page.index(begin) + len(begin)], page[page.index(end) :]
    PAGE.write_text(f"{head}\n\n{text}\n\n{tail}")
