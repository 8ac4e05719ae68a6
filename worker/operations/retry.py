"""Retry ended runs: one by id, or all that match a filter; a new run each, since ended rows never change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from worker.definitions.definition import from_spec
from worker.errors import Conflict, DefinitionError
from worker.ids import DefinitionId, OrgId, RunId
from worker.operations.changes import differing
from worker.operations.manual_run import make_run, named_run, place, refuse_params_of_an_org
from worker.store import audit, definitions, edit_runs, orgs
from worker.store.database import Database
from worker.store.edit_runs import Key, Retryable
from worker.store.lists import runs as run_lists

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
        if once and (newer := edit_runs.retry_of(connection, old_id)) is not None:
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
        return run_lists.row(connection, org_id, run.id)


def _other(params: Mapping[str, Any], definitions: Mapping[str, Any]) -> set[str]:
    """The names of params that are not as the definition has them, or that only one of the two has."""
    return differing(params, definitions).keys() | (params.keys() ^ definitions.keys())


# Runs read at a time.
PAGE = 100


def matching(database: Database, which: Retryable, *, org: str | None, limit: int) -> Iterator[Row]:
    """The runs that have ended by now as `which` says and that nobody has retried, the oldest end first.

    Read page by page as they are taken, at most `limit`.

    Raises:
        NotFound: there is no such org.
    """
    return islice(_matching(database, which, org), limit)


def retry_many(
    database: Database,
    which: Retryable,
    *,
    actor: str,
    org: str | None = None,
    from_checkpoint: bool = False,
    limit: int,
) -> Iterator[Row]:
    """Retry each run that `matching` gives as it is taken, and give what became of it.

    `id` is the new run and `state` its state; where it could not be made, `id` is None
    and `left` says why. Called again it goes on with those that were left.
    """
    for old in matching(database, which, org=org, limit=limit):
        made: Row = {"id": None, "state": None, "left": None}
        try:
            new = retry(database, old["id"], actor=actor, org=org, from_checkpoint=from_checkpoint, once=True)
            made |= {"id": new["id"], "state": new["state"]}
        except (Conflict, DefinitionError) as error:
            made["left"] = error.message
        kept = {name: old[name] for name in ("org", "definition", "scheduled_for")}
        yield made | {"retry_of": old["id"]} | kept


def _matching(database: Database, which: Retryable, org: str | None) -> Iterator[Row]:
    with database.autocommit() as connection:
        org_id = None if org is None else orgs.require(connection, org)["id"]
        until = database.now(connection)
    after: Key | None = None
    while True:
        with database.autocommit() as connection:
            if org_id is None:
                page = edit_runs.retryable_page_for_all_orgs(
                    connection, which, until=until, after=after, limit=PAGE
                )
            else:
                page = edit_runs.retryable_page(
                    connection, org_id, which, until=until, after=after, limit=PAGE
                )
        yield from page
        if len(page) < PAGE:
            return
        after = (page[-1]["finished_at"], page[-1]["id"])
