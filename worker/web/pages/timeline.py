"""The lanes of a run's Gantt: waiting, token, starting and running, for each of its newest attempts. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from worker.web.charts import Lane, Piece

# Attempts that the chart draws; a run without a token may have thousands.
MOST_LANES = 12


def lanes_of(run: Mapping[str, Any], now: datetime) -> list[Lane]:
    """One lane an attempt, oldest first, and one for what the run waits for now."""
    attempts: Sequence[Mapping[str, Any]] = run["attempts"]
    lanes = []
    since: datetime = run["created_at"]
    for attempt in attempts:
        end = attempt["ended_at"] or now
        # When an attempt got its token is stored at its end.
        is_running = attempt["ended_at"] is None
        marks = (
            ("waiting", "waiting", since),
            ("token", "token", None if is_running else attempt["started_at"]),
            ("starting", "starting", attempt["token_ready_at"]),
            ("running", "running", attempt["started_at" if is_running else "handler_started_at"]),
        )
        lanes.append(
            Lane(f"Attempt {attempt['attempt']}", _pieces(marks, end), attempt["outcome"] or "running")
        )
        since = end
    if run["state"] == "waiting" and now > since:
        note = run["reason"] or ""
        lanes.append(Lane("Now", [Piece("waiting", "waiting", since, now)], note.replace("_", " ")))
    return lanes[-MOST_LANES:]


def _pieces(marks: Sequence[tuple[str, str, datetime | None]], end: datetime) -> list[Piece]:
    """Each mark until the next one that was reached; none without a length."""
    reached = [(name, kind, at) for name, kind, at in marks if at is not None]
    pieces = []
    for at, (name, kind, start) in enumerate(reached):
        until = reached[at + 1][2] if at + 1 < len(reached) else end
        if until > start or (name == "running" and until == start):
            pieces.append(Piece(name, kind, start, until))
    return pieces
