"""Runs: run a definition now; cancel or retry a run. `operations.bulk` changes all that match a filter."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection

from worker.errors import AccessDenied, Conflict, NotFound, StoreUnavailable, UsageError
from worker.ids import ALL_ORGS, DefinitionId, OrgId, RunId, new_id
from worker.model.definitions import Overlap, fields
from worker.model.definitions.definition import Definition, from_spec
from worker.model.runs.run import MAX_AHEAD, START_LATER, TOO_FAR_AHEAD, NewRun, Origin
from worker.operations.changes import because, differing
from worker.operations.handlers import Handlers, as_taken
from worker.store import (
    audit,
    children,
    definitions,
    edit_runs,
    families,
    firing,
    orgs,
    spending,
    steps,
    waits,
)
from worker.store.database import Database
from worker.store.dialect import Row
from worker.store.lists import runs as run_lists
from worker.store.lists.rows import Run
from worker.store.lists.run_ids import id_of


class Started(NamedTuple):
    """A run, and if its key had made it before, whether with the `same` or with `other` params."""

    run: Run
    replayed: Literal["same", "other"] | None = None


def run_now(database: Database, org: str, name: str, **what: Any) -> Run:
    """As `start`, and returns the run's row alone."""
    return start(database, org, name, **what).run


def start(
    database: Database,
    org: str,
    name: str,
    *,
    actor: str,
    request_key: str | None = None,
    params: Mapping[str, Any] | None = None,
    typed: Mapping[str, str] | None = None,
    not_before: datetime | None = None,
    by_org: bool = False,
    only_own: bool = False,
    reason: str | None = None,
) -> Started:
    """Make a run that can start at once, or not before a time, also of a paused definition.

    `params` override the definition's. `typed` has params as they were typed on a command
    line: where the handler accepts only text, the typed text is used. With `by_org` the org
    itself asks and can give only the definition's `params_by_hand`. A request key that was
    used before returns the run that it made, in whatever state; with `only_own` that run has to be
    the actor's. `reason` is kept in the audit row.

    Raises:
        NotFound: no such org or definition.
        AccessDenied: a param that the org cannot give.
        Conflict: the definition is closed, its org is not active, or an unfinished run blocks it.
        DefinitionError: params that the handler does not accept.
        UsageError: a key that is invalid or another actor's, or a time that is too far ahead.
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
            _check_given_by_org(from_spec(org, name, row["spec"]), params)
        existing = edit_runs.find_by_request_key(connection, org_id, row["id"], key)
        if existing is not None:
            return _replayed(connection, row, existing, params, actor=actor, only_own=only_own)
        now = database.now(connection)
        if not_before is not None and not_before > now + MAX_AHEAD:
            raise UsageError(TOO_FAR_AHEAD, fix=START_LATER)
        run_id = _place(
            connection,
            row,
            origin="manual",
            scheduled_for=now,
            at=now,
            available_at=max(now, not_before or now),
            actor=actor,
            params={**row["spec"].get("params", {}), **params} if params else None,
            typed=typed,
            request_key=key,
        )
        detail = {"run": run_id, "request_key": key, **because(reason)}
        audit.note(connection, org_id, "definition.run", f"{org} {name}", detail, at=now, actor=actor)
        return Started(run_lists.row(connection, org_id, run_id))


def _replayed(
    connection: Connection,
    row: Mapping[str, Any],
    run_id: RunId,
    params: Mapping[str, Any] | None,
    *,
    actor: str,
    only_own: bool,
) -> Started:
    """The run that a key has made; what another actor gave it always counts as other params.

    Raises:
        UsageError: another actor has used the key.
    """
    org_id = OrgId(row["org_id"])
    old = edit_runs.find(connection, org_id, run_id)
    is_own = old is not None and old["created_by"] == actor
    if old is None or (only_own and not is_own):
        raise UsageError(
            f"another caller has used this key for {row['org']}/{row['name']}",
            fix="use a key of your own, such as one with a prefix",
        )
    spec = definitions.spec_of(connection, org_id, row["id"], old["revision"])
    own = spec.get("params", {})
    same = {**own, **(params or {})} == (own if old["params"] is None else old["params"])
    return Started(run_lists.row(connection, org_id, run_id), "same" if is_own and same else "other")


def cancel(
    database: Database,
    run_id: str,
    *,
    actor: str,
    org: str | None = None,
    states: Collection[str] = (),
    reason: str | None = None,
) -> Run:
    """Cancel a waiting run, or ask a running one to stop by the next renewal; returns its row.

    Those below it end with it.

    With `org`, only that org's runs are found; with `states`, only a run in one is cancelled.
    `reason` is kept in the audit row.

    Raises:
        NotFound: no such run.
        Conflict: it has ended, or is in another state.
    """
    with database.transaction() as connection:
        run = require_run(connection, run_id, org)
        org_id, wanted = OrgId(run["org_id"]), RunId(run["id"])
        now = database.now(connection)
        families.lock_tree(connection, org_id, wanted)
        attempt = waits.lock_attempt(connection, org_id, wanted)
        found = run_lists.row(connection, org_id, wanted)["state"]
        if attempt is None:
            raise Conflict(f"run {wanted} has ended: {found}", fix=f"see `runs show {wanted}`")
        if states and found not in states:
            raise Conflict(f"run {wanted} is now {found}", fix=f"`runs cancel {wanted}` cancels it anyway")
        # First: who has locked the sums of an org, to count ends, locks no run after that.
        families.cancel_below(connection, org_id, wanted, at=now)
        this = edit_runs.is_run(wanted)
        if not edit_runs.end_waiting(connection, org_id, this, reason="requested"):
            edit_runs.ask_to_stop(connection, org_id, this, reason="requested", at=now)
        row = run_lists.row(connection, org_id, wanted)
        detail = {"definition": row["definition"], **because(reason)}
        audit.note(connection, org_id, "run.cancel", wanted, detail, at=now, actor=actor)
    if row["origin"] == "child" and row["state"] == "cancelled":
        # If this fails, the next look of a worker at families does it.
        with suppress(StoreUnavailable), database.transaction() as connection:
            families.settle(connection, [wanted])
    return row


def retry(
    database: Database,
    run_id: str,
    *,
    actor: str,
    org: str | None = None,
    from_checkpoint: bool = False,
    again: bool = False,
    only_children: bool = False,
    reason: str | None = None,
) -> Run:
    """Make a new run of an ended one's definition, as it is now; returns its row of `runs list`.

    With `only_children` as `retry_children`.

    The new run has the old one's `scheduled_for`, `idempotency_key` and params given by
    hand, and its checkpoint and steps with `from_checkpoint`. A run is retried only once, unless
    `again` is set. With `org` that org asks: only its runs are found, and each param must equal the
    definition's or be among its `params_by_hand`. `reason` is kept in the audit row.

    Raises:
        NotFound: no such run.
        AccessDenied: the run has a param that the org cannot give.
        Conflict: it has not ended, was retried or stored no checkpoint and no step; the handler that
            stored them is gone; its definition is closed, its org is not active, or an unfinished run
            of the definition blocks it.
    """
    if only_children:
        return retry_children(database, run_id, actor=actor, org=org, again=again, reason=reason)[0]
    with database.transaction() as connection:
        old = require_run(connection, run_id, org)
        if old["state"] is None:
            raise Conflict(
                f"run {old['id']} has not ended", fix=f"`runs cancel {old['id']}` ends it, then retry"
            )
        if old["origin"] == "child":
            parent = children.parent_of(connection, RunId(old["id"]))
            raise Conflict(
                f"run {old['id']} is a child of run {parent}",
                fix=f"`runs retry {parent} --children` starts the children again that did not succeed",
            )
        org_id, old_id = OrgId(old["org_id"]), RunId(old["id"])
        row = definitions.require_by_id(connection, org_id, DefinitionId(old["definition_id"]))
        if not again and (newer := edit_runs.retry_of(connection, org_id, old_id)) is not None:
            raise Conflict(
                f"run {old_id} was retried already, as run {newer}",
                fix=f"see `runs why {newer}`; `--again`, or `again` in the API, repeats it",
            )
        if org is not None and old["params"] is not None:
            definition = from_spec(row["org"], row["name"], row["spec"])
            changed = differing(old["params"], definition.params).keys()
            _check_given_by_org(definition, changed | (old["params"].keys() ^ definition.params.keys()))
        now = database.now(connection)
        new_run_id = _place(
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
        if from_checkpoint:
            _continue(connection, row, old_id, new_run_id, at=now)
        detail = {"retry_of": old_id, "from_checkpoint": from_checkpoint, **because(reason)}
        audit.note(connection, org_id, "run.retry", new_run_id, detail, at=now, actor=actor)
        return run_lists.row(connection, org_id, new_run_id)


def retry_children(
    database: Database,
    run_id: str,
    *,
    actor: str,
    org: str | None = None,
    again: bool = False,
    reason: str | None = None,
) -> tuple[Run, int]:
    """Start those children of a run again that did not succeed; returns the run's row, and their number.

    An unfinished run waits for them in their places. One that has ended is retried from its checkpoint, which
    takes up the children that succeeded: its row is that of the new run.

    Raises:
        NotFound: no such run.
        Conflict: no child of it failed; and as `retry`.
    """
    with database.transaction() as connection:
        run = require_run(connection, run_id, org)
        org_id, parent_id = OrgId(run["org_id"]), RunId(run["id"])
        failed = children.counts(connection, org_id, parent_id).not_succeeded
        if not failed:
            raise Conflict(
                f"run {parent_id} has no child that did not succeed", fix=f"see `runs show {parent_id}`"
            )
        if run["state"] is None and waits.lock_attempt(connection, org_id, parent_id) is not None:
            now = database.now(connection)
            declared = Handlers(connection).declared
            count = children.restart(
                connection,
                org_id,
                parent_id,
                lambda handler, pool: declared(handler).isolation_in(pool),
                at=now,
                by=actor,
            )
            detail = {"children": count, **because(reason)}
            audit.note(connection, org_id, "run.retry_children", parent_id, detail, at=now, actor=actor)
            return run_lists.row(connection, org_id, parent_id), count
    return (
        retry(database, run_id, actor=actor, org=org, from_checkpoint=True, again=again, reason=reason),
        failed,
    )


def require_run(connection: Connection, run_id: str, org: str | None) -> Row:
    """The row of `runs` of a run, of `org` only if that is given.

    Raises:
        NotFound: no such run, or no such org.
        UsageError: several runs fit.
    """
    scope = orgs.scope_of(connection, ALL_ORGS if org is None else org)
    row = edit_runs.find(connection, scope, id_of(connection, scope, run_id))
    if row is None:
        raise NotFound(f"there is no run {run_id}", fix="`runs list` lists the runs")
    return row


def require_active(row: Mapping[str, Any]) -> None:
    """Refuse a definition that starts no runs.

    Raises:
        Conflict: it is closed, or its org is not active.
    """
    if row["org_state"] != "active":
        back = "add" if row["org_state"] == "removed" else "resume"
        raise Conflict(
            f"org {row['org']} is {row['org_state']}: none of its runs start",
            fix=f"`orgs {back} {row['org']}` makes it active",
        )
    if row["closed_at"] is not None:
        raise Conflict(f"definition {row['org']}/{row['name']} is closed", fix="`apply` a file that has it")


def new_run(
    row: Mapping[str, Any],
    definition: Definition,
    handlers: Handlers,
    *,
    origin: Origin,
    scheduled_for: datetime,
    at: datetime,
) -> NewRun:
    """A run of a definition row's revision that can start at once."""
    run_id = RunId(new_id())
    pool = handlers.pool_of(definition, row["org_pool"])
    return NewRun(
        id=run_id,
        org_id=row["org_id"],
        definition_id=row["id"],
        revision=row["revision"],
        handler=definition.handler,
        origin=origin,
        scheduled_for=scheduled_for,
        available_at=at,
        idempotency_key=run_id,
        isolation=handlers.isolation_of(definition, pool),
        pool=pool,
        serial=definition.serial,
        overlap=definition.overlap,
        priority=definition.priority,
        variant_handlers=definition.handlers if definition.variants else (),
        max_concurrent=definition.max_concurrent,
    )


def _place(
    connection: Connection,
    row: Mapping[str, Any],
    *,
    origin: Origin,
    scheduled_for: datetime,
    at: datetime,
    actor: str,
    params: Mapping[str, Any] | None,
    typed: Mapping[str, str] | None = None,
    **identity: Any,
) -> RunId:
    """Insert a run of a locked definition, as its overlap rule says: waiting, held or as a replacement.

    `params` replace the definition's; `identity` overrides fields of `NewRun`.

    Raises:
        Conflict: the definition is closed, its org is not active, or an unfinished run blocks it.
        DefinitionError: params that the handler does not accept.
    """
    require_active(row)
    definition = from_spec(row["org"], row["name"], row["spec"])
    handlers = Handlers(connection)
    if params is not None:
        params = checked_params(row, definition, handlers, params, typed or {})
    run = new_run(row, definition, handlers, origin=origin, scheduled_for=scheduled_for, at=at)
    run = replace(run, created_by=actor, params=params, **identity)
    blocking = firing.place(connection, run, at=at)
    if blocking is not None:
        raise Conflict(
            overlap_problem(blocking, run.overlap),
            fix=f"wait for it, or end it with `runs cancel {blocking['id']}`",
        )
    return run.id


def checked_params(
    row: Mapping[str, Any],
    definition: Definition,
    handlers: Handlers,
    params: Mapping[str, Any],
    typed: Mapping[str, str],
) -> Mapping[str, Any]:
    """All params of a run of a definition row as its handlers take them.

    Raises:
        DefinitionError: a handler does not accept them.
    """
    entry = f"definition {row['org']}/{row['name']}"
    pool = handlers.pool_of(definition, row["org_pool"])
    try:
        params = fields.json_table(params)
    except ValueError as error:
        raise fields.refusal(str(error), entry, "params") from error
    for handler in definition.handlers:
        params = as_taken(handlers.schema(handler, pool), params, typed)
        handlers.check_params(handler, params, entry, pool)
    return params


def overlap_problem(blocking: Mapping[str, Any], overlap: Overlap) -> str:
    """Why an unfinished run keeps another one of its definition out."""
    state = "held back already" if blocking["state"] == "held" else blocking["state"]
    return f"run {blocking['id']} of this definition is {state}, and its overlap is {overlap}"


def _continue(
    connection: Connection, row: Mapping[str, Any], old: RunId, new: RunId, *, at: datetime
) -> None:
    """Give a retry the checkpoint, the steps with their spends, and the answers of the run that it continues.

    Raises:
        Conflict: there are none, or the handler that stored them is no longer offered.
    """
    org_id = OrgId(row["org_id"])
    handler = steps.first_handler(connection, old)
    saved = edit_runs.copy_checkpoint(connection, org_id, old, new, at=at)
    stored = steps.copy_steps(connection, org_id, old, new)
    spending.copy(connection, org_id, old, new)
    answered = waits.copy(connection, org_id, old, new)
    taken = children.take_up(connection, org_id, old, new)
    spending.take_up(connection, org_id, new)
    if not (saved or stored or answered or taken):
        raise Conflict(
            f"run {old} saved no checkpoint and stored no step", fix="retry it without --from-checkpoint"
        )
    if handler is None:
        return
    definition = from_spec(row["org"], row["name"], row["spec"])
    named, handlers = handler in definition.handlers, Handlers(connection)
    if named and handlers.is_offered(handler, handlers.pool_of(definition, row["org_pool"])):
        return
    gone = "no installed distribution offers" if named else "its definition no longer names"
    raise Conflict(
        f"the handler {handler} stored the progress of run {old}, and {gone} it",
        fix="bring it back, or retry without --from-checkpoint",
    )


def _check_given_by_org(definition: Definition, given: Collection[str]) -> None:
    """Refuse params that only an operator can give.

    Raises:
        AccessDenied: names the first param that is not in `params_by_hand`.
    """
    denied = sorted(set(given) - set(definition.params_by_hand))
    if denied:
        allowed = ", ".join(definition.params_by_hand) or "no params"
        raise AccessDenied(
            f"definition {definition.org}/{definition.name}: an org cannot give the param {denied[0]!r}",
            fix=f"leave it out: params_by_hand of the definition allows {allowed}; an operator can give any",
        )
