"""Children: insert the runs that a run starts."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection

from worker.clock import to_text
from worker.ids import RunId
from worker.store.dialect import driver, file_now
from worker.store.sql.contract import CHILD_LINK, CHILD_OF_LIVE, CHILD_OF_RUN, ChildRow
from worker.store.sql.sqlite.values import Rows, in_one_step, instant
from worker.store.tables import NEVER

# What they have in common is read from the row of their parent. Rows of nulls are padding: see `values`.
_PARENT = "live_runs p JOIN parents f ON f.run_id = p.id WHERE p.id = ? AND column1 IS NOT NULL"

RUNS = f"""
INSERT INTO runs ({CHILD_OF_RUN})
SELECT column1, p.org_id, p.definition_id, p.revision, column2, 'child', p.scheduled_for, ?, column4,
       column5, p.pool
FROM {{rows}}, {_PARENT}
"""

LIVE = f"""
INSERT INTO live_runs ({CHILD_OF_LIVE})
SELECT column1, p.org_id, p.definition_id, p.revision, column2, column3, 'child', p.scheduled_for, column4,
       column5, p.max_concurrent, p.priority, 0, CASE WHEN column6 THEN 'parked' ELSE 'waiting' END,
       CASE WHEN column6 THEN 'window' ELSE 'due' END, CASE WHEN column6 THEN ? ELSE ? END, p.pool, p.id,
       column7
FROM {{rows}}, {_PARENT}
"""

LINKS = f"""
INSERT INTO children ({CHILD_LINK})
SELECT p.id, column7, column1, p.org_id, f.root_id, f.depth + 1, column2, column8, column9, column10
FROM {{rows}}, {_PARENT}
"""
# Of a `ChildRow`.
ROWS = Rows(
    (None, "id handler isolation idempotency_key params_json held place key occurrence map"),
)


def put_children(connection: Connection, parent_id: RunId, rows: Sequence[ChildRow]) -> None:
    cursor, now = driver(connection).cursor(), instant(file_now(connection))
    values = ROWS.of(rows)
    # The parameter after the rows is the last one of the statement.
    in_one_step(cursor, RUNS, values, first=(now,), last=(parent_id,))
    in_one_step(cursor, LIVE, values, first=(to_text(NEVER), now), last=(parent_id,))
    in_one_step(cursor, LINKS, values, last=(parent_id,))
