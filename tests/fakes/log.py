"""What is wrong with a worker's log, held against the page that documents it."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/reference/events.md"
EVERY_LINE = {"at", "level", "event"}
# What a library's own record becomes.
OF_LIBRARIES = {"logger", "message", "trace"}


@functools.cache
def documented() -> dict[str, set[str]]:
    """By event, its fields, as the page has them."""
    rows = re.findall(r"(?m)^\| `([\w.]+)` \| \w+ \| (.*?) \|", PAGE.read_text())
    return {name: set(re.findall(r"`(\w+)`", fields)) for name, fields in rows} | {"log": OF_LIBRARIES}


def faults_of(log: str) -> list[str]:
    """The lines that are no documented event with its fields, or do not say whose run they speak of."""
    return [line for line in log.splitlines() if line.startswith("{") and not _is_right(json.loads(line))]


def _is_right(line: dict[str, object]) -> bool:
    known = documented().get(str(line["event"]))
    if known is None or not line.keys() <= known | EVERY_LINE:
        return False
    return "run" not in line or {"org", "attempt"} <= line.keys()
