"""The runs' way through the database: recover, checkpoints, what an attempt must know, retention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, select, tuple_

from worker.ids import DefinitionId, RunId, WorkerId
from worker.runs.outcome import EndedAttempt, Trail
from worker.runs.run import Recovered, RunContext
from worker.store import tables
from worker.store.connection import database_now
from worker.store.definitions import names_for_all_orgs
from worker.store.sql import AbandonedRun, statements

# Runs recovered by one transaction.
RECOVERED_AT_ONCE = 500

_orgs = tables.orgs
_definitions = tables.definitions
_revisions = tables.definition_revisions
_checkpoints = tables.checkpoints


def recover(
    connection: Connection, *, max_recoveries: int, still: Callable[[], bool] = lambda: True
) -> list[Recovered]:
    """Take the runs of workers whose lease has passed or who were ended.

    Their attempts are `lost`; the runs wait again (recovered), or fail (lost) beyond
    their definition's `max_recoveries`, whose default is given. On SQLite no lease
    passes: only ended workers count. `still` is asked when the database has answered:
    this connection may have hung since the caller's own look.
    """
    database_now(connection)
    return _recover(connection, None, max_recoveries) if still() else []


def recover_all_others(
    connection: Connection, worker_id: WorkerId, *, max_recoveries: int
) -> list[Recovered]:
    """As `recover`, taking every other worker for dead: for the holder of a SQLite file's lock."""
    return _recover(connection, worker_id, max_recoveries)


def _recover(connection: Connection, others_than: WorkerId | None, default: int) -> list[Recovered]:
    hot = statements(connection)
    abandoned = hot.recover_lock(connection, others_than=others_than, limit=RECOVERED_AT_ONCE)
    if not abandoned:
        return []
    most = _max_recoveries(connection, abandoned, default)
    names = names_for_all_orgs(connection, (run.definition_id for run in abandoned))
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
    recoveries = run.recoveries + 1
    again = recoveries <= most
    return EndedAttempt(
        run_id=run.id,
        org_id=run.org_id,
        definition_id=run.definition_id,
        fencing_token=run.fencing_token,
        attempt=run.attempt,
        started_at=run.started_at,
        ended_at=now,
        outcome="lost",
        state="waiting" if again else "failed",
        reason="recovered" if again else "lost",
        trail=Trail(run.handler),
        failures=run.failures,
        recoveries=recoveries,
        error=None
        if again
        else {"type": "Lost", "message": f"its worker was lost {recoveries} times running"},
        error_cause=None if again else "lost",
    )


def load_checkpoint(connection: Connection, run_id: RunId) -> Any | None:
    """What the run saved last, or None."""
    return connection.execute(
        select(_checkpoints.c.data).where(_checkpoints.c.run_id == run_id)
    ).scalar_one_or_none()


def run_contexts(
    connection: Connection, wanted: Sequence[tuple[DefinitionId, int]]
) -> dict[tuple[DefinitionId, int], RunContext]:
    """By definition and revision, as runs have them: org, definition, and the spec of that revision."""
    definition_id, revision = _revisions.c.definition_id, _revisions.c.revision
    rows = connection.execute(
        select(
            definition_id,
            revision,
            _orgs.c.id,
            _orgs.c.code,
            _orgs.c.name,
            _orgs.c.timezone,
            _orgs.c.issuer,
            _definitions.c.name,
            _revisions.c.spec,
        )
        .join(_definitions, _definitions.c.id == definition_id)
        .join(_orgs, _orgs.c.id == _definitions.c.org_id)
        .where(definition_id.in_({id_ for id_, _ in wanted}), revision.in_({number for _, number in wanted}))
    )
    return {(id_, number): RunContext(*rest) for id_, number, *rest in rows}
