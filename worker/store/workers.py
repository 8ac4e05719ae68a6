"""Workers: their incarnations, and what becomes of the runs of one that is gone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, tuple_, update

from worker.definitions.pools import DEFAULT_POOL
from worker.ids import ALL_ORGS, RunId, WorkerId
from worker.runs.outcome import EndedAttempt, Trail
from worker.runs.run import OwnedRun, Recovered
from worker.store import host_handlers, placements, tables
from worker.store.definitions import names_of
from worker.store.dialect import database_now
from worker.store.sql import statements
from worker.store.sql.contract import AbandonedRun

_live = tables.live_runs
_workers = tables.workers
_revisions = tables.definition_revisions
# Runs recovered by one transaction.
RECOVERED_AT_ONCE = 500


def register(
    connection: Connection,
    worker_id: WorkerId,
    *,
    lease: timedelta,
    handlers: Sequence[str],
    capacity: Mapping[str, Any],
    pools: Sequence[str] = (DEFAULT_POOL,),
    **identity: Any,
) -> None:
    """Start an incarnation with this `host`, `pid` and `version`; its lease starts now."""
    now = database_now(connection)
    connection.execute(
        insert(_workers).values(
            id=worker_id,
            started_at=now,
            renewed_at=now,
            lease_until=now + lease,
            handlers=sorted(handlers),
            capacity=dict(capacity),
            pools=sorted(pools),
            **identity,
        )
    )


def update_handlers(connection: Connection, worker_id: WorkerId, handlers: Sequence[str]) -> None:
    """Set the handlers that the worker offers."""
    connection.execute(update(_workers).where(_workers.c.id == worker_id).values(handlers=sorted(handlers)))


def unregister(connection: Connection, worker_id: WorkerId) -> None:
    """End an incarnation; another worker recovers the runs that it still owns."""
    connection.execute(
        update(_workers)
        .where(_workers.c.id == worker_id, _workers.c.ended_at.is_(None))
        .values(ended_at=database_now(connection))
    )


def forget_workers(connection: Connection, age: timedelta) -> int:
    """Delete workers that ended longer than `age` ago and own no runs; returns how many.

    Hosts that were removed as long ago go with them, and what hosts have not declared for a month.
    """
    host_handlers.forget_unseen(connection)
    gone = tables.hosts.c.removed_at < database_now(connection) - age
    connection.execute(delete(tables.hosts).where(gone))
    owned = select(_live.c.worker_id).where(_live.c.state == "running")
    result = connection.execute(
        delete(_workers).where(
            _workers.c.ended_at < database_now(connection) - age, _workers.c.id.not_in(owned)
        )
    )
    return result.rowcount


def live_workers(connection: Connection) -> int:
    """The number of workers that hold their lease, without hosts: those request no tokens."""
    alive = (
        _workers.c.ended_at.is_(None),
        _workers.c.host_id.is_(None),
        _workers.c.lease_until > database_now(connection),
    )
    count: int = connection.execute(select(func.count()).select_from(_workers).where(*alive)).scalar_one()
    return count


def hand_back(connection: Connection, worker_id: WorkerId, owned: Sequence[OwnedRun]) -> set[RunId]:
    """End the attempts of these runs as handed back, fenced: the answer to their admission was lost."""
    fences = {run.id: run.fencing_token for run in owned}
    rows = connection.execute(
        select(_live).where(
            _live.c.id.in_(sorted(fences)), _live.c.worker_id == worker_id, _live.c.state == "running"
        )
    ).all()
    now = database_now(connection)
    ended = [
        _ended(
            row,
            now,
            fencing_token=fences[row.id],
            outcome="handed_back",
            state="waiting",
            reason="handed_back",
            detail="the answer to its admission was lost",
            recoveries=row.recoveries,
            keep_start_by=True,
        )
        for row in rows
    ]
    return statements(connection).finish(connection, worker_id, ended) if ended else set()


def _ended(run: Any, now: datetime, **outcome: Any) -> EndedAttempt:
    """The current attempt of a stored run, ended now."""
    return EndedAttempt(
        run_id=run.id,
        org_id=run.org_id,
        definition_id=run.definition_id,
        attempt=run.attempt,
        started_at=run.started_at,
        ended_at=now,
        trail=Trail(run.handler),
        failures=run.failures,
        **outcome,
    )


def recover(
    connection: Connection,
    *,
    max_recoveries: int,
    others_than: WorkerId | None = None,
    still: Callable[[], bool] = lambda: True,
) -> list[Recovered]:
    """Take over the runs of workers that ended or whose lease has passed.

    Their attempts are `lost`. The runs wait again (recovered), or fail (lost) after their
    definition's `max_recoveries`, by default the given one. A run that was on its way to a host waits again
    without being counted. On SQLite only ended workers count.
    With `others_than` all other workers count as dead: for the holder of a SQLite file's lock.
    `still` is checked once the database has answered, since this connection may have hung.
    """
    database_now(connection)
    if not still():
        return []
    hot = statements(connection)
    abandoned = hot.recover_lock(connection, others_than=others_than, limit=RECOVERED_AT_ONCE)
    if not abandoned:
        return []
    if placed := placements.on_their_way(connection, [run.id for run in abandoned]):
        _undo(connection, [run for run in abandoned if run.id in placed])
        abandoned = [run for run in abandoned if run.id not in placed]
    most = _max_recoveries(connection, abandoned, max_recoveries)
    names = names_of(connection, ALL_ORGS, (run.definition_id for run in abandoned))
    now = database_now(connection)
    recovered: list[Recovered] = []
    for worker_id in sorted({run.worker_id for run in abandoned}):
        ended = [
            _lost(run, most[run.definition_id, run.revision], now)
            for run in abandoned
            if run.worker_id == worker_id
        ]
        taken = hot.finish(connection, worker_id, ended)
        recovered += [
            Recovered(
                attempt.run_id,
                attempt.org_id,
                attempt.definition_id,
                *names[attempt.definition_id],
                attempt.attempt,
                worker_id,
                attempt.state,
            )
            for attempt in ended
            if attempt.run_id in taken
        ]
    return recovered


def _undo(connection: Connection, abandoned: Sequence[AbandonedRun]) -> None:
    """Let runs wait again that no host has taken: nothing ran, so nothing was lost."""
    for worker_id in sorted({run.worker_id for run in abandoned}):
        fences = [(run.id, run.fencing_token) for run in abandoned if run.worker_id == worker_id]
        placements.withdraw(
            connection, worker_id, fences, detail="the worker that placed it is gone", after=timedelta()
        )


def _max_recoveries(
    connection: Connection, abandoned: list[AbandonedRun], default: int
) -> dict[tuple[str, int], int]:
    pairs = sorted({(run.definition_id, run.revision) for run in abandoned})
    query = select(_revisions.c.definition_id, _revisions.c.revision, _revisions.c.spec).where(
        tuple_(_revisions.c.definition_id, _revisions.c.revision).in_(pairs)
    )
    found = {(id_, revision): spec for id_, revision, spec in connection.execute(query)}
    return {pair: int(found.get(pair, {}).get("max_recoveries", default)) for pair in pairs}


def _lost(run: AbandonedRun, most: int, now: datetime) -> EndedAttempt:
    times = run.recoveries + 1
    fate: dict[str, Any] = {"state": "waiting", "reason": "recovered"}
    if times > most:
        error = {"type": "Lost", "message": f"its worker was lost {times} times in a row"}
        fate = {"state": "failed", "reason": "lost", "error": error, "error_cause": "lost"}
    return _ended(run, now, fencing_token=run.fencing_token, outcome="lost", recoveries=times, **fate)
