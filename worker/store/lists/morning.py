"""What needs attention over all orgs, and what ended by hour; every query is bounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple, TypedDict, cast

from sqlalchemy import ColumnElement, Connection, and_, func, literal_column, not_, select, union_all

from worker.store import tables
from worker.store.catalogue import OF_WORKERS
from worker.store.dialect import Row, all_rows
from worker.store.health import ENDS, OF_HOST

# Rows that are counted; a count that reaches this means "at least".
MOST = 10_000
# Rows that are listed as examples.
SHOWN = 5

_live, _orgs, _definitions = tables.live_runs, tables.orgs, tables.definitions
_credentials, _catalogue, _workers = tables.credentials, tables.catalogue, tables.workers
_hours = tables.rollup_hours


class Waiting(TypedDict):
    """Unfinished runs of one reason; `since` is the earliest start that has come."""

    reason: str
    runs: int
    orgs: int
    since: datetime


class NoToken(NamedTuple):
    """Why runs wait for a token: the issuer, and the error's code."""

    issuer: str
    code: str


class Counted(NamedTuple):
    """A number up to MOST, with the newest rows as examples."""

    total: int
    examples: Sequence[Row]


class Workers(NamedTuple):
    """How many workers hold their lease, those of them that are late, and those that lost it."""

    up: int
    late: Sequence[Row]
    missing: Sequence[Row]


def waiting_for_all_orgs(connection: Connection) -> list[Waiting]:
    """Waiting and held runs by reason, up to MOST of them, and as many parked ones."""
    columns = (_live.c.reason, _live.c.org_id, _live.c.available_at)
    parts = [
        select(select(*columns).where(_live.c.state.in_(states)).limit(MOST).subquery())
        for states in (("waiting", "held"), ("parked",))
    ]
    some = union_all(*parts).subquery()
    runs = func.count()
    query = (
        select(
            some.c.reason,
            runs.label("runs"),
            func.count(some.c.org_id.distinct()).label("orgs"),
            func.min(some.c.available_at).label("since"),
        )
        .group_by(some.c.reason)
        .order_by(runs.desc())
        .limit(len(tables.WAITING_REASONS))
    )
    return cast(list[Waiting], all_rows(connection, query))


def running_for_all_orgs(connection: Connection) -> int:
    """The number of running runs, up to MOST."""
    some = select(_live.c.id).where(_live.c.state == "running").limit(MOST).subquery()
    return connection.execute(select(func.count()).select_from(some)).scalar_one()


def without_token_for_all_orgs(connection: Connection) -> Mapping[NoToken, int]:
    """Runs that wait for a token by issuer and error code, most first."""
    query = (
        select(_orgs.c.issuer, _live.c.detail)
        .join(_orgs, _orgs.c.id == _live.c.org_id)
        .where(_live.c.state == "waiting", _live.c.reason == "no_token")
        .limit(MOST)
    )
    found: Counter[NoToken] = Counter()
    for issuer, detail in connection.execute(query):
        found[NoToken(issuer, (detail or "unknown").partition(":")[0])] += 1
    return dict(found.most_common(SHOWN))


def dead_credentials_for_all_orgs(connection: Connection) -> Counted:
    """Active credentials whose last request the issuer rejected, of the newest orgs first."""
    query = (
        select(_credentials.c.id, _orgs.c.code.label("org"), _credentials.c.last_error)
        .join(_orgs, _orgs.c.id == _credentials.c.org_id)
        # As the condition of the index has it: a parameter would hide it from SQLite's planner.
        .where(_credentials.c.last_error.is_not(None), _credentials.c.state == literal_column("'active'"))
    )
    return _counted(connection, query, _credentials.c.org_id)


def paused_definitions_for_all_orgs(connection: Connection) -> Counted:
    """Paused definitions that are not closed, newest first."""
    columns = (_definitions.c[name] for name in ("name", "paused_at", "paused_by", "pause_note"))
    query = (
        select(_definitions.c.id, _orgs.c.code.label("org"), *columns)
        .join(_orgs, _orgs.c.id == _definitions.c.org_id)
        .where(_definitions.c.paused_at.is_not(None), _definitions.c.closed_at.is_(None))
    )
    return _counted(connection, query, _definitions.c.id)


def broken_handlers(connection: Connection) -> Counted:
    """Handlers of workers that do not load, by name."""
    query = select(_catalogue.c.name, _catalogue.c.distribution, _catalogue.c.error)
    rows = all_rows(
        connection,
        query.where(OF_WORKERS, _catalogue.c.error.is_not(None)).order_by(_catalogue.c.name).limit(MOST),
    )
    return Counted(len(rows), rows[:SHOWN])


def workers_for_all_orgs(connection: Connection, now: datetime) -> Workers:
    """Workers that have not ended, by their lease, up to MOST."""
    query = select(*(_workers.c[name] for name in ("id", "host", "renewed_at", "lease_until")))
    rows = all_rows(
        connection, query.where(_workers.c.ended_at.is_(None)).order_by(_workers.c.lease_until).limit(MOST)
    )
    states = [(lease_state(row["renewed_at"], row["lease_until"], now), row) for row in rows]
    missing, late = ([row for state, row in states if state == wanted] for wanted in ("missing", "late"))
    return Workers(len(rows) - len(missing), late, missing)


def crashed_for_all_orgs(connection: Connection, since: datetime, *, silent: bool = False) -> Counted:
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


def _counted(connection: Connection, query: Any, key: ColumnElement[Any]) -> Counted:
    some = query.with_only_columns(key.label("key")).limit(MOST).subquery()
    count = connection.execute(select(func.count()).select_from(some)).scalar_one()
    examples = all_rows(connection, query.order_by(key.desc()).limit(SHOWN)) if count else []
    return Counted(count, examples)


def ended_by_hour_for_all_orgs(
    connection: Connection, start: datetime, end: datetime
) -> dict[tuple[datetime, str], int]:
    """Runs that ended in [start, end), by hour and final state."""
    hours = round((end - start) / timedelta(hours=1)) + 1
    query = (
        select(_hours.c.hour, _hours.c.state, func.sum(_hours.c.runs).label("runs"))
        .where(_hours.c.hour >= start, _hours.c.hour < end)
        .group_by(_hours.c.hour, _hours.c.state)
        .limit(hours * len(tables.FINAL_STATES))
    )
    return {(row["hour"], row["state"]): int(row["runs"]) for row in all_rows(connection, query)}
