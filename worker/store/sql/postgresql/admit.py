"""Admit: waiting runs become running, in order of fair share and within every limit."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection

from worker.ids import OrgId, WorkerId
from worker.runs.run import AdmittedRun, Isolation
from worker.store.dialect import compact_json, driver
from worker.store.sql.contract import PER_ORG, WINDOW, OrgQueue, RingStep, distinct, reach
from worker.store.sql.postgresql.arrays import plain, texts

OWNER = """
owner(id) AS (
  (SELECT worker_id FROM live_runs WHERE worker_id IS NOT NULL ORDER BY worker_id LIMIT 1)
  UNION ALL
  SELECT (SELECT l.worker_id FROM live_runs l WHERE l.worker_id > owner.id
          ORDER BY l.worker_id LIMIT 1)
  FROM owner WHERE owner.id IS NOT NULL)
"""


# The key of the advisory lock that makes its holder the only admitter of this database.
ADMISSION_LOCK = 6_070_312

# Walks from org to org along the index, full circle at most. Orgs that cannot start anything are left
# out here. Mostly the first run of a queue, which finds its org, shows that it can.
HOPS = """\
hop(org_id, available_at, handler, isolation, pool, n, wrapped) AS (
  SELECT %(cursor)s::uuid, NULL::timestamptz, NULL::text, NULL::text, NULL::text, 0, false
  UNION ALL
  SELECT COALESCE(later.org_id, first.org_id), COALESCE(later.available_at, first.available_at),
         COALESCE(later.handler, first.handler), COALESCE(later.isolation, first.isolation),
         COALESCE(later.pool, first.pool), hop.n + 1, hop.wrapped OR later.org_id IS NULL
  FROM hop
  LEFT JOIN LATERAL (
    SELECT l.org_id, l.available_at, l.handler, l.isolation, l.pool
    FROM live_runs l WHERE l.state = 'waiting' AND l.org_id > hop.org_id
    ORDER BY l.org_id LIMIT 1) later ON true
  LEFT JOIN LATERAL (
    SELECT l.org_id, l.available_at, l.handler, l.isolation, l.pool
    FROM live_runs l WHERE l.state = 'waiting' AND later.org_id IS NULL AND NOT hop.wrapped
    ORDER BY l.org_id LIMIT 1) first ON true
  WHERE hop.n < %(hops)s
    AND CASE WHEN hop.wrapped OR later.org_id IS NULL
             THEN COALESCE(later.org_id, first.org_id) <= %(cursor)s::uuid ELSE true END
), ring AS MATERIALIZED (
  SELECT org_id, n, ready, running, most, weight FROM (
    SELECT hop.org_id, hop.n, o.running, o.most, o.weight, o.running < o.most AND (
      (hop.available_at <= (SELECT clock_timestamp())
       AND hop.handler = ANY(%(handlers)s::text[]) AND hop.isolation = ANY(%(isolations)s::text[])
       AND hop.pool = ANY(%(pools)s::text[]))
      OR EXISTS (
        SELECT 1 FROM live_runs l
        WHERE l.org_id = hop.org_id AND l.state = 'waiting' AND l.available_at <= (SELECT clock_timestamp())
          AND l.handler = ANY(%(handlers)s::text[]) AND l.isolation = ANY(%(isolations)s::text[])
          AND l.pool = ANY(%(pools)s::text[]))) AS ready
    FROM hop LEFT JOIN LATERAL (
      SELECT o.weight, o.max_concurrent_runs AS most, (
        SELECT count(*) FROM live_runs l WHERE l.org_id = o.id AND l.state = 'running') AS running
      FROM orgs o WHERE o.id = hop.org_id AND o.state = 'active' LIMIT 1) o ON true
    WHERE hop.n > 0) looked
  WHERE ready OR n = %(hops)s LIMIT %(want)s
)"""
RING = f"WITH RECURSIVE {HOPS} SELECT * FROM ring"

# Ids of runs begin with the time at which they were due: see `ids.new_id_at`. Ends after the first that wait.
NEWEST = """
SELECT l.org_id FROM (
  SELECT org_id, state, available_at, handler, isolation, pool FROM live_runs
  ORDER BY id DESC LIMIT %(window)s) l
WHERE l.state = 'waiting' AND l.available_at <= (SELECT clock_timestamp())
  AND l.handler = ANY(%(handlers)s::text[]) AND l.isolation = ANY(%(isolations)s::text[])
  AND l.pool = ANY(%(pools)s::text[])
LIMIT %(runs)s
"""

# The orgs to choose from: given, or found in the same statement. `reach`, how many runs of a queue to read,
# is then at least that of `contract.reach`: all of the ranks up to which long queues would fill the free
# slots.
COUNTED = """
SELECT o.weight, o.max_concurrent_runs AS most, (
  SELECT count(*) FROM live_runs l WHERE l.org_id = o.id AND l.state = 'running') AS running
FROM orgs o WHERE o.id = {org} AND o.state = 'active' LIMIT 1
"""
GIVEN = f"""\
u(id, later, reach, running, weight) AS (
  SELECT g.id, g.id <> ALL(%(first)s::uuid[]), LEAST(o.most - o.running, g.reach), o.running, o.weight
  FROM unnest(%(orgs)s::uuid[], %(reach)s::integer[]) AS g(id, reach)
  CROSS JOIN LATERAL ({COUNTED.format(org="g.id")}) o
)"""
FOUND = f"""\
{HOPS}, others(id, later, running, weight) AS MATERIALIZED (
  SELECT n.id, n.later, o.running, o.weight FROM (
    SELECT id, bool_and(later) AS later FROM (
      (SELECT org_id, false FROM (
         SELECT org_id, min(place) AS place FROM (
           SELECT n.org_id, row_number() OVER () AS place FROM ({NEWEST}) n) n GROUP BY org_id) n
       ORDER BY place LIMIT %(newest)s)
      UNION ALL
      SELECT id, true FROM unnest(%(passed)s::uuid[]) AS p(id)) AS n(id, later)
    GROUP BY id) n
  CROSS JOIN LATERAL ({COUNTED.format(org="n.id")}) o
  WHERE o.running < o.most
), u AS MATERIALIZED (
  SELECT COALESCE(r.org_id, n.id) AS id, COALESCE(n.later, true) AS later, COALESCE(r.reach, 1) AS reach,
         COALESCE(r.running, n.running) AS running, COALESCE(r.weight, n.weight) AS weight, r.n, r.room
  FROM (
    SELECT org_id, n, running, weight, most - running AS room, CASE WHEN %(whole)s THEN most - running ELSE
      LEAST(most - running, floor((%(slots)s + sum(running + 1) OVER ()) * weight::float8
                                  / sum(weight) OVER ()) - running)::bigint END AS reach
    FROM ring WHERE ready) r
  FULL JOIN others n ON n.id = r.org_id
)"""

LOCK = "SELECT pg_advisory_xact_lock(%s)"
COMMIT = "COMMIT"

# Most runs have no limit but that of their org; the others go through two more steps.
# A later statement than the lock, so with a snapshot in which everything that was
# admitted before it can be counted. How each count says "running", and the UPDATE
# "waiting", decides which index can serve it: see `tables.live_runs`.
ADMIT = f"""
{OWNER}, offer AS MATERIALIZED (
  SELECT h.handler, CASE WHEN h.most IS NOT NULL THEN h.most - (
    SELECT count(*) FROM owner o JOIN live_runs l ON l.worker_id = o.id
    WHERE l.handler = h.handler) - (
    SELECT count(*) FROM live_runs l
    WHERE l.state = 'parked' AND l.started_at IS NOT NULL AND l.handler = h.handler) END AS room
  FROM unnest(%(handlers)s::text[], %(limits)s::integer[]) AS h(handler, most)
), line AS MATERIALIZED (
  SELECT c.id, c.definition_id, c.handler, c.isolation, c.available_at, c.max_concurrent, c.place,
         (u.running + c.place)::float8 / u.weight AS rank, u.later
  FROM u CROSS JOIN LATERAL (
    SELECT l.id, l.definition_id, l.handler, l.isolation, l.available_at, l.max_concurrent,
           row_number() OVER () AS place
    FROM (
      SELECT l.id, l.definition_id, l.handler, l.isolation, l.available_at, l.max_concurrent
      FROM live_runs l
      WHERE l.org_id = u.id AND l.state = 'waiting' AND l.available_at <= (SELECT clock_timestamp())
        AND l.handler = ANY(ARRAY(SELECT handler FROM offer WHERE room IS NULL OR room > 0))
        AND l.isolation = ANY(%(isolations)s::text[]) AND l.pool = ANY(%(pools)s::text[])
        AND (l.variant_handlers IS NULL OR l.variant_handlers <@ %(offered)s::jsonb)
        AND (l.max_concurrent IS NULL OR l.max_concurrent > (
          SELECT count(*) FROM live_runs d
          WHERE d.definition_id = l.definition_id AND d.started_at IS NOT NULL))
      ORDER BY l.priority DESC, l.available_at, l.id
      LIMIT GREATEST(0, u.reach)
    ) l
  ) c
  WHERE EXISTS (SELECT 1 FROM workers w WHERE w.id = %(worker)s::uuid AND w.ended_at IS NULL
                AND w.lease_until > (SELECT clock_timestamp()))
), within_definition AS (
  SELECT id, handler, isolation, available_at, rank, later
  FROM line WHERE max_concurrent IS NULL AND handler = ANY(ARRAY(SELECT handler FROM offer WHERE room > 0))
  UNION ALL
  SELECT id, handler, isolation, available_at, rank, later FROM (
    SELECT l.*, row_number() OVER (PARTITION BY definition_id ORDER BY place) AS nth
    FROM line l WHERE max_concurrent IS NOT NULL) l
  WHERE nth <= max_concurrent - (
    SELECT count(*) FROM live_runs d WHERE d.definition_id = l.definition_id AND d.started_at IS NOT NULL)
), within_limits AS (
  SELECT id, isolation, available_at, rank, later
  FROM line WHERE max_concurrent IS NULL AND handler <> ALL(ARRAY(SELECT handler FROM offer WHERE room > 0))
  UNION ALL
  SELECT id, isolation, available_at, rank, later FROM (
    SELECT w.*, o.room, row_number() OVER (
      PARTITION BY w.handler ORDER BY w.rank, w.later, w.available_at, w.id) AS nth
    FROM within_definition w JOIN offer o ON o.handler = w.handler) w
  WHERE (nth <= room) IS NOT FALSE
), picked AS MATERIALIZED (
  (SELECT id, rank, later FROM within_limits WHERE isolation = 'child'
   ORDER BY rank, later, available_at, id LIMIT %(child)s)
  UNION ALL
  (SELECT id, rank, later FROM within_limits WHERE isolation = 'inline'
   ORDER BY rank, later, available_at, id LIMIT %(inline)s)
), admitted AS (
  UPDATE live_runs SET state = 'running', reason = NULL, detail = NULL, worker_id = %(worker)s::uuid,
                       started_at = clock_timestamp(), attempt = attempt + 1,
                       fencing_token = fencing_token + 1
  WHERE id = ANY(ARRAY(SELECT id FROM picked)) AND state NOT IN ('running', 'held', 'parked')
  RETURNING id, org_id, definition_id, revision, handler, isolation, origin, scheduled_for, available_at,
            start_by, started_at, attempt, failures, recoveries, fencing_token, idempotency_key, params,
            pool
)
"""
# A full join is never a nested loop; a join would be one if the statistics are of a moment without runs. What
# was picked and not admitted, because it has ended meanwhile, comes as a row of nulls.
ORDER = "ORDER BY p.rank, p.later, a.available_at, a.id"
CHOOSE = f"""
WITH RECURSIVE {GIVEN}, {ADMIT}
SELECT a.* FROM admitted a FULL JOIN picked p ON p.id = a.id {ORDER}
"""


def _hidden(statement: str) -> str:
    """Each parameter in a subquery, so that its value cannot change the plan.

    PostgreSQL then plans once for all calls. It would plan each of them, for a fifth of what it costs to
    admit a few hundred runs.
    """
    return re.sub(r"%\(\w+\)s((?:::[a-z]+(?:\[\])?)?)", r"(SELECT \g<0>)\1", statement)


# The first row names the orgs whose turn it was while the newest went first.
CROWD = _hidden(f"""
WITH RECURSIVE {FOUND}, {ADMIT}
SELECT w.*, CASE WHEN row_number() OVER ({ORDER}) = 1 THEN ARRAY(
         SELECT u.id FROM u WHERE u.later AND (u.id IN (SELECT org_id FROM admitted)) IS NOT TRUE
         ORDER BY u.n NULLS FIRST LIMIT (SELECT count(*) FROM others WHERE NOT later)) END, a.*
FROM (
  SELECT count(*), max(n), (SELECT bool_or(reach < room) FROM u),
         (SELECT org_id FROM ring ORDER BY n DESC LIMIT 1)
  FROM ring) w
LEFT JOIN (admitted a FULL JOIN picked p ON p.id = a.id) ON true {ORDER}
""")


# For a worker that only places runs: no more than the free slots of the pool's hosts, which every run counts
# against that is placed there or runs there.
ROOM = """
LIMIT GREATEST(0, LEAST(%({isolation})s, (
  SELECT COALESCE(sum((w.capacity->>'{slots}')::integer), 0) FROM workers w
  WHERE w.host_id IS NOT NULL AND w.ended_at IS NULL AND w.lease_until > (SELECT clock_timestamp())
    AND w.pools @> %(pool)s::jsonb) - (
  SELECT count(*) FROM owner o JOIN live_runs l ON l.worker_id = o.id
  WHERE l.isolation = '{isolation}' AND l.pool = ANY(%(pools)s::text[]))))"""
PLACE = CHOOSE
for _isolation, _slots in (("child", "children"), ("inline", "inline")):
    _limit = ROOM.format(isolation=_isolation, slots=_slots).strip()
    PLACE = PLACE.replace(f"LIMIT %({_isolation})s", _limit)


def admit_ring(
    connection: Connection,
    cursor: OrgId,
    *,
    want: int,
    hops: int,
    handlers: Sequence[str],
    pools: Sequence[str],
    free: Mapping[Isolation, int],
    newest: int = 0,
) -> RingStep:
    raw = driver(connection)
    runnable = {
        "handlers": texts(handlers),
        "isolations": plain(isolation for isolation, slots in free.items() if slots > 0),
        "pools": texts(pools),
    }
    walk = runnable | {"cursor": cursor, "want": want, "hops": hops}
    found: list[OrgId] = []
    if newest:
        with raw.pipeline():
            walked = raw.execute(RING, walk)
            last = raw.execute(NEWEST, runnable | {"window": WINDOW, "runs": newest * PER_ORG})
            rows = walked.fetchall()
            found = distinct((org_id for (org_id,) in last), newest)
    else:
        rows = raw.execute(RING, walk).fetchall()
    if not rows:
        return RingStep({}, partial=False, cursor=cursor, hops=0, complete=True)
    ready = [row for row in rows if row[2]]
    queues = [OrgQueue(*row[3:]) for row in ready]
    reaches = reach(queues, sum(free.values()))
    place, passed = rows[-1][:2]
    return RingStep(
        dict(zip((row[0] for row in ready), reaches, strict=True)),
        partial=any(n < queue.room for n, queue in zip(reaches, queues, strict=True)),
        cursor=place,
        hops=passed,
        complete=len(rows) < want and passed < hops,
        newest=found,
    )


def admit_choose(
    connection: Connection,
    worker_id: WorkerId,
    orgs: Mapping[OrgId, int],
    *,
    offered: Mapping[str, int | None],
    pools: Sequence[str],
    free: Mapping[Isolation, int],
    first: Collection[OrgId] = (),
    placing: bool = False,
) -> list[AdmittedRun]:
    values = _to_admit(worker_id, offered, pools, free)
    values |= {"orgs": plain(orgs), "reach": plain(orgs.values()), "first": plain(first)}
    if placing:
        values["pool"] = compact_json(list(pools))
    rows = _locked(connection, PLACE if placing else CHOOSE, values)
    return [AdmittedRun(*row) for row in rows if row[0] is not None]


def admit_crowd(
    connection: Connection,
    worker_id: WorkerId,
    cursor: OrgId,
    *,
    want: int,
    hops: int,
    offered: Mapping[str, int | None],
    pools: Sequence[str],
    free: Mapping[Isolation, int],
    newest: int = 0,
    passed: Collection[OrgId] = (),
    whole: bool = False,
) -> tuple[RingStep, list[AdmittedRun]]:
    values = _to_admit(worker_id, offered, pools, free)
    values |= {"cursor": cursor, "want": want, "hops": hops, "slots": sum(free.values()), "whole": whole}
    values |= {"passed": plain(passed), "newest": newest, "runs": newest * PER_ORG, "window": WINDOW}
    rows = _locked(connection, CROWD, values)
    found, walked, partial, place, in_turn = rows[0][:5]
    step = RingStep(
        dict.fromkeys(in_turn, 1),
        partial=bool(partial),
        cursor=place or cursor,
        hops=walked or 0,
        complete=found < want and (walked or 0) < hops,
    )
    return step, [AdmittedRun(*row[5:]) for row in rows if row[5] is not None]


def _to_admit(
    worker_id: WorkerId,
    offered: Mapping[str, int | None],
    pools: Sequence[str],
    free: Mapping[Isolation, int],
) -> dict[str, Any]:
    return {
        "worker": worker_id,
        "handlers": texts(offered),
        "limits": plain(offered.values()),
        "offered": compact_json(list(offered)),
        "isolations": plain(isolation for isolation, slots in free.items() if slots > 0),
        "pools": texts(pools),
        "child": max(0, free.get("child", 0)),
        "inline": max(0, free.get("inline", 0)),
    }


def _locked(connection: Connection, statement: str, values: Mapping[str, Any]) -> list[Any]:
    """The rows of a statement under the lock of admission; the transaction ends here."""
    raw = driver(connection)
    # With COMMIT in the same pipeline: a worker that hangs must not keep the lock.
    with raw.pipeline():
        raw.execute(LOCK, (ADMISSION_LOCK,))
        answer = raw.execute(statement, values)
        raw.execute(COMMIT, prepare=False)
    rows: list[Any] = answer.fetchall()
    return rows
