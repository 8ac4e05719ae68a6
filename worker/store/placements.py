"""Placements: admitted runs on their way to a host, until a host takes them or they are withdrawn.

Until then the worker that placed a run owns it, although it does not serve the run's pool: that tells such a
run from one that its owner executes. Rows of `live_runs` are locked before those of `placements`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, case, delete, func, select, tuple_, update

from worker.ids import RunId, WorkerId
from worker.model.runs.hosts import Fence, Placed, Placement, PoolRoom, Ticket
from worker.model.runs.outcome import EndedAttempt, Trail
from worker.model.runs.run import AdmittedRun, Isolation
from worker.store import host_grants, tables
from worker.store.dialect import chunks, database_now, upsert
from worker.store.health import holds_lease
from worker.store.sql import statements

_live, _placements, _workers = tables.live_runs, tables.placements, tables.workers
# Rows that one call of `mark` changes.
MARKED = 500
# Of a stored run: what its current attempt has.
_OF_ATTEMPT = ["org_id", "definition_id", "fencing_token", "attempt", "started_at", "failures", "recoveries"]
# The fields of an admitted run.
ADMITTED = tuple(_live.c[field.name] for field in fields(AdmittedRun))


def room_of(connection: Connection, pool: str) -> PoolRoom:
    """What the pool's hosts could take now; admission counts again, exactly."""
    now = database_now(connection)
    is_host = _workers.c.host_id.is_not(None) & holds_lease(now)
    columns = (_workers.c.id, _workers.c.capacity, _workers.c.handlers, _workers.c.pools)
    # One that has not read its plug-ins yet offers nothing.
    rows = connection.execute(select(*columns).where(is_host)).all()
    hosts = [row for row in rows if pool in row.pools and row.handlers]
    if not hosts:
        return PoolRoom({}, {})
    of_hosts = _live.c.worker_id.in_([row.id for row in hosts])
    placed = _live.c.id.in_(select(_placements.c.run_id).where(_placements.c.pool == pool))
    used: Counter[str] = Counter()
    for owned in (of_hosts, placed & of_hosts.is_(False)):
        running = select(_live.c.isolation, func.count()).where(_live.c.state == "running", owned)
        used.update(
            {isolation: n for isolation, n in connection.execute(running.group_by(_live.c.isolation))}
        )
    free: dict[Isolation, int] = {
        "child": sum(int(row.capacity.get("children", 0)) for row in hosts) - used["child"],
        "inline": sum(int(row.capacity.get("inline", 0)) for row in hosts) - used["inline"],
    }
    return PoolRoom(
        {isolation: max(0, slots) for isolation, slots in free.items()},
        host_grants.common(connection, pool, [row.id for row in hosts]),
    )


def unplaced_handlers(connection: Connection, pool: str) -> list[str]:
    """Handlers that some hosts of the pool offer and others do not, so that their runs are not placed."""
    alive = holds_lease(database_now(connection))
    columns = (_workers.c.handlers, _workers.c.pools)
    rows = connection.execute(select(*columns).where(alive, _workers.c.host_id.is_not(None)))
    offered = [set(row.handlers) for row in rows if pool in row.pools and row.handlers]
    return sorted(set.union(*offered) - set.intersection(*offered)) if offered else []


def place(connection: Connection, worker_id: WorkerId, pool: str, tickets: Mapping[Fence, str]) -> set[Fence]:
    """Store the hashes of the tickets of runs that this worker owns; returns those that it still owned."""
    ours = _lock(connection, worker_id, tickets)
    now = database_now(connection)
    rows = [
        {
            "run_id": row.id,
            "fencing_token": row.fencing_token,
            "worker_id": worker_id,
            "pool": pool,
            "ticket_sha256": tickets[row.id, row.fencing_token],
            "placed_at": now,
        }
        for row in ours
    ]
    if rows:
        replaced = [name for name in rows[0] if name != "run_id"]
        connection.execute(upsert(connection, _placements, ("run_id",), replaced), rows)
    return {(row.id, row.fencing_token) for row in ours}


def take(connection: Connection, host: WorkerId, ticket: Ticket) -> AdmittedRun | None:
    """Move a placed run to a host's incarnation; its timeout starts now.

    None, and nothing changes, if the ticket is not valid (any more), or if the incarnation has lost its lease
    or serves another pool.
    """
    # By the primary key: a condition on the state could choose one of the other indexes.
    query = select(_live.c.state, _live.c.worker_id, _live.c.fencing_token, _live.c.pool)
    mine = _live.c.id == ticket.run_id
    run = connection.execute(query.where(mine).with_for_update()).one_or_none()
    if run is None or run.state != "running" or run.fencing_token != ticket.fencing_token:
        return None
    now = database_now(connection)
    alive = (_workers.c.id == host, holds_lease(now))
    pools = connection.execute(select(_workers.c.pools).where(*alive)).scalar()
    if pools is None or run.pool not in pools:
        return None
    used = delete(_placements).where(
        _placements.c.run_id == ticket.run_id,
        _placements.c.fencing_token == ticket.fencing_token,
        _placements.c.worker_id == run.worker_id,
        _placements.c.ticket_sha256 == ticket.sha256,
    )
    if connection.execute(used).rowcount != 1:
        return None
    connection.execute(update(_live).where(mine).values(worker_id=host, started_at=now))
    return AdmittedRun(*connection.execute(select(*ADMITTED).where(mine)).one())


def withdraw(
    connection: Connection, worker_id: WorkerId, fences: Collection[Fence], *, detail: str, after: timedelta
) -> set[Fence]:
    """Let placed runs of this worker wait again (`unplaced`), and return those that it still owned.

    One whose cancellation was requested is cancelled instead.
    """
    rows = _lock(connection, worker_id, fences)
    let_wait(connection, worker_id, rows, detail=detail, after=after)
    return {(row.id, row.fencing_token) for row in rows}


def let_wait(
    connection: Connection, worker_id: WorkerId, rows: Sequence[Any], *, detail: str, after: timedelta
) -> None:
    """Undo the admission of these rows of `live_runs`, locked and of one owner: no attempt was made."""
    now = database_now(connection)
    waiting = [row.id for row in rows if row.cancel_requested_at is None]
    undone = {"state": "waiting", "reason": "unplaced", "detail": detail, "available_at": now + after}
    for part in chunks(waiting):
        connection.execute(
            update(_live)
            .where(_live.c.id.in_(part))
            .values(worker_id=None, started_at=None, attempt=_live.c.attempt - 1, **undone)
        )
    for part in chunks([row.id for row in rows]):
        connection.execute(delete(_placements).where(_placements.c.run_id.in_(part)))
    end_asked(connection, worker_id, rows, now)


def end_asked(connection: Connection, worker_id: WorkerId, rows: Sequence[Any], now: datetime) -> None:
    """Cancel those of these rows, locked and of one owner, that are asked to stop: no attempt was made.

    As `finish`, it ends the transaction on PostgreSQL.
    """
    cancelled = [
        ended_now(
            row,
            now,
            outcome="cancelled",
            state="cancelled",
            reason=row.cancel_reason or "requested",
            keep_start_by=True,
        )
        for row in rows
        if row.cancel_requested_at is not None
    ]
    if cancelled:
        statements(connection).finish(connection, worker_id, cancelled)


def ended_now(run: Any, now: datetime, **outcome: Any) -> EndedAttempt:
    """The current attempt of a stored run, ended now."""
    same = {name: getattr(run, name) for name in _OF_ATTEMPT}
    same |= {"trail": Trail(run.handler), "is_child": run.parent_id is not None}
    return EndedAttempt(run_id=run.id, ended_at=now, **(same | outcome))


def placed_by(connection: Connection, worker_id: WorkerId, pool: str) -> list[Placed]:
    """What this worker has placed in a pool and no host has taken; forgets placements that are over."""
    now = database_now(connection)
    is_ours = (_live.c.fencing_token == _placements.c.fencing_token) & (
        _live.c.worker_id == _placements.c.worker_id
    )
    joined = _placements.outerjoin(_live, (_live.c.id == _placements.c.run_id) & is_ours)
    columns = (
        *(_placements.c.run_id, _placements.c.fencing_token, _placements.c.worker_id),
        *(_placements.c.placed_at, _live.c.isolation, _live.c.cancel_requested_at),
    )
    rows = connection.execute(select(*columns).select_from(joined).where(_placements.c.pool == pool)).all()
    gone = [(row.run_id, row.fencing_token) for row in rows if row.isolation is None]
    if gone:
        pair = tuple_(_placements.c.run_id, _placements.c.fencing_token)
        connection.execute(delete(_placements).where(pair.in_(gone)))
    return [
        Placed(
            Placement(row.run_id, row.fencing_token, pool, row.isolation),
            now - row.placed_at,
            row.cancel_requested_at is not None,
        )
        for row in rows
        if row.isolation is not None and row.worker_id == worker_id
    ]


def mark(connection: Connection, pool: str, detail: str | None) -> int:
    """Set the reason `unplaced` of due runs of a pool whose engine does not respond; None: clear it again.

    Changes at most `MARKED` rows and returns how many. Admission does not read the reason.
    """
    # `state NOT IN` means waiting, but matches no partial index, so rows come in the order of ids.
    due = _live.c.state.not_in(("running", "held", "parked")) & (_live.c.pool == pool)
    if detail is None:
        wrong = _live.c.reason == "unplaced"
    else:
        wrong = _live.c.reason.not_in(("unplaced", "no_pool", "no_handler", "not_approved"))
        wrong &= _live.c.available_at <= database_now(connection)
    rows = select(_live.c.id).where(due, wrong).order_by(_live.c.id).limit(MARKED)
    ids = connection.execute(rows.with_for_update(skip_locked=True)).scalars().all()
    cleared = case((_live.c.attempt == 0, "due"), else_="retry")
    reason = cleared if detail is None else "unplaced"
    changed = update(_live).where(_live.c.id.in_(ids)).values(reason=reason, detail=detail)
    return connection.execute(changed).rowcount if ids else 0


def on_their_way(connection: Connection, run_ids: Collection[RunId]) -> set[RunId]:
    """Those of these running runs whose owner does not serve their pool, and so only places them."""
    query = select(_live.c.id, _live.c.pool, _workers.c.pools).join(
        _workers, _workers.c.id == _live.c.worker_id
    )
    rows = connection.execute(query.where(_live.c.id.in_(run_ids)))
    return {id_ for id_, pool, pools in rows if pool not in pools}


def _lock(connection: Connection, worker_id: WorkerId, fences: Collection[Fence]) -> list[Any]:
    """The rows of these runs that this worker owns under these fencing tokens, locked in the order of ids."""
    wanted = set(fences)
    rows: list[Any] = []
    for part in chunks(sorted({run_id for run_id, _ in wanted})):
        query = select(_live).where(_live.c.id.in_(part)).order_by(_live.c.id).with_for_update()
        rows += [
            row
            for row in connection.execute(query)
            if row.state == "running" and row.worker_id == worker_id and (row.id, row.fencing_token) in wanted
        ]
    return rows
