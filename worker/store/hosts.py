"""Hosts: machines that run handlers over the attempt API. An incarnation of one is a row of `workers`.

A host is found by the SHA-256 of its token, in lower-case hexadecimal. The caller passes the time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    Connection,
    LargeBinary,
    and_,
    case,
    cast,
    exists,
    func,
    insert,
    literal_column,
    or_,
    select,
    tuple_,
    update,
)

from worker.errors import TooManyRequests
from worker.ids import RunId, WorkerId
from worker.model.runs.hosts import SLOTS, HostCaller, PoolLoad
from worker.model.runs.run import AdmittedRun, Isolation
from worker.store import health, host_handlers, placements, tables
from worker.store.dialect import Row, all_rows, database_now, first_row, is_postgresql
from worker.store.workers import register

# Attempts of a run in a row that its hosts may hand back without one that stores a checkpoint or a step.
MAX_HAND_BACKS = 10

_hosts = tables.hosts
_workers = tables.workers
_live = tables.live_runs
_SHOWN = ("id", "name", "pool", "created_at", "created_by", "seen_at")
# Incarnations that a host may start within a minute, and that may hold a lease at a time.
MAX_BEGUN = 60
MAX_ALIVE = 500
# Due runs that are counted for the hosts of a pool.
MAX_DUE = 10_000


def find(connection: Connection, token_sha256: str, incarnation: str | None) -> HostCaller | None:
    """The host with this token, unless it was removed, and whether the incarnation is one of its own."""
    mine = and_(_workers.c.host_id == _hosts.c.id, _workers.c.id == incarnation)
    query = (
        select(
            *(_hosts.c[name] for name in ("id", "name", "pool", "token_sha256")),
            _workers.c.id.label("worker"),
            _workers.c.ended_at,
            _workers.c.pools,
        )
        .select_from(_hosts.outerjoin(_workers, mine))
        .where(_hosts.c.token_sha256 == token_sha256, _hosts.c.removed_at.is_(None))
    )
    row = connection.execute(query).first()
    if row is None:
        return None
    known = row.worker is not None
    ended, moved = known and row.ended_at is not None, known and row.pools != [row.pool]
    return HostCaller(row.id, row.name, row.pool, row.worker, ended, moved, row.token_sha256)


def begin(
    connection: Connection, caller: HostCaller, worker_id: WorkerId, *, lease: timedelta, **identity: Any
) -> None:
    """Start an incarnation of a host with this `capacity`, `host`, `pid` and `version`, as `register`.

    Raises:
        TooManyRequests: the host has started `MAX_BEGUN` within a minute, or `MAX_ALIVE` hold a lease.
    """
    seen = database_now(connection)
    # It also locks the row: others that start at the same time are counted afterwards.
    connection.execute(update(_hosts).where(_hosts.c.id == caller.id).values(seen_at=seen))
    _check_number(connection, caller)
    of_host: dict[str, Any] = {"pools": (caller.pool,), "host_id": caller.id}
    register(connection, worker_id, lease=lease, handlers=(), **of_host, **identity)


def _check_number(connection: Connection, caller: HostCaller) -> None:
    now = database_now(connection)
    of, minute = _workers.c, timedelta(minutes=1)
    is_alive = health.holds_lease(now)
    begun, first, alive = connection.execute(
        select(
            func.count(case((of.started_at > now - minute, 1))),
            func.min(case((of.started_at > now - minute, of.started_at))),
            func.count(case((is_alive, 1))),
        ).where(of.host_id == caller.id, or_(of.started_at > now - minute, is_alive))
    ).one()
    if begun >= MAX_BEGUN:
        raise TooManyRequests(
            f"host {caller.name} has started {begun} times within a minute",
            fix="see why its processes end; give those of several machines a token each",
            retry_after=max(1.0, (first + minute - now).total_seconds()),
        )
    if alive >= MAX_ALIVE:
        raise TooManyRequests(
            f"host {caller.name} has {alive} processes that hold a lease",
            fix="give the processes of several machines a token each",
            retry_after=minute.total_seconds(),
        )


def log_size(
    connection: Connection, run_id: RunId, attempt: int, seqs: Sequence[int]
) -> tuple[int, int, set[int]]:
    """The lines of an attempt's stored log, their bytes, and which of these are stored.

    A byte that was not UTF-8 is stored as a character of three, and counts once.
    """
    of = tables.run_logs.c
    mine = (of.run_id == run_id, of.attempt == attempt)
    text = func.replace(of.text, "\ufffd", "?")
    octets = func.octet_length(text) if is_postgresql(connection) else func.length(cast(text, LargeBinary))
    lines, size = connection.execute(select(func.count(), func.sum(octets)).where(*mine)).one()
    stored = connection.execute(select(of.seq).where(*mine, of.seq.in_(sorted(set(seqs)))))
    return lines, int(size or 0), set(stored.scalars())


def owned(connection: Connection, worker_id: WorkerId, fences: Mapping[RunId, int]) -> list[AdmittedRun]:
    """Of these runs those that the incarnation owns under these fencing tokens."""
    if not fences:
        return []
    rows = connection.execute(
        select(*placements.ADMITTED).where(
            tuple_(_live.c.id, _live.c.fencing_token).in_(sorted(fences.items())),
            _live.c.worker_id == worker_id,
            _live.c.state == "running",
        )
    )
    return [AdmittedRun(*row) for row in rows]


def load(connection: Connection, pool: str) -> PoolLoad | None:
    """What waits in a pool now, and how full its hosts are; None if nothing is due. Takes no lock."""
    now = database_now(connection)
    # A literal, so that the partial index serves prepared statements too.
    waits = (_live.c.state == literal_column("'waiting'"), _live.c.pool == pool)
    due = select(_live.c.isolation, _live.c.available_at).where(*waits, _live.c.available_at <= now)
    if connection.execute(due.limit(1)).first() is None:
        return None
    of = _workers.c
    rows = connection.execute(
        select(of.id, of.capacity)
        .join_from(_workers, _hosts, _hosts.c.id == of.host_id)
        .where(_hosts.c.pool == pool, _hosts.c.removed_at.is_(None))
        .where(health.holds_lease(now))
    )
    slots = {row.id: {kind: int(row.capacity.get(name, 0)) for kind, name in SLOTS.items()} for row in rows}
    used: dict[WorkerId, Counter[Isolation]] = {worker: Counter() for worker in slots}
    owned = select(_live.c.worker_id, _live.c.isolation, func.count()).where(_live.c.worker_id.in_(slots))
    if not is_postgresql(connection):
        owned = owned.where(_live.c.state == literal_column("'running'"))  # of which there is an index
    for worker, isolation, count in connection.execute(owned.group_by(_live.c.worker_id, _live.c.isolation)):
        used[worker][isolation] = count
    counted = due.limit(min(MAX_DUE, sum(sum(each.values()) for each in slots.values()))).subquery()
    found = connection.execute(
        select(counted.c.isolation, func.count(), func.min(counted.c.available_at)).group_by(
            counted.c.isolation
        )
    ).all()
    oldest = min((row[2] for row in found), default=now)
    return PoolLoad(
        due=Counter({row[0]: row[1] for row in found}),
        waited=(now - oldest).total_seconds(),
        slots=slots,
        used=used,
    )


def ended(connection: Connection, worker_id: WorkerId, fences: Mapping[RunId, int]) -> set[tuple[RunId, int]]:
    """Of these attempts those whose end is stored as the incarnation's, and not because it was lost."""
    of = tables.attempts.c
    rows = connection.execute(
        select(of.run_id, of.fencing_token).where(
            of.run_id.in_(sorted(fences)), of.worker_id == worker_id, of.outcome != "lost"
        )
    )
    return {(run_id, fence) for run_id, fence in rows if fences[run_id] == fence}


def stops(connection: Connection, worker_id: WorkerId, fences: Mapping[RunId, int]) -> dict[RunId, str]:
    """Of these runs of an incarnation those that are asked to stop, and why, as a renewal says it."""
    orgs = tables.orgs
    gone = case((orgs.c.state.in_(("suspended", "removed")), "suspended"))
    reason = func.coalesce(_live.c.cancel_reason, gone).label("reason")
    rows = connection.execute(
        select(_live.c.id, _live.c.fencing_token, reason)
        .join_from(_live, orgs, orgs.c.id == _live.c.org_id)
        .where(_live.c.id.in_(sorted(fences)), _live.c.worker_id == worker_id, _live.c.state == "running")
    )
    return {id_: why for id_, fence, why in rows if why is not None and fences[id_] == fence}


def often_handed_back(connection: Connection, run_ids: Sequence[RunId]) -> set[RunId]:
    """Of these running runs those handed back `MAX_HAND_BACKS` times in a row that stored nothing then."""
    since = _live.c.attempt - MAX_HAND_BACKS
    of, saved, done = tables.attempts.c, tables.checkpoints.c, tables.steps.c
    handed_back = (
        select(func.count())
        .where(of.run_id == _live.c.id, of.attempt >= since, of.attempt < _live.c.attempt)
        .where(of.outcome == "handed_back")
        .scalar_subquery()
    )
    rows = connection.execute(
        select(_live.c.id).where(
            _live.c.id.in_(sorted(run_ids)),
            _live.c.attempt > MAX_HAND_BACKS,
            handed_back >= MAX_HAND_BACKS,
            ~exists().where(saved.run_id == _live.c.id, saved.attempt >= since),
            ~exists().where(done.run_id == _live.c.id, done.attempt >= since),
        )
    )
    return {row.id for row in rows}


def add(connection: Connection, row: Mapping[str, Any]) -> None:
    """Insert a host; the name must be free."""
    connection.execute(insert(_hosts), dict(row))


def named(connection: Connection, name: str) -> Row | None:
    """The host of that name, unless it was removed."""
    query = select(*(_hosts.c[key] for key in _SHOWN))
    return first_row(connection, query.where(_hosts.c.name == name, _hosts.c.removed_at.is_(None)))


def listed(connection: Connection, *, limit: int) -> list[Row]:
    """Hosts by name, each with the columns of its newest incarnation."""
    newest = (
        select(func.max(_workers.c.started_at))
        .where(_workers.c.host_id == _hosts.c.id)
        .correlate(_hosts)
        .scalar_subquery()
    )
    joined = _hosts.outerjoin(
        _workers, and_(_workers.c.host_id == _hosts.c.id, _workers.c.started_at == newest)
    )
    of_worker = ("host", "version", "capacity", "handlers", "lease_until")
    columns = (
        *(_hosts.c[name] for name in _SHOWN),
        *(_workers.c[name] for name in of_worker),
        *health.ENDS,
        _workers.c.id.label("worker"),
    )
    query = select(*columns).select_from(joined).where(_hosts.c.removed_at.is_(None))
    return all_rows(connection, query.order_by(_hosts.c.name).limit(limit))


def remove(connection: Connection, host_id: str, *, at: datetime) -> int:
    """Remove a host: its token ends, and so do its incarnations, whose number is returned."""
    connection.execute(update(_hosts).where(_hosts.c.id == host_id).values(removed_at=at))
    host_handlers.forget_host(connection, host_id)
    mine = (_workers.c.host_id == host_id, _workers.c.ended_at.is_(None))
    return connection.execute(update(_workers).where(*mine).values(ended_at=at, outcome="removed")).rowcount
