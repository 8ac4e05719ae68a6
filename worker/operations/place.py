"""A run made by hand meets the one that is on: what the definition's overlap rule says then."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection

from worker.errors import Conflict
from worker.runs.run import NewRun
from worker.store import overlaps


def place(connection: Connection, run: NewRun, *, at: datetime) -> None:
    """Insert a run made by hand, whose definition is locked: waiting, held back, or in another's place.

    Raises:
        Conflict: an unfinished run of the definition stands in its way; the message names it.
    """
    other = overlaps.place(connection, run, at=at)
    if other is not None:
        state = "held back already" if other["state"] == "held" else other["state"]
        raise Conflict(
            f"run {other['id']} of this definition is {state}, and its overlap is {run.overlap}",
            fix=f"wait for it, or end it with `runs cancel {other['id']}`",
        )
