"""docs/benchmarks.md, whose tables the benchmarks write."""

from __future__ import annotations

from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"


def publish(text: str, begin: str, end: str, document: Path = DOCUMENT) -> None:
    """Put a text between two marks of the document, in the place of what is there."""
    head, _, rest = document.read_text(encoding="utf-8").partition(begin)
    _, _, tail = rest.partition(end)
    document.write_text(f"{head}{begin}\n\n{text}\n{end}{tail}", encoding="utf-8")
