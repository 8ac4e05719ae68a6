"""The run that a person named."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from worker.errors import NotFound
from worker.ids import RunId
from worker.store import edit_runs, orgs
from worker.store.paging import checked_id

Row = dict[str, Any]


def named_run(connection: Connection, run_id: str, org: str | None) -> Row:
    """Its row of `runs`; with `org`, another org's run does not exist.

    Raises:
        NotFound: there is no such run, or no such org.
    """
    wanted = RunId(checked_id(run_id))
    if org is None:
        row = edit_runs.find_for_all_orgs(connection, wanted)
    else:
        row = edit_runs.find(connection, orgs.require(connection, org)["id"], wanted)
    if row is None:
        raise NotFound(f"there is no run {run_id}", fix="`runs list` names the runs")
    return row
