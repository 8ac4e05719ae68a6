"""Cancel one run or all that match a filter; a waiting run ends at once, a running one is asked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from worker.errors import Conflict
from worker.ids import OrgId, RunId
from worker.operations.manual_run import named_run
from worker.store import audit, edit_runs, orgs
from worker.store.database import Database
from worker.store.edit_runs import Cancellable
from worker.store.lists import runs as run_lists

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
                f"run {wanted} has ended: {run_lists.row(connection, org_id, wanted)['state']}",
                fix=f"`runs show {wanted}` says how",
            )
        found = run_lists.row(connection, org_id, wanted)["state"]
        if state is not None and found != state:
            raise Conflict(
                f"run {wanted} is {found} by now", fix=f"`runs cancel {wanted}` cancels it all the same"
            )
        this = edit_runs.is_run(wanted)
        if not edit_runs.end_waiting(connection, org_id, this, reason="requested"):
            edit_runs.ask_to_stop(connection, org_id, this, reason="requested", at=now)
        row = run_lists.row(connection, org_id, wanted)
        entry = audit.Entry(org_id, "run.cancel", wanted, {"definition": row["definition"]})
        audit.record(connection, [entry], at=now, actor=actor)
        return row


# Runs read at a time.
PAGE = 100


def matching(database: Database, which: Cancellable, *, org: str | None, limit: int) -> Iterator[Row]:
    """The runs that are unfinished by now as `which` says and that nobody has asked to stop, oldest first.

    Read page by page as they are taken, at most `limit`.

    Raises:
        NotFound: there is no such org.
    """
    return islice(_matching(database, which, org), limit)


def cancel_many(
    database: Database, which: Cancellable, *, actor: str, org: str | None = None, limit: int
) -> Iterator[Row]:
    """Cancel each run that `matching` gives as it is taken, and give what became of it.

    `state` is `cancelled` where it had not started, and `running` where it was asked to
    stop; where it was let be, `left` says why, and its state is what it had become.
    """
    for run in matching(database, which, org=org, limit=limit):
        kept = {name: run[name] for name in ("id", "org", "definition", "scheduled_for")}
        try:
            row = cancel(database, run["id"], actor=actor, org=org, state=which.state)
            yield kept | {"state": row["state"], "left": None}
        except Conflict as error:
            yield kept | {"state": None, "left": error.message}


def _matching(database: Database, which: Cancellable, org: str | None) -> Iterator[Row]:
    with database.autocommit() as connection:
        org_id = None if org is None else orgs.require(connection, org)["id"]
        until = edit_runs.newest_for_all_orgs(connection)
    after: RunId | None = None
    while until is not None:
        with database.autocommit() as connection:
            if org_id is None:
                page = edit_runs.cancellable_page_for_all_orgs(
                    connection, which, until=until, after=after, limit=PAGE
                )
            else:
                page = edit_runs.cancellable_page(
                    connection, org_id, which, until=until, after=after, limit=PAGE
                )
        yield from page
        if len(page) < PAGE:
            return
        after = RunId(page[-1]["id"])
