"""Retry a run that has ended: a new run for the same instant, since ended rows never change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worker.definitions.definition import from_spec
from worker.errors import Conflict
from worker.ids import DefinitionId, OrgId, RunId
from worker.operations.by_hand import make_run, refuse_params_of_an_org
from worker.operations.changes import differing
from worker.operations.named_run import named_run
from worker.operations.place import place
from worker.store import audit, definitions, edit_runs, retryable, run_listing
from worker.store.database import Database

Row = dict[str, Any]


def retry(
    database: Database,
    run_id: str,
    *,
    actor: str,
    org: str | None = None,
    from_checkpoint: bool = False,
    once: bool = False,
    by_org: bool = False,
) -> Row:
    """Make a new run of the definition as it is now, and return its row of `runs list`.

    It has the old one's `scheduled_for`, `idempotency_key` and params given by hand;
    with `from_checkpoint` it begins where the old one had saved. With `org`, another
    org's run does not exist; with `once`, one that was retried before is not again.
    `by_org`: the org itself asks, and may only repeat params that the definition has, or
    that are among its `params_by_hand`.

    Raises:
        NotFound: there is no such run.
        AccessDenied: the run has a param that the org may not give.
        Conflict: it has not ended or was retried, it saved nothing to begin from, its definition is
            closed, its org is not active, or an unfinished run of the definition stands in the way.
    """
    with database.transaction() as connection:
        old = named_run(connection, run_id, org)
        if old["state"] is None:
            raise Conflict(
                f"run {old['id']} has not ended", fix=f"`runs cancel {old['id']}` ends it, then retry"
            )
        org_id, old_id = OrgId(old["org_id"]), RunId(old["id"])
        row = definitions.require_by_id(connection, org_id, DefinitionId(old["definition_id"]))
        if once and (newer := retryable.retry_of(connection, old_id)) is not None:
            raise Conflict(f"run {old_id} was retried by run {newer}", fix=f"`runs show {newer}` says more")
        if by_org and old["params"] is not None:
            definition = from_spec(row["org"], row["name"], row["spec"])
            refuse_params_of_an_org(definition, _other(old["params"], definition.params))
        now = database.now(connection)
        run = make_run(
            connection,
            row,
            origin="retry",
            scheduled_for=old["scheduled_for"],
            at=now,
            actor=actor,
            params=old["params"],
            retry_of=old_id,
            idempotency_key=old["idempotency_key"],
        )
        place(connection, run, at=now)
        if from_checkpoint and not edit_runs.copy_checkpoint(connection, org_id, old_id, run.id, at=now):
            raise Conflict(f"run {old_id} saved no checkpoint", fix="retry it without one")
        detail = {"retry_of": old_id, "from_checkpoint": from_checkpoint}
        entry = audit.Entry(org_id, "run.retry", run.id, detail)
        audit.record(connection, [entry], at=now, actor=actor)
        return run_listing.row(connection, org_id, run.id)


def _other(params: Mapping[str, Any], definitions: Mapping[str, Any]) -> set[str]:
    """The names of params that are not as the definition has them, or that only one of the two has."""
    return differing(params, definitions).keys() | (params.keys() ^ definitions.keys())
