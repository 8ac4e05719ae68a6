"""Cells of `runs list` for people: why, how long, and times and ids that fit the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from worker.cli.output import in_words, terminal_width
from worker.clock import SystemClock, to_text
from worker.store.lists.rows import Run

# A terminal of this width has room for whole ids and times.
WIDE = 130
# The beginning of an id that is its own, but for runs of the same microsecond.
SHORT_ID = 18


def _is_narrow() -> bool:
    width = terminal_width()
    return width is not None and width < WIDE


def _scheduled_for(row: Run) -> str:
    text = to_text(row["scheduled_for"])
    return f"{text[5:10]} {text[11:16]}Z" if _is_narrow() else f"{text[:19]}Z"


def _id(row: Run) -> str:
    return row["id"][:SHORT_ID] if _is_narrow() else row["id"]


def _took(row: Run) -> str | None:
    """How long its last attempt took, or has been running."""
    if row["started_at"] is None:
        return None
    return took((row["finished_at"] or SystemClock().now()) - row["started_at"])


def took(time: timedelta) -> str:
    """A duration in its two largest units: `0.4s`, `12s`, `3m10s`, `2h05m` or `1d02h`."""
    seconds = max(time.total_seconds(), 0)
    if seconds < 10:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if not minutes:
        return f"{rest}s"
    if not hours:
        return f"{minutes}m{rest:02}s"
    return f"{hours}h{minutes_left:02}m" if hours < 24 else f"{hours // 24}d{hours % 24:02}h"


def why(row: Run) -> str | None:
    """Its reason with the error or the detail, its progress, and that it was retried."""
    error = row["error"] or {}
    what = ": ".join(str(part) for part in (error.get("type"), error.get("message")) if part)
    parts = (
        "retried" if row["retried_as"] is not None else None,
        ": ".join(filter(None, (row["reason"], what or row["detail"]))),
        in_words(row["progress"]) if row["finished_at"] is None else None,
    )
    return ", ".join(filter(None, parts)) or None


CELLS: Mapping[str, Callable[[Run], Any]] = {
    "scheduled_for": _scheduled_for,
    "took": _took,
    "why": why,
    "id": _id,
}
