"""Runs as people see them: lists by key, and one run with all that is known of it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, Connection, Integer, Select, Text, column, select, table

from worker.errors import NotFound, UsageError
from worker.ids import DefinitionId, OrgId, RunId
from worker.store import orgs, tables
from worker.store.paging import DEFAULT_LIMIT, Row, checked_id, page
from worker.store.tables import Id, Instant, json_type

RUN_STATES = ("waiting", "running", *tables.FINAL_STATES)

# The documented columns of `runs list`, in their order.
LISTED = (
    "id",
    "org",
    "definition",
    "handler",
    "revision",
    "scheduled_for",
    "origin",
    "retry_of",
    "state",
    "reason",
    "detail",
    "available_at",
    "attempt",
    "fencing_token",
    "result_fencing_token",
    "worker",
    "started_at",
    "finished_at",
    "progress",
    "result",
    "error",
)

_view = table(
    "run_view",
    column("id", Id()),
    column("org_id", Id()),
    column("org", Text()),
    column("definition_id", Id()),
    column("definition", Text()),
    column("handler", Text()),
    column("revision", Integer()),
    column("scheduled_for", Instant()),
    column("created_at", Instant()),
    column("origin", Text()),
    column("retry_of", Id()),
    column("request_key", Text()),
    column("idempotency_key", Id()),
    column("state", Text()),
    column("reason", Text()),
    column("detail", Text()),
    column("available_at", Instant()),
    column("attempt", Integer()),
    column("fencing_token", BigInteger()),
    column("result_fencing_token", BigInteger()),
    column("worker", Id()),
    column("started_at", Instant()),
    column("finished_at", Instant()),
    column("progress", json_type()),
    column("result", json_type()),
    column("error", json_type()),
    column("params", json_type()),
    column("cancel_requested_at", Instant()),
)
_live = tables.live_runs
_attempts = tables.attempts


def runs(
    connection: Connection,
    org: str,
    *,
    definition: str | None = None,
    state: str | None = None,
    since: datetime | None = None,
    limit: int = DEFAULT_LIMIT,
    after: str | None = None,
) -> list[Row]:
    """One org's runs, newest first, those made at or after `since`.

    Raises:
        NotFound: there is no such org.
        UsageError: a state, limit or id that is none.
    """
    mine = _view.c.org_id == orgs.require(connection, org)["id"]
    return _runs(connection, [mine], definition, state, since, limit, after)


def runs_for_all_orgs(
    connection: Connection,
    *,
    definition: str | None = None,
    state: str | None = None,
    since: datetime | None = None,
    limit: int = DEFAULT_LIMIT,
    after: str | None = None,
) -> list[Row]:
    """As `runs`, of every org."""
    return _runs(connection, [], definition, state, since, limit, after)


def run(connection: Connection, org: str, run_id: str) -> Row:
    """One run of this org: the listed columns, its attempts, checkpoint, claims (redacted) and spec.

    Raises:
        NotFound: there is no such run, or it is another org's.
    """
    return _run(connection, run_id, [_view.c.org_id == orgs.require(connection, org)["id"]])


def run_for_all_orgs(connection: Connection, run_id: str) -> Row:
    """As `run`, of whichever org."""
    return _run(connection, run_id, [])


def unfinished(connection: Connection, org: str, definition_id: DefinitionId) -> list[Row]:
    """Id and state of a definition's serial runs that have not ended, oldest first; held ones say so."""
    query = select(_live.c.id, _live.c.state).where(
        _live.c.org_id == orgs.require(connection, org)["id"],
        _live.c.definition_id == definition_id,
        _live.c.serial,
    )
    return [dict(row) for row in connection.execute(query.order_by(_live.c.id)).mappings()]


def row(connection: Connection, org_id: OrgId, run_id: RunId) -> Row:
    """The listed columns of a run that is known to be there."""
    query = select(*(_view.c[name] for name in LISTED)).where(_view.c.id == run_id, _view.c.org_id == org_id)
    return dict(connection.execute(query).mappings().one())


def _runs(
    connection: Connection,
    where: list[ColumnElement[bool]],
    definition: str | None,
    state: str | None,
    since: datetime | None,
    limit: int,
    after: str | None,
) -> list[Row]:
    query = select(*(_view.c[name] for name in LISTED)).where(*where)
    if definition is not None:
        named = select(tables.definitions.c.id).where(tables.definitions.c.name == definition)
        query = query.where(_view.c.definition_id.in_(named))
    if state is not None:
        query = query.where(*_in_state(state))
    return page(
        connection, query, _view.c.id, limit=limit, after=after, since=since, since_column=_view.c.created_at
    )


def _in_state(state: str) -> list[ColumnElement[bool]]:
    if state not in RUN_STATES:
        raise UsageError(f"{state!r} is no state of a run", fix=f"one of {', '.join(RUN_STATES)}")
    conditions: list[ColumnElement[bool]] = [_view.c.state == state]
    if state not in tables.FINAL_STATES:
        # Unfinished runs are few: start from their table instead of walking the history.
        kept = ("running",) if state == "running" else ("waiting", "held")
        conditions.append(_view.c.id.in_(select(_live.c.id).where(_live.c.state.in_(kept))))
    return conditions


def _run(connection: Connection, run_id: str, where: list[ColumnElement[bool]]) -> Row:
    found = (
        connection.execute(select(_view).where(_view.c.id == checked_id(run_id), *where)).mappings().first()
    )
    if found is None:
        raise NotFound(f"there is no run {run_id}", fix="`runs list` names the runs")
    row = dict(found)
    shown = {name: row[name] for name in LISTED}
    for name in ("created_at", "request_key", "idempotency_key", "params", "cancel_requested_at"):
        shown[name] = row[name]
    ended = [dict(entry) for entry in connection.execute(_ended_attempts(RunId(row["id"]))).mappings()]
    shown["claims"] = next(
        (entry["claims"] for entry in reversed(ended) if entry["claims"] is not None), None
    )
    shown["attempts"] = [
        {name: value for name, value in entry.items() if name != "claims"} for entry in ended
    ] + ([_attempt_that_is_on(row)] if row["state"] == "running" else [])
    shown["checkpoint"] = connection.execute(
        select(tables.checkpoints.c.data).where(tables.checkpoints.c.run_id == row["id"])
    ).scalar_one_or_none()
    revisions = tables.definition_revisions
    shown["spec"] = connection.execute(
        select(revisions.c.spec).where(
            revisions.c.definition_id == row["definition_id"], revisions.c.revision == row["revision"]
        )
    ).scalar_one_or_none()
    return shown


def _ended_attempts(run_id: RunId) -> Select[Any]:
    return (
        select(
            _attempts.c.attempt,
            _attempts.c.worker_id.label("worker"),
            _attempts.c.fencing_token,
            _attempts.c.handler,
            _attempts.c.started_at,
            _attempts.c.token_ready_at,
            _attempts.c.handler_started_at,
            _attempts.c.ended_at,
            _attempts.c.outcome,
            _attempts.c.error,
            _attempts.c.error_cause,
            _attempts.c.claims,
        )
        .where(_attempts.c.run_id == run_id)
        .order_by(_attempts.c.attempt)
    )


def _attempt_that_is_on(row: Row) -> Row:
    """The try that has not ended yet, as a row like those that have."""
    return {
        "attempt": row["attempt"],
        "worker": row["worker"],
        "fencing_token": row["fencing_token"],
        "handler": row["handler"],
        "started_at": row["started_at"],
        "token_ready_at": None,
        "handler_started_at": None,
        "ended_at": None,
        "outcome": None,
        "error": None,
        "error_cause": None,
    }
