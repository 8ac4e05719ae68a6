"""Hand back: runs that a worker owns by the rows but does not hold wait again."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, select

from worker.ids import RunId, WorkerId
from worker.runs.outcome import EndedAttempt, Trail
from worker.runs.run import OwnedRun
from worker.store import tables
from worker.store.connection import database_now
from worker.store.sql import statements

_live = tables.live_runs


def hand_back(connection: Connection, worker_id: WorkerId, owned: Sequence[OwnedRun]) -> set[RunId]:
    """End the attempts of these runs, whose admission's answer was lost, as handed back; fenced."""
    fences = {run.id: run.fencing_token for run in owned}
    rows = connection.execute(
        select(_live).where(
            _live.c.id.in_(sorted(fences)), _live.c.worker_id == worker_id, _live.c.state == "running"
        )
    ).all()
    now = database_now(connection)
    ended = [
        EndedAttempt(
            run_id=row.id,
            org_id=row.org_id,
            definition_id=row.definition_id,
            fencing_token=fences[row.id],
            attempt=row.attempt,
            started_at=row.started_at,
            ended_at=now,
            outcome="handed_back",
            state="waiting",
            reason="handed_back",
            trail=Trail(row.handler),
            detail="the answer to its admission was lost",
            failures=row.failures,
            recoveries=row.recoveries,
            keep_start_by=True,
        )
        for row in rows
    ]
    return statements(connection).finish(connection, worker_id, ended) if ended else set()
