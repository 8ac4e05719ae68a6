"""Markdown tables and the texts of their cells."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table. In cells, `|` is escaped and whitespace is collapsed."""
    lines = [_line(head), "|" + "---|" * len(head)]
    lines += [_line(row) for row in rows]
    return "".join(f"{line}\n" for line in lines)


def code(text: str) -> str:
    return f"`{text}`"


def codes(texts: Iterable[str]) -> str:
    return ", ".join(map(code, texts))


def sentence(docstring: str | None) -> str:
    """Return a docstring's first paragraph on one line."""
    return re.sub(r"\s+", " ", (docstring or "").strip().partition("\n\n")[0])


def _line(cells: Sequence[str]) -> str:
    texts = (re.sub(r"\s+", " ", cell).strip().replace("|", "\\|") for cell in cells)
    return "| " + " | ".join(texts) + " |"
