"""The lines of a run's log as people read them."""

from __future__ import annotations

from sqlalchemy import Connection, select, tuple_

from worker.ids import RunId
from worker.store import tables
from worker.store.paging import Row

_logs = tables.run_logs

START = (0, 0)


def lines_for_all_orgs(
    connection: Connection, run_id: RunId, *, after: tuple[int, int] = START, limit: int = 1000
) -> list[Row]:
    """The first `limit` lines of a run, whichever org's, that follow (attempt, seq), oldest first."""
    query = (
        select(_logs.c.attempt, _logs.c.seq, _logs.c.at, _logs.c.level, _logs.c.source, _logs.c.text)
        .where(_logs.c.run_id == run_id, tuple_(_logs.c.attempt, _logs.c.seq) > tuple_(*after))
        .order_by(_logs.c.attempt, _logs.c.seq)
        .limit(limit)
    )
    return [dict(row) for row in connection.execute(query).mappings()]
