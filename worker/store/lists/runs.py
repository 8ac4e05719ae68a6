"""Runs as people see them: lists by key, one run with all that is known of it, and its log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    FromClause,
    Integer,
    Select,
    Text,
    column,
    func,
    select,
    table,
    tuple_,
)

from worker.errors import NotFound, UsageError
from worker.ids import DefinitionId, OrgId, RunId, lowest_id
from worker.store import orgs, tables
from worker.store.dialect import Id, Instant, json_type
from worker.store.lists.paging import DEFAULT_LIMIT, Row, check_limit, checked_id

RUN_STATES = ("waiting", "running", *tables.FINAL_STATES)
# Runs looked at under one condition: some 20 ms of SQLite.
WINDOW = 20_000

_runs = tables.runs
_ends = tables.run_ends
_live = tables.live_runs
_definitions = tables.definitions

_LOOKED_AT = (_runs.c.id, _runs.c.org_id, _runs.c.definition_id, _runs.c.state)
_ENDED = (_ends.c.run_id.label("id"), _ends.c.org_id, _ends.c.definition_id, _ends.c.state)

Condition = ColumnElement[bool]
Met = dict[str, str | Select[Any]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What narrows a list of runs, and which page of it.

    Raises:
        UsageError: a state or limit that is none.
        NotFound: `after` is no id.
    """

    definition: str | None = None
    state: str | None = None
    since: datetime | None = None
    limit: int = DEFAULT_LIMIT
    after: str | None = None

    def __post_init__(self) -> None:
        check_limit(self.limit)
        if self.after is not None:
            checked_id(self.after)
        if self.state is not None and self.state not in RUN_STATES:
            raise UsageError(f"{self.state!r} is no state of a run", fix=f"one of {', '.join(RUN_STATES)}")


def find(connection: Connection, org_id: OrgId, wanted: Wanted) -> list[RunId]:
    """The ids of a page of one org's runs."""
    return _find(connection, org_id, wanted)


def find_for_all_orgs(connection: Connection, wanted: Wanted) -> list[RunId]:
    """As `find`, of every org."""
    return _find(connection, None, wanted)


def _find(connection: Connection, org_id: OrgId | None, wanted: Wanted) -> list[RunId]:
    met = _met(org_id, wanted.definition)
    if wanted.state is not None and wanted.state not in tables.FINAL_STATES:
        return _unfinished(connection, met, wanted)
    if wanted.state is not None:
        met["state"] = wanted.state
    # The runs of one org or definition are in order in an index; those of a state or of a name are not.
    if len(met) > 1 or wanted.state is not None or (wanted.definition is not None and org_id is None):
        for alone in ((), ("state",), ("org_id",), ("definition_id",)):
            if met.keys() >= set(alone):
                found = _in_window(connection, alone, met, wanted)
                if found is not None:
                    return found
    query = select(_runs.c.id).where(*_that_meet(_runs, met), *_bounds(_runs.c.id, wanted))
    if wanted.since is not None:
        query = query.where(_runs.c.created_at >= wanted.since)
    return _ids(connection, query, _runs.c.id, wanted.limit)


def _unfinished(connection: Connection, met: Met, wanted: Wanted) -> list[RunId]:
    """Unfinished runs are few, and in a table of their own."""
    kept = ("running",) if wanted.state == "running" else ("waiting", "held")
    query = select(_live.c.id).where(
        _live.c.state.in_(kept), *_that_meet(_live, met), *_bounds(_live.c.id, wanted)
    )
    if wanted.since is not None:
        query = query.join(_runs, _runs.c.id == _live.c.id).where(_runs.c.created_at >= wanted.since)
    return _ids(connection, query, _live.c.id, wanted.limit)


def _met(org_id: OrgId | None, definition: str | None) -> Met:
    """What each column is to be: a value, or one of those that a query gives."""
    met: Met = {}
    named = select(_definitions.c.id).where(_definitions.c.name == definition)
    if org_id is not None:
        met["org_id"] = org_id
        named = named.where(_definitions.c.org_id == org_id)
    if definition is not None:
        met["definition_id"] = named
    return met


def _that_meet(rows: FromClause, met: Met) -> list[Condition]:
    return [
        rows.c[name].in_(value) if isinstance(value, Select) else rows.c[name] == value
        for name, value in met.items()
    ]


def _bounds(id_: ColumnElement[Any], wanted: Wanted) -> list[Condition]:
    """Of ids, which are in order of when their runs were created, by the clock of whoever did so."""
    bounds: list[Condition] = []
    if wanted.after is not None:
        bounds.append(id_ < checked_id(wanted.after))
    if wanted.since is not None:
        bounds.append(id_ >= lowest_id(wanted.since))
    return bounds


def _in_window(connection: Connection, alone: Sequence[str], met: Met, wanted: Wanted) -> list[RunId] | None:
    """The page, from the newest runs that meet `alone`; None where those do not settle it."""
    within = {name: met[name] for name in alone}
    # By state from the narrow table alone: a join with all runs reads all of them.
    rows, columns = (_ends, _ENDED) if "state" in within else (_runs, _LOOKED_AT)
    some = select(*columns).where(*_that_meet(rows, within), *_bounds(columns[0], wanted)).limit(WINDOW)
    if wanted.since is not None and rows is _runs:
        some = some.where(_runs.c.created_at >= wanted.since)
    in_order = not isinstance(within.get("definition_id"), Select)
    window = (some.order_by(columns[0].desc()) if in_order else some).subquery("some")
    rest = _that_meet(window, {name: value for name, value in met.items() if name not in alone})
    query = select(window.c.id).where(*rest).order_by(window.c.id.desc()).limit(wanted.limit)
    if wanted.since is not None and rows is _ends:
        query = query.join(_runs, _runs.c.id == window.c.id).where(_runs.c.created_at >= wanted.since)
    found = [RunId(id_) for id_ in connection.execute(query).scalars()]
    if len(found) == wanted.limit and in_order:
        return found
    size = connection.execute(select(func.count()).select_from(window)).scalar_one()
    return found if size < WINDOW else None


def _ids(connection: Connection, query: Select[Any], id_: ColumnElement[Any], limit: int) -> list[RunId]:
    return [RunId(found) for found in connection.execute(query.order_by(id_.desc()).limit(limit)).scalars()]


_logs = tables.run_logs

START = (0, 0)


def lines(
    connection: Connection,
    org_id: OrgId,
    run_id: RunId,
    *,
    after: tuple[int, int] = START,
    limit: int = 1000,
) -> list[Row]:
    """The first `limit` lines of a run of one org that follow (attempt, seq), oldest first."""
    return _lines(connection, [_logs.c.org_id == org_id], run_id, after, limit)


def lines_for_all_orgs(
    connection: Connection, run_id: RunId, *, after: tuple[int, int] = START, limit: int = 1000
) -> list[Row]:
    """As `lines`, whichever org's run it is."""
    return _lines(connection, [], run_id, after, limit)


def _lines(
    connection: Connection,
    where: list[ColumnElement[bool]],
    run_id: RunId,
    after: tuple[int, int],
    limit: int,
) -> list[Row]:
    query = (
        select(_logs.c.attempt, _logs.c.seq, _logs.c.at, _logs.c.level, _logs.c.source, _logs.c.text)
        .where(*where, _logs.c.run_id == run_id, tuple_(_logs.c.attempt, _logs.c.seq) > tuple_(*after))
        .order_by(_logs.c.attempt, _logs.c.seq)
        .limit(limit)
    )
    return [dict(row) for row in connection.execute(query).mappings()]


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
_attempts = tables.attempts


def runs(connection: Connection, org: str, **wanted: Any) -> list[Row]:
    """A page of one org's runs, newest first; `wanted` are the fields of `run_search.Wanted`.

    Raises:
        NotFound: there is no such org.
        UsageError: a state, limit or id that is none.
    """
    org_id = OrgId(orgs.require(connection, org)["id"])
    ids = find(connection, org_id, Wanted(**wanted))
    return _rows(connection, ids, [_view.c.org_id == org_id])


def runs_for_all_orgs(connection: Connection, **wanted: Any) -> list[Row]:
    """As `runs`, of every org."""
    return _rows(connection, find_for_all_orgs(connection, Wanted(**wanted)), [])


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
