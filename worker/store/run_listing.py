"""Runs as people see them: lists by key, and one run with all that is known of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, Connection, Integer, Select, Text, column, select, table

from worker.errors import NotFound
from worker.ids import DefinitionId, OrgId, RunId
from worker.store import orgs, run_search, tables
from worker.store.paging import Row, checked_id
from worker.store.run_search import Wanted
from worker.store.tables import Id, Instant, json_type

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


def runs(connection: Connection, org: str, **wanted: Any) -> list[Row]:
    """A page of one org's runs, newest first; `wanted` are the fields of `run_search.Wanted`.

    Raises:
        NotFound: there is no such org.
        UsageError: a state, limit or id that is none.
    """
    org_id = OrgId(orgs.require(connection, org)["id"])
    ids = run_search.find(connection, org_id, Wanted(**wanted))
    return _rows(connection, ids, [_view.c.org_id == org_id])


def runs_for_all_orgs(connection: Connection, **wanted: Any) -> list[Row]:
    """As `runs`, of every org."""
    return _rows(connection, run_search.find_for_all_orgs(connection, Wanted(**wanted)), [])


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


def _rows(connection: Connection, ids: Sequence[RunId], where: list[ColumnElement[bool]]) -> list[Row]:
    """The listed columns of these runs, newest first."""
    listed = (_view.c[name] for name in LISTED)
    query = select(*listed).where(_view.c.id.in_(ids), *where).order_by(_view.c.id.desc())
    return [dict(row) for row in connection.execute(query).mappings()] if ids else []


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
    ended = [
        dict(entry)
        for entry in connection.execute(_ended_attempts(OrgId(row["org_id"]), RunId(row["id"]))).mappings()
    ]
    shown["claims"] = next(
        (entry["claims"] for entry in reversed(ended) if entry["claims"] is not None), None
    )
    shown["attempts"] = [
        {name: value for name, value in entry.items() if name != "claims"} for entry in ended
    ] + ([_attempt_that_is_on(row)] if row["state"] == "running" else [])
    shown["checkpoint"] = connection.execute(
        select(tables.checkpoints.c.data).where(
            tables.checkpoints.c.run_id == row["id"], tables.checkpoints.c.org_id == row["org_id"]
        )
    ).scalar_one_or_none()
    revisions = tables.definition_revisions
    shown["spec"] = connection.execute(
        select(revisions.c.spec)
        .join(tables.definitions, tables.definitions.c.id == revisions.c.definition_id)
        .where(
            revisions.c.definition_id == row["definition_id"],
            revisions.c.revision == row["revision"],
            tables.definitions.c.org_id == row["org_id"],
        )
    ).scalar_one_or_none()
    return shown


def _ended_attempts(org_id: OrgId, run_id: RunId) -> Select[Any]:
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
        .where(_attempts.c.run_id == run_id, _attempts.c.org_id == org_id)
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
