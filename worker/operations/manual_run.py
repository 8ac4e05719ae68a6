"""Manual runs: run a definition now, and what retry and backfill share with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection

from worker.definitions import fields
from worker.definitions.definition import Definition, from_spec
from worker.errors import AccessDenied, Conflict, NotFound, UsageError
from worker.ids import RunId, new_id
from worker.operations.handlers import Handlers
from worker.runs.run import NewRun
from worker.store import audit, definitions, edit_runs, firing, orgs
from worker.store.database import Database
from worker.store.lists import runs as run_lists
from worker.store.lists.paging import checked_id

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


def place(connection: Connection, run: NewRun, *, at: datetime) -> None:
    """Insert a run made by hand, whose definition is locked: waiting, held back, or in another's place.

    Raises:
        Conflict: an unfinished run of the definition stands in its way; the message names it.
    """
    other = firing.place(connection, run, at=at)
    if other is not None:
        state = "held back already" if other["state"] == "held" else other["state"]
        raise Conflict(
            f"run {other['id']} of this definition is {state}, and its overlap is {run.overlap}",
            fix=f"wait for it, or end it with `runs cancel {other['id']}`",
        )


Columns = Mapping[str, Any]


def refuse_what_is_not_active(row: Columns) -> None:
    """Refuse a definition of which nothing starts.

    Raises:
        Conflict: it is closed, or its org is not active.
    """
    if row["org_state"] != "active":
        back = "add" if row["org_state"] == "removed" else "resume"
        raise Conflict(
            f"org {row['org']} is {row['org_state']}: nothing of it starts",
            fix=f"`orgs {back} {row['org']}` lets it",
        )
    if row["closed_at"] is not None:
        raise Conflict(f"definition {row['org']}/{row['name']} is closed", fix="`apply` a file that has it")


def refuse_params_of_an_org(definition: Definition, given: Collection[str]) -> None:
    """Refuse params that the definition does not let its org give by hand; an operator may give any.

    Raises:
        AccessDenied: names the first one that is not among `params_by_hand`.
    """
    barred = sorted(set(given) - set(definition.params_by_hand))
    if barred:
        allowed = ", ".join(definition.params_by_hand) or "no params"
        raise AccessDenied(
            f"definition {definition.org}/{definition.name}: an org may not give the param {barred[0]!r}",
            fix=f"leave it out: the definition's params_by_hand names {allowed}; an operator may give any",
        )


def make_run(
    connection: Connection,
    row: Columns,
    *,
    origin: Literal["manual", "retry"],
    scheduled_for: datetime,
    at: datetime,
    actor: str,
    params: Mapping[str, Any] | None = None,
    typed: Mapping[str, str] | None = None,
    request_key: str | None = None,
    retry_of: RunId | None = None,
    idempotency_key: str | None = None,
) -> NewRun:
    """A run of the current revision of a definition, available at once.

    `params` are all it gets, if given; those `typed` on a command line as their handler takes them.

    Raises:
        Conflict: the definition is closed, or its org is not active.
        DefinitionError: params that the handler does not take.
    """
    refuse_what_is_not_active(row)
    named = f"{row['org']}/{row['name']}"
    definition = from_spec(row["org"], row["name"], row["spec"])
    handlers = Handlers(connection)
    if params is not None:
        params = _kept(params, f"definition {named}")
        for handler in definition.handlers:
            params = handlers.as_taken(handler, params, typed or {})
            handlers.check_params(handler, params, f"definition {named}")
    run_id = RunId(new_id())
    return NewRun(
        id=run_id,
        org_id=row["org_id"],
        definition_id=row["id"],
        revision=row["revision"],
        handler=definition.handler,
        origin=origin,
        scheduled_for=scheduled_for,
        available_at=at,
        idempotency_key=idempotency_key or run_id,
        isolation=definition.isolation or handlers.isolation_of(definition.handler),
        serial=definition.serial,
        overlap=definition.overlap,
        priority=definition.priority,
        variant_handlers=definition.handlers if definition.variants else (),
        max_concurrent=definition.max_concurrent,
        request_key=request_key,
        retry_of=retry_of,
        created_by=actor,
        params=params,
    )


def _kept(params: Mapping[str, Any], entry: str) -> Mapping[str, Any]:
    """The params, if a database can keep them."""
    try:
        return fields.json_table(params)
    except ValueError as error:
        raise fields.refusal(str(error), entry, "params") from error


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
            return run_lists.row(connection, org_id, made)
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
        return run_lists.row(connection, org_id, run.id)
