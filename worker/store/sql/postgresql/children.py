"""Children: insert the runs that a run starts."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection

from worker.ids import RunId
from worker.store.dialect import driver
from worker.store.sql.contract import CHILD_LINK, CHILD_OF_LIVE, CHILD_OF_RUN, ChildRow
from worker.store.sql.postgresql.arrays import Columns, flags, numbers, plain, texts, uuids, words
from worker.store.tables import NEVER

# One statement: what they have in common is read from the row of their parent.
PUT = f"""
WITH n AS MATERIALIZED (
  SELECT * FROM unnest((SELECT %s::uuid[]), (SELECT %s::text[]), (SELECT %s::text[]), (SELECT %s::uuid[]),
                       (SELECT %s::text[]), (SELECT %s::boolean[]), (SELECT %s::integer[]),
                       (SELECT %s::text[]), (SELECT %s::integer[]), (SELECT %s::integer[]))
    AS n(id, handler, isolation, idempotency_key, params, held, place, key, occurrence, map)
), p AS MATERIALIZED (
  SELECT l.*, f.root_id, f.depth, c.now FROM live_runs l JOIN parents f ON f.run_id = l.id,
         (SELECT clock_timestamp() AS now) c
  WHERE l.id = %s::uuid
), live AS (
  INSERT INTO live_runs ({CHILD_OF_LIVE})
  SELECT n.id, p.org_id, p.definition_id, p.revision, n.handler, n.isolation, 'child', p.scheduled_for,
         n.idempotency_key, n.params::jsonb, p.max_concurrent, p.priority, false,
         CASE WHEN n.held THEN 'parked' ELSE 'waiting' END, CASE WHEN n.held THEN 'window' ELSE 'due' END,
         CASE WHEN n.held THEN %s::timestamptz ELSE p.now END, p.pool, p.id, n.place
  FROM n, p ORDER BY n.place
), run AS (
  INSERT INTO runs ({CHILD_OF_RUN})
  SELECT n.id, p.org_id, p.definition_id, p.revision, n.handler, 'child', p.scheduled_for, p.now,
         n.idempotency_key, n.params::jsonb, p.pool
  FROM n, p ORDER BY n.place
)
INSERT INTO children ({CHILD_LINK})
SELECT p.id, n.place, n.id, p.org_id, p.root_id, p.depth + 1, n.handler, n.key, n.occurrence, n.map
FROM n, p ORDER BY n.place
"""
# Of a `ChildRow`.
ROWS = Columns(
    (uuids, "id"),
    (texts, "handler"),
    (words, "isolation"),
    (uuids, "idempotency_key"),
    (texts, "params_json"),
    (flags, "held"),
    (numbers, "place"),
    (texts, "key"),
    (numbers, "occurrence"),
    (plain, "map"),
)


def put_children(connection: Connection, parent_id: RunId, rows: Sequence[ChildRow]) -> None:
    driver(connection).execute(PUT, (*ROWS.of(rows), parent_id, NEVER))
