"""Workers: their incarnations, and what becomes of the runs of one that is gone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, and_, delete, func, insert, literal, or_, select, update

from worker.ids import ALL_ORGS, RunId, WorkerId
from worker.model.definitions.pools import DEFAULT_POOL
from worker.model.runs import worker_ends
from worker.model.runs.outcome import EndedAttempt
from worker.model.runs.run import LogLine, OwnedRun, Recovered
from worker.store import host_grants, host_handlers, placements, tables
from worker.store.definitions import names_of
from worker.store.dialect import Row, all_rows, database_now
from worker.store.health import holds_lease
from worker.store.sql import statements
from worker.store.sql.contract import AbandonedRun

_live = tables.live_runs
_workers = tables.workers
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
    """End an incarnation that has stopped; another worker recovers the runs that it still owns.

    One that was found with an expired lease, and with no run, has stopped after all: it says so late.
    """
    now = database_now(connection)
    taken_for_dead = and_(_workers.c.outcome == worker_ends.CRASHED, _workers.c.recovered_runs == 0)
    connection.execute(
        update(_workers)
        .where(_workers.c.id == worker_id, or_(_workers.c.ended_at.is_(None), taken_for_dead))
        .values(ended_at=now, outcome=worker_ends.STOPPED, recovered_by=None)
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
    alive = (_workers.c.host_id.is_(None), holds_lease(database_now(connection)))
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
        placements.ended_now(
            row,
            now,
            fencing_token=fences[row.id],
            outcome="handed_back",
            state="waiting",
            reason="handed_back",
            detail="the answer to its admission was lost",
            keep_start_by=True,
        )
        for row in rows
    ]
    return statements(connection).finish(connection, worker_id, ended) if ended else set()


def recover(
    connection: Connection,
    *,
    max_recoveries: int,
    by: WorkerId | None = None,
    others_than: WorkerId | None = None,
    still: Callable[[], bool] = lambda: True,
) -> list[Recovered]:
    """Take over the runs of workers that ended or whose lease has passed; `by` is the worker that does so.

    Their attempts are `lost`, and a line in the run's log says so. The runs wait again (recovered), or fail
    (lost) after their definition's `max_recoveries`, by default the given one. A run that was on its way to a
    host waits again without being counted. On SQLite only ended workers count.
    With `others_than` all other workers count as dead: for the holder of a SQLite file's lock.
    `still` is checked once the database has answered, since this connection may have hung.
    """
    database_now(connection)
    if not still():
        return []
    hot = statements(connection)
    abandoned = hot.recover_lock(connection, by=by, others_than=others_than, limit=RECOVERED_AT_ONCE)
    if not abandoned:
        return []
    if placed := placements.on_their_way(connection, [run.id for run in abandoned]):
        _undo(connection, [run for run in abandoned if run.id in placed])
        abandoned = [run for run in abandoned if run.id not in placed]
    most = _max_recoveries(connection, abandoned, max_recoveries)
    names = names_of(connection, ALL_ORGS, (run.definition_id for run in abandoned))
    now = database_now(connection)
    recovered: list[Recovered] = []
    owners = sorted({run.worker_id for run in abandoned})
    ends = _ends_of(connection, owners)
    lines: list[LogLine] = []
    for worker_id in owners:
        ended = [
            _lost(run, most[run.definition_id, run.revision], now)
            for run in abandoned
            if run.worker_id == worker_id
        ]
        taken = hot.finish(connection, worker_id, ended)
        _count_recovered(connection, worker_id, len(taken), by)
        lines += [
            _line(attempt, worker_id, ends.get(worker_id), by, now)
            for attempt in ended
            if attempt.run_id in taken
        ]
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
    hot.append_logs(connection, lines)
    return recovered


def _ends_of(connection: Connection, owners: Sequence[WorkerId]) -> dict[WorkerId, Row]:
    columns = (_workers.c[name] for name in ("id", "outcome", "renewed_at"))
    return {row["id"]: row for row in all_rows(connection, select(*columns).where(_workers.c.id.in_(owners)))}


def _count_recovered(connection: Connection, owner: WorkerId, runs: int, by: WorkerId | None) -> None:
    values = {
        "recovered_runs": _workers.c.recovered_runs + runs,
        "recovered_by": func.coalesce(_workers.c.recovered_by, literal(by, _workers.c.recovered_by.type)),
    }
    connection.execute(update(_workers).where(_workers.c.id == owner).values(values))


def _line(
    lost: EndedAttempt, owner: WorkerId, row: Row | None, by: WorkerId | None, now: datetime
) -> LogLine:
    waits = lost.state == "waiting"
    text = worker_ends.lost_line(lost.attempt, owner, row, by, waits=waits)
    place = lost.run_id, lost.attempt, worker_ends.LOST_LINE, lost.org_id
    return LogLine(*place, now, "warning", worker_ends.SOURCE, text)


def _undo(connection: Connection, abandoned: Sequence[AbandonedRun]) -> None:
    """Let runs wait again that no host has taken: nothing ran, so nothing was lost."""
    for worker_id in sorted({run.worker_id for run in abandoned}):
        fences = [(run.id, run.fencing_token) for run in abandoned if run.worker_id == worker_id]
        placements.withdraw(
            connection, worker_id, fences, detail="the worker that placed it is gone", after=timedelta()
        )


def _max_recoveries(
    connection: Connection, abandoned: list[AbandonedRun], default: int
) -> dict[host_grants.Revision, int]:
    pairs = {(run.definition_id, run.revision) for run in abandoned}
    found = host_grants.specs(connection, pairs)
    return {pair: int(found.get(pair, {}).get("max_recoveries", default)) for pair in pairs}


def _lost(run: AbandonedRun, most: int, now: datetime) -> EndedAttempt:
    times = run.recoveries + 1
    fate: dict[str, Any] = {"state": "waiting", "reason": "recovered"}
    if times > most:
        error = {"type": "Lost", "message": f"its worker was lost {times} times in a row"}
        fate = {"state": "failed", "reason": "lost", "error": error, "error_cause": "lost"}
    return placements.ended_now(run, now, outcome="lost", recoveries=times, **fate)
