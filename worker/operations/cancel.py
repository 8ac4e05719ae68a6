"""Cancel a run: one that waits ends at once, one that is on is asked to stop."""

from __future__ import annotations

from typing import Any

from worker.errors import Conflict
from worker.ids import OrgId, RunId
from worker.operations.named_run import named_run
from worker.store import audit, edit_runs, run_listing
from worker.store.database import Database

Row = dict[str, Any]


def cancel(
    database: Database, run_id: str, *, actor: str, org: str | None = None, state: str | None = None
) -> Row:
    """Cancel a run and return its row; a running one ends after the next renewal and its grace.

    With `org`, another org's run does not exist; with `state`, only a run in it is cancelled.

    Raises:
        NotFound: there is no such run.
        Conflict: it has ended, or is not in that state.
    """
    with database.transaction() as connection:
        run = named_run(connection, run_id, org)
        org_id, wanted = OrgId(run["org_id"]), RunId(run["id"])
        now = database.now(connection)
        if not edit_runs.lock(connection, org_id, wanted):
            raise Conflict(
                f"run {wanted} has ended: {run_listing.row(connection, org_id, wanted)['state']}",
                fix=f"`runs show {wanted}` says how",
            )
        found = run_listing.row(connection, org_id, wanted)["state"]
        if state is not None and found != state:
            raise Conflict(
                f"run {wanted} is {found} by now", fix=f"`runs cancel {wanted}` cancels it all the same"
            )
        this = edit_runs.is_run(wanted)
        if not edit_runs.end_waiting(connection, org_id, this, reason="requested"):
            edit_runs.ask_to_stop(connection, org_id, this, reason="requested", at=now)
        row = run_listing.row(connection, org_id, wanted)
        entry = audit.Entry(org_id, "run.cancel", wanted, {"definition": row["definition"]})
        audit.record(connection, [entry], at=now, actor=actor)
        return row
