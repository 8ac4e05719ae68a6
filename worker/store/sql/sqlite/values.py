"""Python's values as SQLite keeps them: instants and JSON as text."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from worker.clock import to_text
from worker.store.engine import compact_json


# A batch names the same few instants again and again.
@functools.lru_cache(maxsize=4096)
def instant(value: datetime | None) -> str | None:
    return None if value is None else to_text(value)


def json_text(value: Any) -> str | None:
    """JSON without spaces, or None for None."""
    return None if value is None else compact_json(value)


def json_value(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def json_list(values: Iterable[str]) -> str:
    """A list for `json_each`: one parameter, however long."""
    return json.dumps(list(values))
