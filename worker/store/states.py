"""States of definitions, as attempts load them and people set them; `sql/*/finish.py` commits them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, select

from worker.ids import DefinitionId, OrgId
from worker.model.runs.run import AdmittedRun, LoadedState
from worker.store import tables
from worker.store.bulk import insert_many
from worker.store.dialect import Row, first_row, is_postgresql

_states = tables.definition_states
_definitions = tables.definitions
_live = tables.live_runs
_runs = tables.runs


def load(connection: Connection, run: AdmittedRun) -> LoadedState:
    """The state of a running run's definition, empty if it has none."""
    if is_postgresql(connection):
        # Waits for a change by hand, which locks the definition and then checks that none of its runs is
        # running: either that check sees this run, or the statement below sees the change.
        lock = select(_definitions.c.id).where(_definitions.c.id == run.definition_id)
        connection.execute(lock.with_for_update(read=True, key_share=True)).all()
    row = find(connection, run.org_id, run.definition_id)
    return LoadedState({} if row is None else row["data"], commits=_commits(connection, run))


def _commits(connection: Connection, run: AdmittedRun) -> bool:
    """Whether a success of the run changes the state: not that of a backfill's run, nor of its retry."""
    if run.origin != "retry":
        return run.origin != "backfill"
    this = select(_runs.c.retry_of, _runs.c.origin).where(_runs.c.id == run.id)
    chain = this.cte("chain", recursive=True)
    older = _runs.alias("older")
    chain = chain.union(select(older.c.retry_of, older.c.origin).where(older.c.id == chain.c.retry_of))
    found = select(chain.c.origin).where(chain.c.origin == "backfill").limit(1)
    return connection.execute(found).first() is None


def find(connection: Connection, org_id: OrgId, definition_id: DefinitionId) -> Row | None:
    """The row of a definition's state, or None if it has none."""
    return first_row(
        connection,
        select(_states).where(_states.c.definition_id == definition_id, _states.c.org_id == org_id),
    )


def running(connection: Connection, org_id: OrgId, definition_id: DefinitionId) -> str | None:
    """The id of a running run of the definition, or None."""
    query = select(_live.c.id).where(
        _live.c.org_id == org_id, _live.c.definition_id == definition_id, _live.c.state == "running"
    )
    return connection.execute(query.limit(1)).scalar_one_or_none()


def put(
    connection: Connection, org_id: OrgId, definition_id: DefinitionId, data: Any, *, at: datetime, by: str
) -> None:
    """Set the state of a locked definition."""
    values = {"data": data, "updated_at": at, "updated_by": by, "run_id": None}
    row = {"definition_id": definition_id, "org_id": org_id, "version": 1, **values}
    insert_many(connection, _states, [row], key=["definition_id"], replaced=tuple(values), counted="version")


def clear(connection: Connection, org_id: OrgId, definition_id: DefinitionId | None = None) -> int:
    """Delete the state of a locked definition, or all of an org; returns how many."""
    where = [_states.c.org_id == org_id]
    if definition_id is not None:
        where.append(_states.c.definition_id == definition_id)
    return connection.execute(delete(_states).where(*where)).rowcount
