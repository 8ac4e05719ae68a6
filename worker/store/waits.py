"""Waits as people change them: answered, and copied to a run that continues another."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Connection, func, insert, or_, select, text, update

from worker.ids import OrgId, RunId
from worker.model.runs.waits import is_open_question
from worker.store import tables
from worker.store.dialect import Row, all_rows, first_row, hint

_waits, _live = tables.waits, tables.live_runs
# Open questions of a run that are read.
MAX_OPEN = 100


def lock_attempt(connection: Connection, org_id: OrgId, run_id: RunId) -> int | None:
    """Lock an unfinished run and return the number of its last attempt; None if it has ended.

    A run's row is locked before its waits are read or written, here and where an attempt ends: so an answer
    either finds the run parked, or the end of the attempt finds the answer.
    """
    query = select(_live.c.attempt).where(_live.c.id == run_id, _live.c.org_id == org_id)
    return connection.execute(query.with_for_update()).scalar_one_or_none()


def find(connection: Connection, org_id: OrgId, run_id: RunId, name: str, occurrence: int) -> Row | None:
    """One wait of a run."""
    query = select(_waits).filter_by(run_id=run_id, org_id=org_id, name=name, occurrence=occurrence)
    return first_row(connection, query)


def open_questions(connection: Connection, org_id: OrgId, run_id: RunId, *, at: datetime) -> list[Row]:
    """What a run asks and somebody can answer at this time, oldest first, by the index of open waits."""
    asks = (_waits.c.run_id == run_id, _waits.c.org_id == org_id, _waits.c.kind.not_in(("sleep", "batch")))
    is_open = (text(tables.OPEN), or_(_waits.c.until.is_(None), _waits.c.until > at))
    query = select(_waits).where(*asks, *is_open).order_by(_waits.c.opened_at, _waits.c.name)
    return list(filter(is_open_question, all_rows(connection, query.limit(MAX_OPEN))))


def early(connection: Connection, org_id: OrgId, run_id: RunId, *, most: int) -> int:
    """The answers to waits that a run has not reached yet, up to `most`."""
    some = (
        select(_waits.c.name)
        .where(_waits.c.run_id == run_id, _waits.c.org_id == org_id, _waits.c.opened_at.is_(None))
        .limit(most)
        .subquery()
    )
    return connection.execute(select(func.count()).select_from(some)).scalar_one()


def answer(connection: Connection, wait: Row, data: Any, *, at: datetime, by: str) -> None:
    """Store the answer of an open wait of a locked run."""
    key = (_waits.c[name] == wait[name] for name in ("org_id", "run_id", "name", "occurrence"))
    connection.execute(update(_waits).where(*key).values(answered_at=at, answered_by=by, answer=data))


def answer_early(
    connection: Connection,
    org_id: OrgId,
    run_id: RunId,
    name: str,
    occurrence: int,
    data: Any,
    *,
    at: datetime,
    by: str,
) -> None:
    """Keep the answer to a wait that a locked run has not reached yet."""
    values = {"org_id": org_id, "run_id": run_id, "name": name, "occurrence": occurrence, "kind": "answer"}
    connection.execute(insert(_waits).values(**values, answered_at=at, answered_by=by, answer=data))


def wake(connection: Connection, org_id: OrgId, run_id: RunId, *, at: datetime) -> bool:
    """Let a locked run wait for a slot if it is parked; returns whether it was."""
    parked = (_live.c.id == run_id, _live.c.org_id == org_id, _live.c.state == "parked")
    values = {"state": "waiting", "reason": "resumed", "available_at": at, "started_at": None}
    woken = connection.execute(update(_live).where(*parked).values(**values)).rowcount > 0
    if woken:
        hint(connection)
    return woken


def copy(connection: Connection, org_id: OrgId, of: RunId, to: RunId) -> int:
    """Give a new run the answers and ended sleeps of an older one, not what timed out; returns how many."""
    columns = [column for column in _waits.c if column.name not in ("run_id", "pending_attempt")]
    # A question of a budget is asked again, and a request is sent again.
    done = _waits.c.kind.not_in(("budget", "batch")) & or_(
        _waits.c.answered_at.is_not(None), (_waits.c.kind == "sleep") & _waits.c.timed_out_at.is_not(None)
    )
    kept = (_waits.c.run_id == of, _waits.c.org_id == org_id, done)
    rows = [dict(row) for row in connection.execute(select(*columns).where(*kept)).mappings()]
    if rows:
        connection.execute(insert(_waits), [{**row, "run_id": to} for row in rows])
    return len(rows)
