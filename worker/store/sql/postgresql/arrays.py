"""Python's lists as PostgreSQL's array literals, which cost a tenth of adapting each element.

A list of nothing but None becomes an empty array: `unnest` fills it up with nulls.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from worker.clock import to_text
from worker.store.engine import compact_json


def plain(values: Iterable[Any]) -> str:
    """Identifiers, numbers and words of ours: nothing that needs quotes."""
    items = ["NULL" if value is None else str(value) for value in values]
    return _literal(items)


def flags(values: Iterable[bool]) -> str:
    return _literal(["t" if value else "f" for value in values])


def instants(values: Iterable[datetime | None]) -> str:
    return _literal([_instant(value) for value in values])


def texts(values: Iterable[str | None]) -> str:
    """Any text."""
    return _literal(["NULL" if value is None else _quoted(value) for value in values])


def jsons(values: Iterable[Any]) -> str:
    """Values to be written as JSON text; None stays null."""
    return _literal(["NULL" if value is None else _quoted(compact_json(value)) for value in values])


# A batch names the same few instants again and again.
@functools.lru_cache(maxsize=4096)
def _instant(value: datetime | None) -> str:
    return "NULL" if value is None else to_text(value)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _literal(items: list[str]) -> str:
    if items.count("NULL") == len(items):
        return "{}"
    return "{" + ",".join(items) + "}"
