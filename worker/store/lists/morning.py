"""What needs attention, of one org or of all, what ended or comes due by hour, and credentials by risk."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    and_,
    case,
    func,
    literal_column,
    not_,
    or_,
    select,
    union_all,
)

from worker.ids import AllOrgs, OrgId, OrgScope, RunId, Scope, WorkerId
from worker.store import orgs, tables
from worker.store.catalogue import OF_WORKERS
from worker.store.dialect import Row, above, all_rows, in_scope, rows_as
from worker.store.health import ENDS, OF_HOST
from worker.store.lists import checked_id
from worker.store.lists.rows import CredentialRow
from worker.store.lists.runs import is_listed
from worker.store.redaction import Shown

# Rows that are counted; a count that reaches this means "at least".
MAX_ROWS = 10_000
# Orgs, pools, handlers and others that are named; of more, their number.
NAMED = 3
# Errors without a token that are listed.
ERRORS = 5

_live, _orgs, _definitions = tables.live_runs, tables.orgs, tables.definitions
_credentials, _catalogue, _workers = tables.credentials, tables.catalogue, tables.workers
_late = tables.late_definitions
_hours, _schedule, _revisions = tables.rollup_hours, tables.schedule, tables.definition_revisions
# Between the keys of a timing, in one text: no key of a definition has it.
_BETWEEN = "\x1f"
# What runs of a reason wait for.
_WHATS: Mapping[str, ColumnElement[Any]] = {
    "no_pool": _live.c.pool,
    "no_handler": _live.c.handler,
    "not_approved": _live.c.handler + " in pool " + _live.c.pool,
    "unplaced": _live.c.pool,
    "budget": _live.c.detail,
}
_WHAT = case(*((_live.c.reason == reason, what) for reason, what in _WHATS.items()))


class Named(NamedTuple):
    """How many there are, and the names of a few."""

    total: int
    names: Sequence[str]


class Waiting(NamedTuple):
    """Unfinished runs of one reason; `since` is the earliest start that has come.

    `whats` are the pools, handlers or budgets that they wait for, if the reason has one. Those of most runs
    are named.
    """

    reason: str
    runs: int
    since: datetime
    orgs: Named
    whats: Named


class TokenlessRuns(NamedTuple):
    """Runs that wait for a token: the issuer, the error's code, and their orgs."""

    issuer: str
    code: str
    runs: int
    orgs: Named


class CappedCount(NamedTuple):
    """A number up to MAX_ROWS, with the newest rows as examples."""

    total: int
    examples: Sequence[Row]


class Workers(NamedTuple):
    """How many workers hold their lease, those of them that are late, and those that lost it."""

    up: int
    late: Sequence[Row]
    missing: Sequence[Row]


def waiting(connection: Connection, scope: Scope) -> list[Waiting]:
    """Waiting and held runs by reason, up to MAX_ROWS of them, and as many parked ones; most runs first.

    Children are left out, as in lists.
    """
    columns = (_live.c.reason, _live.c.org_id, _live.c.available_at, _WHAT.label("what"))
    mine = [*in_scope(_live.c.org_id, scope), is_listed(_live)]
    parts = [
        select(select(*columns).where(_live.c.state.in_(states), *mine).limit(MAX_ROWS).subquery())
        for states in (("waiting", "held"), ("parked",))
    ]
    some = union_all(*parts).subquery()
    by_org = _first(connection, _ranked(some, some.c.org_id))
    by_what = _first(connection, _ranked(some, some.c.what)) if by_org.keys() & _WHATS.keys() else {}
    # Not as a join, for which PostgreSQL may read all orgs.
    codes = codes_of(connection, {row["one"] for rows in by_org.values() for row in rows})
    return [
        Waiting(
            reason,
            runs=int(rows[0]["all_runs"]),
            since=rows[0]["since"],
            orgs=Named(rows[0]["total"], [codes[row["one"]] for row in rows]),
            whats=_named(by_what.get(reason, ())),
        )
        for reason, rows in by_org.items()
    ]


def codes_of(connection: Connection, ids: Collection[str]) -> dict[str, str]:
    """The codes of a few orgs by id."""
    if not ids:
        return {}
    query = select(_orgs.c.id, _orgs.c.code).where(_orgs.c.id.in_(ids)).limit(len(ids))
    return {str(row["id"]): row["code"] for row in all_rows(connection, query)}


def _ranked(some: FromClause, column: ColumnElement[Any]) -> FromClause:
    """Of each reason, `one` value of the column a row: its `place` by runs, and all values' numbers."""
    runs = func.count().label("runs")
    since = func.min(some.c.available_at).label("since")
    grouped = select(some.c.reason, column.label("one"), runs, since).group_by(some.c.reason, column)
    each = grouped.where(column.is_not(None)).subquery()
    place = func.row_number().over(partition_by=each.c.reason, order_by=(each.c.runs.desc(), each.c.one))
    whole = {
        name: value.over(partition_by=each.c.reason).label(name)
        for name, value in (
            ("total", func.count()),
            ("all_runs", func.sum(each.c.runs)),
            ("since", func.min(each.c.since)),
        )
    }
    return select(each.c.reason, each.c.one, place.label("place"), *whole.values()).subquery()


def _first(connection: Connection, ranked: FromClause) -> dict[str, list[Row]]:
    """The first NAMED rows of each reason, those of most runs first."""
    query = select(ranked).where(ranked.c.place <= NAMED)
    ordered = query.order_by(ranked.c.all_runs.desc(), ranked.c.reason, ranked.c.place)
    found: dict[str, list[Row]] = {}
    for row in all_rows(connection, ordered.limit(len(tables.WAITING_REASONS) * NAMED)):
        found.setdefault(row["reason"], []).append(row)
    return found


def _named(rows: Sequence[Row]) -> Named:
    return Named(rows[0]["total"] if rows else 0, [row["one"] for row in rows])


def has_orgs(connection: Connection, scope: Scope) -> bool:
    """Whether there is an org at all."""
    query = select(_orgs.c.id).where(*in_scope(_orgs.c.id, scope)).order_by(_orgs.c.id).limit(1)
    return connection.execute(query).first() is not None


def running(connection: Connection, scope: Scope, *, most: int = MAX_ROWS, children: bool = False) -> int:
    """The number of running runs, up to `most`; without `children` only of those that lists show."""
    mine = [_live.c.state == "running", *in_scope(_live.c.org_id, scope)]
    if not children:
        mine.append(is_listed(_live))
    some = select(_live.c.id).where(*mine).limit(most).subquery()
    return connection.execute(select(func.count()).select_from(some)).scalar_one()


def reached_by_definition(connection: Connection, org_id: OrgId, run_id: RunId) -> int | None:
    """The limit of the definition of an unfinished run; None unless as many of its runs count against it."""
    row = connection.execute(
        select(_live.c.definition_id, _live.c.max_concurrent).where(
            _live.c.id == run_id, _live.c.org_id == org_id
        )
    ).first()
    if row is None or row.max_concurrent is None:
        return None
    mine = _live.c.definition_id == row.definition_id
    return row.max_concurrent if _are_as_many(connection, mine, row.max_concurrent) else None


def _are_as_many(connection: Connection, which: ColumnElement[bool], limit: int) -> bool:
    """Whether a limit is reached, by runs that run and by parked ones with `parked_counts`."""
    counts = or_(
        _live.c.state == literal_column("'running'"),
        and_(_live.c.state == literal_column("'parked'"), _live.c.started_at.is_not(None)),
    )
    some = select(_live.c.id).where(counts, which).limit(limit).subquery()
    return connection.execute(select(func.count()).select_from(some)).scalar_one() >= limit


def is_handler_full(connection: Connection, _: AllOrgs, handler: str, limit: int) -> bool:
    """Whether the runs of a handler reach its limit, of the orgs that the caller may read."""
    return _are_as_many(connection, _live.c.handler == handler, limit)


def without_token(connection: Connection, scope: Scope) -> list[TokenlessRuns]:
    """Runs that wait for a token by issuer and error code, most first; without children."""
    query = (
        select(_orgs.c.issuer, _live.c.detail, _orgs.c.code)
        .join(_orgs, _orgs.c.id == _live.c.org_id)
        .where(_live.c.state == "waiting", _live.c.reason == "no_token", is_listed(_live))
        .where(*in_scope(_live.c.org_id, scope))
        .limit(MAX_ROWS)
    )
    found: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for issuer, detail, org in connection.execute(query):
        found[issuer, (detail or "unknown").partition(":")[0]][org] += 1
    every = [
        TokenlessRuns(*key, orgs.total(), Named(len(orgs), [org for org, _ in orgs.most_common(NAMED)]))
        for key, orgs in found.items()
    ]
    return sorted(every, key=lambda each: each.runs, reverse=True)[:ERRORS]


def dead_credentials(connection: Connection, scope: Scope) -> CappedCount:
    """Active credentials whose last request the issuer rejected, of the newest orgs first."""
    query = (
        select(_credentials.c.id, _orgs.c.code.label("org"), _credentials.c.last_error)
        .join(_orgs, _orgs.c.id == _credentials.c.org_id)
        # As the condition of the index has it: a parameter would hide it from SQLite's planner.
        .where(_credentials.c.last_error.is_not(None), _credentials.c.state == literal_column("'active'"))
        .where(*in_scope(_credentials.c.org_id, scope))
    )
    return _counted(connection, query, _credentials.c.org_id)


def paused_definitions(connection: Connection, scope: Scope) -> CappedCount:
    """Paused definitions that are not closed, newest first."""
    columns = (_definitions.c[name] for name in ("name", "paused_at", "paused_by", "pause_note"))
    query = (
        select(_definitions.c.id, _orgs.c.code.label("org"), *columns)
        .join(_orgs, _orgs.c.id == _definitions.c.org_id)
        .where(_definitions.c.paused_at.is_not(None), _definitions.c.closed_at.is_(None))
        .where(*in_scope(_definitions.c.org_id, scope))
    )
    return _counted(connection, query, _definitions.c.id)


def late_definitions(connection: Connection, scope: Scope) -> CappedCount:
    """Definitions that are not done by their deadline, newest first."""
    query = (
        select(_late.c.definition_id, _orgs.c.code.label("org"), _definitions.c.name, _late.c.late_at)
        .join(_orgs, _orgs.c.id == _late.c.org_id)
        .join(_definitions, _definitions.c.id == _late.c.definition_id)
        .where(*in_scope(_late.c.org_id, scope))
    )
    return _counted(connection, query, _late.c.definition_id)


def broken_handlers(connection: Connection) -> CappedCount:
    """Handlers of workers that do not load, by name."""
    query = select(_catalogue.c.name, _catalogue.c.distribution, _catalogue.c.error)
    rows = all_rows(
        connection,
        query.where(OF_WORKERS, _catalogue.c.error.is_not(None)).order_by(_catalogue.c.name).limit(MAX_ROWS),
    )
    return CappedCount(len(rows), rows[:NAMED])


def workers(connection: Connection, _: AllOrgs, now: datetime) -> Workers:
    """Workers that have not ended, by their lease, up to MAX_ROWS."""
    query = select(*(_workers.c[name] for name in ("id", "host", "renewed_at", "lease_until")))
    rows = all_rows(
        connection,
        query.where(_workers.c.ended_at.is_(None)).order_by(_workers.c.lease_until).limit(MAX_ROWS),
    )
    states = [(lease_state(row["renewed_at"], row["lease_until"], now), row) for row in rows]
    missing, late = ([row for state, row in states if state == wanted] for wanted in ("missing", "late"))
    return Workers(len(rows) - len(missing), late, missing)


def crashed(connection: Connection, _: AllOrgs, since: datetime, *, silent: bool = False) -> CappedCount:
    """Workers and hosts whose lease was found expired since then, the last one first.

    With `silent` those hosts that ran nothing, else all others. The examples are as `worker_ends` reads them.
    """
    ran_nothing = and_(_workers.c.host_id.is_not(None), _workers.c.recovered_runs == 0)
    query = select(_workers.c.id, _workers.c.host, OF_HOST, *ENDS).where(
        # As the condition of the index has it.
        _workers.c.outcome == literal_column("'crashed'"),
        _workers.c.ended_at > since,
        ran_nothing if silent else not_(ran_nothing),
    )
    return _counted(connection, query, _workers.c.ended_at)


def lease_state(renewed_at: datetime, lease_until: datetime, now: datetime) -> str:
    """`up`, `late` (it should have renewed its lease by now) or `missing` (the lease has expired)."""
    if lease_until <= now:
        return "missing"
    # Leases are renewed at least four times while they last.
    return "late" if now - renewed_at > (lease_until - renewed_at) / 2 else "up"


def _counted(connection: Connection, query: Any, key: ColumnElement[Any]) -> CappedCount:
    some = query.with_only_columns(key.label("key")).limit(MAX_ROWS).subquery()
    count = connection.execute(select(func.count()).select_from(some)).scalar_one()
    examples = all_rows(connection, query.order_by(key.desc()).limit(NAMED)) if count else []
    return CappedCount(count, examples)


def ended_by_hour(
    connection: Connection, scope: Scope, start: datetime, end: datetime
) -> dict[tuple[datetime, str], int]:
    """Runs that ended in [start, end), by hour and final state."""
    hours = round((end - start) / timedelta(hours=1)) + 1
    query = (
        select(_hours.c.hour, _hours.c.state, func.sum(_hours.c.runs).label("runs"))
        .where(_hours.c.hour >= start, _hours.c.hour < end, *in_scope(_hours.c.org_id, scope))
        .group_by(_hours.c.hour, _hours.c.state)
        .limit(hours * len(tables.FINAL_STATES))
    )
    return {(row["hour"], row["state"]): int(row["runs"]) for row in all_rows(connection, query)}


class Timing(NamedTuple):
    """What decides when a definition is due, as its keys have it."""

    schedule: str
    timezone: str
    starts_at: str | None
    ends_at: str | None
    calendar_dates: str | None = None
    """As JSON."""


class Timings(NamedTuple):
    """Some definitions by their timing, and the last one of them; None if there are no more."""

    counted: Mapping[Timing, int]
    last: str | None


def timings(connection: Connection, scope: Scope, until: datetime, after: str | None, limit: int) -> Timings:
    """Definitions whose next run is before `until`, of the `limit` definitions after this one by id."""
    # By their keys: as joins, PostgreSQL would read all definitions for each page.
    current = select(_definitions.c.revision).where(_definitions.c.id == _schedule.c.definition_id)
    keys = [func.coalesce(_revisions.c.spec[key].as_string(), "") for key in Timing._fields]
    written: ColumnElement[str] = keys[0]
    for key in keys[1:]:
        written = written + _BETWEEN + key
    timing_of = (
        select(written)
        .where(
            _revisions.c.definition_id == _schedule.c.definition_id,
            _revisions.c.revision == current.correlate(_schedule).scalar_subquery(),
        )
        .correlate(_schedule)
        .scalar_subquery()
    )
    zone = select(_orgs.c.timezone).where(_orgs.c.id == _schedule.c.org_id).scalar_subquery()
    query = select(
        _schedule.c.definition_id, _schedule.c.next_fire_at, timing_of.label("timing"), zone.label("zone")
    ).where(*in_scope(_schedule.c.org_id, scope), *above(_schedule.c.definition_id, after))
    rows = all_rows(connection, query.order_by(_schedule.c.definition_id).limit(limit))
    counted: Counter[Timing] = Counter()
    for row in rows:
        if row["timing"] and row["next_fire_at"] is not None and row["next_fire_at"] < until:
            schedule, timezone, *rest = row["timing"].split(_BETWEEN)
            timing = Timing(schedule, timezone or row["zone"] or "UTC", *(text or None for text in rest))
            counted[timing] += bool(schedule)
    return Timings(+counted, str(rows[-1]["definition_id"]) if len(rows) == limit else None)


class CredentialWithOrg(CredentialRow):
    """A credential with its org's name and state."""

    org_name: Shown[str]
    org_state: Shown[str]


def credentials(
    connection: Connection, org: OrgScope, risk: str, *, after: str | None, limit: int
) -> list[CredentialWithOrg]:
    """Active credentials by risk, those that the issuer rejected (`dead`), or `all`, oldest first.

    `old` leaves out the rejected ones. `after` is the id of the last row of the page before.

    Raises:
        NotFound: no such org, or `after` is not an id.
    """
    names = [column for column in CredentialRow.__annotations__ if column != "org"]
    is_active = _credentials.c.state == literal_column("'active'")
    # By the org's key: as a join, PostgreSQL would read all orgs.
    code, name, state = (
        select(_orgs.c[column]).where(_orgs.c.id == _credentials.c.org_id).limit(1).scalar_subquery()
        for column in ("code", "name", "state")
    )
    query = select(
        code.label("org"),
        *(_credentials.c[column] for column in names),
        name.label("org_name"),
        state.label("org_state"),
    ).where(is_active)
    if risk == "dead":
        query = query.where(_credentials.c.last_error.is_not(None))
    elif risk == "old":
        query = query.where(_credentials.c.last_error.is_(None))
    query = query.where(*in_scope(_credentials.c.org_id, orgs.scope_of(connection, org)))
    query = query.where(*above(_credentials.c.id, after and checked_id(after)))
    return rows_as(CredentialWithOrg, connection, query.order_by(_credentials.c.id).limit(limit))


def running_by_worker(connection: Connection, scope: Scope) -> dict[WorkerId, int]:
    """The number of running runs of each worker, up to MAX_ROWS in all."""
    mine = (_live.c.state == "running", *in_scope(_live.c.org_id, scope))
    some = select(_live.c.worker_id).where(*mine).limit(MAX_ROWS).subquery()
    count = func.count()
    query = select(some.c.worker_id, count.label("runs")).group_by(some.c.worker_id).limit(MAX_ROWS)
    return {row["worker_id"]: row["runs"] for row in all_rows(connection, query)}
