"""Run a definition now, whatever its schedule says; the same request key makes one run only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worker.definitions.definition import from_spec
from worker.errors import UsageError
from worker.ids import new_id
from worker.operations.by_hand import make_run, refuse_params_of_an_org
from worker.operations.place import place
from worker.store import audit, definitions, edit_runs, orgs, run_listing
from worker.store.database import Database

Row = dict[str, Any]


def run_now(
    database: Database,
    org: str,
    name: str,
    *,
    actor: str,
    request_key: str | None = None,
    params: Mapping[str, Any] | None = None,
    typed: Mapping[str, str] | None = None,
    by_org: bool = False,
) -> Row:
    """Make a run that may start at once, and return its row of `runs list`.

    `params` are laid over the definition's; of those `typed` on a command line, one that
    was read as JSON and that its handler takes only as text is taken as text. `by_org`:
    the org itself asks, and may give no params but the definition's `params_by_hand`. A
    request key that made a run already returns that run, whatever became of it. A paused
    definition may be run by hand.

    Raises:
        NotFound: there is no such org or definition.
        AccessDenied: a param that the org may not give.
        Conflict: it is closed, its org is not active, or an unfinished run stands in the way.
        DefinitionError: params that the handler does not take.
    """
    if request_key is not None and not (0 < len(request_key) <= 200 and request_key.isprintable()):
        raise UsageError(
            "a request key has 1 to 200 printable characters", fix="leave it out to have a random one"
        )
    key = request_key or new_id()
    with database.transaction() as connection:
        org_id = orgs.require(connection, org)["id"]
        row = definitions.require(connection, org_id, org, name, lock=True)
        if by_org and params:
            refuse_params_of_an_org(from_spec(org, name, row["spec"]), params)
        made = edit_runs.find_by_request_key(connection, org_id, row["id"], key)
        if made is not None:
            return run_listing.row(connection, org_id, made)
        now = database.now(connection)
        run = make_run(
            connection,
            row,
            origin="manual",
            scheduled_for=now,
            at=now,
            actor=actor,
            params={**row["spec"].get("params", {}), **params} if params else None,
            typed=typed,
            request_key=key,
        )
        place(connection, run, at=now)
        entry = audit.Entry(org_id, "definition.run", f"{org} {name}", {"run": run.id, "request_key": key})
        audit.record(connection, [entry], at=now, actor=actor)
        return run_listing.row(connection, org_id, run.id)
