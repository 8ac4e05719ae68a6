"""What event streams show: runs that somebody watches, and what has just happened to all runs and workers."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple, TypedDict

from sqlalchemy import CompoundSelect, Connection, bindparam, func, literal, select, text, union_all

from worker.clock import EPOCH
from worker.ids import ALL_ORGS, AllOrgs, DefinitionId, OrgId, OrgScope, RunId, lowest_id
from worker.store import orgs, tables
from worker.store.dialect import (
    Instant,
    Row,
    all_rows,
    chunks,
    database_now,
    in_scope,
    is_postgresql,
    rows_as,
)
from worker.store.lists import runs as run_lists
from worker.store.lists.matching import shown_state
from worker.store.lists.rows import LogRow, Run, columns_of

# Rows of the audit that are looked through for changed runs, and runs that are found.
EXAMINED = 5_000
MAX_FOUND = 1_000
# Newest runs, newest ends of each state, and newest workers that are looked at for changes.
NEWEST = 1_000
NEWEST_WORKERS = 50

_logs, _audit = tables.run_logs, tables.audit
_runs, _live, _ends = tables.runs, tables.live_runs, tables.run_ends
_definitions, _workers = tables.definitions, tables.workers
_COLUMNS = ", ".join(("run_id", *columns_of(LogRow)))
# SQLite has no LATERAL, and at most 500 SELECTs in a UNION.
_EACH = (
    f"SELECT * FROM (SELECT {_COLUMNS} FROM run_logs WHERE run_id = :run{{0}} AND org_id = :org{{0}} "
    "AND (attempt, seq) > (:attempt{0}, :seq{0}) ORDER BY attempt, seq LIMIT :most)"
)
_AT_ONCE = 100
_ALL = text(f"""
SELECT l.* FROM unnest(CAST(:runs AS uuid[]), CAST(:orgs AS uuid[]), CAST(:attempts AS integer[]),
                       CAST(:seqs AS integer[])) AS w(run_id, org_id, attempt, seq)
CROSS JOIN LATERAL (
  SELECT {_COLUMNS} FROM run_logs
  WHERE run_logs.run_id = w.run_id AND run_logs.org_id = w.org_id
    AND (run_logs.attempt, run_logs.seq) > (w.attempt, w.seq)
  ORDER BY run_logs.attempt, run_logs.seq LIMIT :most) l
""")

# The org of a watched run, and the last line of its log that was read.
Places = Mapping[RunId, tuple[OrgId, tuple[int, int]]]


def watched(connection: Connection, org: OrgScope, run_id: str) -> tuple[Run, OrgId, tuple[int, int]]:
    """A run as lists show it, its org, and the end of its log.

    Raises:
        NotFound: there is no such org, or it has no such run.
    """
    row, org_id = run_lists.with_org(connection, orgs.scope_of(connection, org), run_id)
    last = (
        select(_logs.c.attempt, _logs.c.seq)
        .where(_logs.c.run_id == row["id"], _logs.c.org_id == org_id)
        .order_by(_logs.c.attempt.desc(), _logs.c.seq.desc())
        .limit(1)
    )
    end = connection.execute(last).first()
    return row, org_id, (0, 0) if end is None else (end.attempt, end.seq)


def read(connection: Connection, places: Places, most: int) -> tuple[list[Run], list[Row]]:
    """The watched runs as lists show them, and of each at most `most` lines after its place, in order.

    The runs are read first: the log of one that has ended is complete.
    """
    rows = [row for ids in chunks(list(places)) for row in run_lists.rows_of(connection, ALL_ORGS, ids)]
    return rows, _lines(connection, places, most)


def _lines(connection: Connection, places: Places, most: int) -> list[Row]:
    if is_postgresql(connection):
        values: dict[str, Any] = {
            "runs": list(places),
            "orgs": [org_id for org_id, _ in places.values()],
            "attempts": [attempt for _, (attempt, _) in places.values()],
            "seqs": [seq for _, (_, seq) in places.values()],
            "most": most,
        }
        found = all_rows(connection, _ALL.bindparams(**values))
        return [{**row, "run_id": str(row["run_id"])} for row in found]
    lines: list[Row] = []
    for part in chunks(list(places.items()), _AT_ONCE):
        query = text(" UNION ALL ".join(_EACH.format(number) for number in range(len(part))))
        values = {"most": most}
        for number, (run_id, (org_id, (attempt, seq))) in enumerate(part):
            values |= {f"run{number}": run_id, f"org{number}": org_id}
            values |= {f"attempt{number}": attempt, f"seq{number}": seq}
        lines += all_rows(connection, query.bindparams(**values).columns(at=Instant()))
    return lines


class ChangedRuns(NamedTuple):
    """The states of the runs, newest change first, and the reason that was given for it."""

    states: Mapping[RunId, str]
    reason: str


def changed_runs(
    connection: Connection, scope: OrgScope, *, actor: str, action: str, since: datetime
) -> ChangedRuns:
    """The newest runs that the audit says were changed since then; of a retry, the new runs.

    Raises:
        NotFound: there is no org of the scope.
    """
    org_id = orgs.scope_of(connection, scope)
    newest = select(_audit).where(_audit.c.id >= lowest_id(since), *in_scope(_audit.c.org_id, org_id))
    row = newest.order_by(_audit.c.id.desc()).limit(EXAMINED).subquery("newest").c
    found = connection.execute(
        select(row.subject, row.detail)
        .where(row.actor == actor, row.action == action, row.at >= since)
        .order_by(row.id.desc())
        .limit(MAX_FOUND)
    ).all()
    ids = [RunId(subject) for subject, _ in found]
    state = func.coalesce(_runs.c.state, shown_state(_live.c.state))
    each = select(_runs.c.id, state).outerjoin(_live, _live.c.id == _runs.c.id).where(_runs.c.id.in_(ids))
    each = each.where(*in_scope(_runs.c.org_id, org_id))
    states = {RunId(row[0]): str(row[1]) for row in connection.execute(each.limit(MAX_FOUND))}
    reason = (found[0][1] or {}).get("reason", "") if found else ""
    return ChangedRuns({id_: states[id_] for id_ in ids if id_ in states}, reason)


# A time of the database's clock, in microseconds since 1970.
Moment = int
_TICK = timedelta(microseconds=1)


class ChangedRun(TypedDict):
    """What searches compare of a run."""

    id: RunId
    org_id: OrgId
    definition_id: DefinitionId
    definition: str | None
    handler: str
    origin: str
    pool: str
    created_at: datetime
    state: str | None
    reason: str | None


class LiveChange(NamedTuple):
    """A run that was made or has ended, or without `run` a worker that started, stopped or lost its lease."""

    id: str
    what: str
    at: Moment
    run: ChangedRun | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.id, self.what


class Changes(NamedTuple):
    """Changes up to `read_at`; complete from `begins` on."""

    found: list[LiveChange]
    begins: Moment
    read_at: Moment


def moment(connection: Connection) -> Moment:
    """The time of the database."""
    return _moment(database_now(connection))


def changes(connection: Connection, _: AllOrgs, since: Moment, known: Container[tuple[str, str]]) -> Changes:
    """What happened to the runs of all orgs and to the workers since then, without the `known` keys.

    If there is too much, the newest: see `begins`.
    """
    # First: what commits while this reads is in this read or the next one.
    now = database_now(connection)
    found: list[LiveChange] = []
    begins = since
    for state, rows in _happened(connection, EPOCH + since * _TICK).items():
        if len(rows) == NEWEST:
            begins = max(begins, min(at for _, at in rows))
        what = "ended" if state else "made"
        found += (LiveChange(id_, what, at) for id_, at in rows if (id_, what) not in known)
    rows_by_id = _changed(connection, list(dict.fromkeys(change.id for change in found)))
    # The rows of runs that are deleted meanwhile are missing.
    found = [change._replace(run=run) for change in found if (run := rows_by_id.get(change.id))]
    found += (one for one in _workers_changed(connection, now) if one.at > since and one.key not in known)
    return Changes(found, begins, _moment(now))


def _happened(connection: Connection, since: datetime) -> Mapping[str, list[tuple[str, Moment]]]:
    """The ids and times of the runs that were made since then, and of those that ended by their state."""
    found: dict[str, list[tuple[str, Moment]]] = {}
    for state, id_, at in connection.execute(_HAPPENED, {"since": since}):
        found.setdefault(state, []).append((id_, _moment(at)))
    return found


def _changed(connection: Connection, ids: list[str]) -> Mapping[str, ChangedRun]:
    """The rows of these runs, as they are now."""
    found: dict[str, ChangedRun] = {}
    for some in chunks(ids):
        rows = rows_as(ChangedRun, connection, _CHANGED.where(_runs.c.id.in_(some)).limit(len(some)))
        found |= {row["id"]: row for row in rows}
    return found


def _workers_changed(connection: Connection, now: datetime) -> Iterator[LiveChange]:
    for id_, started_at, ended_at, lease_until in connection.execute(_STARTS):
        yield LiveChange(id_, "started", _moment(started_at))
        if ended_at is not None:
            yield LiveChange(id_, "ended", _moment(ended_at))
        elif lease_until < now:
            yield LiveChange(id_, "lost", _moment(lease_until))


def _moment(at: datetime) -> Moment:
    return (at - EPOCH) // _TICK


def _of_all_states() -> CompoundSelect[Any]:
    since = bindparam("since", type_=Instant())
    # By id, since no index has `created_at`: the id of a run that is made late sorts by its due time.
    newest = select(_runs.c.id, _runs.c.created_at.label("at")).order_by(_runs.c.id.desc()).limit(NEWEST)
    made = newest.subquery().c
    parts = [select(literal("").label("state"), made.id, made.at).where(made.at > since)]
    for state in tables.FINAL_STATES:
        ends = select(_ends.c.state, _ends.c.run_id, _ends.c.finished_at)
        ends = ends.where(_ends.c.state == state, _ends.c.finished_at > since)
        parts.append(ends.order_by(_ends.c.finished_at.desc()).limit(NEWEST).subquery().select())
    return union_all(*parts)


# Built once, which takes as long as to execute them.
_HAPPENED = _of_all_states()
_CHANGED = (
    select(
        *(_runs.c[name] for name in ("id", "org_id", "definition_id", "handler", "origin", "pool")),
        _runs.c.created_at,
        _definitions.c.name.label("definition"),
        func.coalesce(_runs.c.state, shown_state(_live.c.state)).label("state"),
        func.coalesce(_runs.c.reason, _live.c.reason).label("reason"),
    )
    .outerjoin(_definitions, _definitions.c.id == _runs.c.definition_id)
    .outerjoin(_live, _live.c.id == _runs.c.id)
)
_STARTS = (
    select(*(_workers.c[name] for name in ("id", "started_at", "ended_at", "lease_until")))
    .order_by(_workers.c.id.desc())
    .limit(NEWEST_WORKERS)
)
