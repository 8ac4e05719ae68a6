"""Compares a worker's log with the documented events."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/reference/events.md"
EVERY_LINE = {"at", "level", "event"}
# The fields of a library's log record.
OF_LIBRARIES = {"logger", "message", "trace"}


@functools.cache
def documented() -> dict[str, set[str]]:
    """The documented fields by event."""
    rows = re.findall(r"(?m)^\| `([\w.]+)` \| \w+ \| (.*?) \|", PAGE.read_text())
    return {name: set(re.findall(r"`(\w+)`", fields)) for name, fields in rows} | {"log": OF_LIBRARIES}


def faults_of(log: str) -> list[str]:
    """The lines with an undocumented event or field, or with a run but without its org and attempt."""
    return [line for line in log.splitlines() if line.startswith("{") and not _is_right(json.loads(line))]


def _is_right(line: dict[str, object]) -> bool:
    known = documented().get(str(line["event"]))
    if known is None or not line.keys() <= known | EVERY_LINE:
        return False
    return "run" not in line or {"org", "attempt"} <= line.keys()
