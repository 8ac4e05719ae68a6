"""A run made by hand meets the one that is on: what the definition's overlap rule says then."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection

from worker.definitions.policies import Overlap
from worker.errors import Conflict
from worker.runs.run import NewRun
from worker.store import edit_runs


def place(connection: Connection, run: NewRun, overlap: Overlap, *, at: datetime) -> None:
    """Insert a run made by hand, whose definition is locked: waiting, held back, or in another's place.

    Raises:
        Conflict: an unfinished run of the definition stands in its way; the message names it.
    """
    others = edit_runs.unfinished(connection, run.org_id, run.definition_id) if run.serial else []
    held = [other for other in others if other["state"] == "held"]
    if not others:
        edit_runs.insert_run(connection, run, at=at)
    elif overlap == "queue_one" and not held:
        edit_runs.insert_run(connection, run, at=at, held=True)
    elif overlap == "replace":
        ours = edit_runs.is_of(run.definition_id)
        edit_runs.end_waiting(connection, run.org_id, ours, edit_runs.is_serial(), reason="replaced")
        asked = [other for other in others if other["state"] == "running"]
        edit_runs.ask_to_stop(connection, run.org_id, ours, edit_runs.is_serial(), reason="replaced", at=at)
        edit_runs.insert_run(connection, run, at=at, held=bool(asked))
    else:
        other = held[0] if held and overlap == "queue_one" else others[0]
        state = "held back already" if other["state"] == "held" else other["state"]
        raise Conflict(
            f"run {other['id']} of this definition is {state}, and its overlap is {overlap}",
            fix=f"wait for it, or end it with `runs cancel {other['id']}`",
        )
