-- choose.sql for orgs that it finds itself, as ring.sql and newest.sql do. `reach`, how many runs of a queue
-- to read, is then at least that of `contract.reach`: all of the ranks up to which long queues would fill the
-- free slots. The first row names the orgs whose turn it was while the newest went first. Each parameter is
-- in a subquery, so that its value cannot change the plan: PostgreSQL then plans once for all calls. It would
-- plan each of them, for a fifth of what it costs to admit a few hundred runs.
WITH RECURSIVE hop(org_id, available_at, handler, isolation, pool, n, wrapped) AS (
  SELECT (SELECT %(cursor)s::uuid)::uuid, NULL::timestamptz, NULL::text, NULL::text, NULL::text, 0, false
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
  WHERE hop.n < (SELECT %(hops)s)
    AND CASE WHEN hop.wrapped OR later.org_id IS NULL
             THEN COALESCE(later.org_id, first.org_id) <= (SELECT %(cursor)s::uuid)::uuid ELSE true END
), ring AS MATERIALIZED (
  SELECT org_id, n, ready, running, most, weight FROM (
    SELECT hop.org_id, hop.n, o.running, o.most, o.weight, o.running < o.most AND (
      (hop.available_at <= (SELECT clock_timestamp())
       AND hop.handler = ANY((SELECT %(handlers)s::text[])::text[])
       AND hop.isolation = ANY((SELECT %(isolations)s::text[])::text[])
       AND hop.pool = ANY((SELECT %(pools)s::text[])::text[]))
      OR EXISTS (
        SELECT 1 FROM live_runs l
        WHERE l.org_id = hop.org_id AND l.state = 'waiting' AND l.available_at <= (SELECT clock_timestamp())
          AND l.handler = ANY((SELECT %(handlers)s::text[])::text[])
          AND l.isolation = ANY((SELECT %(isolations)s::text[])::text[])
          AND l.pool = ANY((SELECT %(pools)s::text[])::text[]))) AS ready
    FROM hop LEFT JOIN LATERAL (
      SELECT o.weight, o.max_concurrent_runs AS most, (
        SELECT count(*) FROM live_runs l WHERE l.org_id = o.id AND l.state = 'running') AS running
      FROM orgs o WHERE o.id = hop.org_id AND o.state = 'active' LIMIT 1) o ON true
    WHERE hop.n > 0) looked
  WHERE ready OR n = (SELECT %(hops)s) LIMIT (SELECT %(want)s)
), others(id, later, running, weight) AS MATERIALIZED (
  SELECT n.id, n.later, o.running, o.weight FROM (
    SELECT id, bool_and(later) AS later FROM (
      (SELECT org_id, false FROM (
         SELECT org_id, min(place) AS place FROM (
           SELECT n.org_id, row_number() OVER () AS place FROM (
             SELECT l.org_id FROM (
               SELECT org_id, state, available_at, handler, isolation, pool FROM live_runs
               ORDER BY id DESC LIMIT (SELECT %(window)s)) l
             WHERE l.state = 'waiting' AND l.available_at <= (SELECT clock_timestamp())
               AND l.handler = ANY((SELECT %(handlers)s::text[])::text[])
               AND l.isolation = ANY((SELECT %(isolations)s::text[])::text[])
               AND l.pool = ANY((SELECT %(pools)s::text[])::text[])
             LIMIT (SELECT %(runs)s)) n) n
         GROUP BY org_id) n
       ORDER BY place LIMIT (SELECT %(newest)s))
      UNION ALL
      SELECT id, true FROM unnest((SELECT %(passed)s::uuid[])::uuid[]) AS p(id)) AS n(id, later)
    GROUP BY id) n
  CROSS JOIN LATERAL (
    SELECT o.weight, o.max_concurrent_runs AS most, (
      SELECT count(*) FROM live_runs l WHERE l.org_id = o.id AND l.state = 'running') AS running
    FROM orgs o WHERE o.id = n.id AND o.state = 'active' LIMIT 1) o
  WHERE o.running < o.most
), u AS MATERIALIZED (
  SELECT COALESCE(r.org_id, n.id) AS id, COALESCE(n.later, true) AS later, COALESCE(r.reach, 1) AS reach,
         COALESCE(r.running, n.running) AS running, COALESCE(r.weight, n.weight) AS weight, r.n, r.room
  FROM (
    SELECT org_id, n, running, weight, most - running AS room,
      CASE WHEN (SELECT %(whole)s) THEN most - running ELSE
      LEAST(most - running, floor(((SELECT %(slots)s) + sum(running + 1) OVER ()) * weight::float8
                                  / sum(weight) OVER ()) - running)::bigint END AS reach
    FROM ring WHERE ready) r
  FULL JOIN others n ON n.id = r.org_id
), owner(id) AS (
  (SELECT worker_id FROM live_runs WHERE worker_id IS NOT NULL ORDER BY worker_id LIMIT 1)
  UNION ALL
  SELECT (SELECT l.worker_id FROM live_runs l WHERE l.worker_id > owner.id
          ORDER BY l.worker_id LIMIT 1)
  FROM owner WHERE owner.id IS NOT NULL
), offer AS MATERIALIZED (
  SELECT h.handler, CASE WHEN h.most IS NOT NULL THEN h.most - (
    SELECT count(*) FROM owner o JOIN live_runs l ON l.worker_id = o.id
    WHERE l.handler = h.handler) - (
    SELECT count(*) FROM live_runs l
    WHERE l.state = 'parked' AND l.started_at IS NOT NULL AND l.handler = h.handler) END AS room
  FROM unnest((SELECT %(handlers)s::text[])::text[], (SELECT %(limits)s::integer[])::integer[])
    AS h(handler, most)
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
        AND l.isolation = ANY((SELECT %(isolations)s::text[])::text[])
        AND l.pool = ANY((SELECT %(pools)s::text[])::text[])
        AND (l.variant_handlers IS NULL OR l.variant_handlers <@ (SELECT %(offered)s::jsonb)::jsonb)
        AND (l.max_concurrent IS NULL OR l.max_concurrent > (
          SELECT count(*) FROM live_runs d
          WHERE d.definition_id = l.definition_id AND d.started_at IS NOT NULL))
      ORDER BY l.priority DESC, l.available_at, l.id
      LIMIT GREATEST(0, u.reach)
    ) l
  ) c
  WHERE EXISTS (SELECT 1 FROM workers w WHERE w.id = (SELECT %(worker)s::uuid)::uuid AND w.ended_at IS NULL
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
   ORDER BY rank, later, available_at, id LIMIT (SELECT %(child)s))
  UNION ALL
  (SELECT id, rank, later FROM within_limits WHERE isolation = 'inline'
   ORDER BY rank, later, available_at, id LIMIT (SELECT %(inline)s))
), admitted AS (
  UPDATE live_runs SET state = 'running', reason = NULL, detail = NULL,
                       worker_id = (SELECT %(worker)s::uuid)::uuid,
                       started_at = clock_timestamp(), attempt = attempt + 1,
                       fencing_token = fencing_token + 1
  WHERE id = ANY(ARRAY(SELECT id FROM picked)) AND state NOT IN ('running', 'held', 'parked')
  RETURNING id, org_id, definition_id, revision, handler, isolation, origin, scheduled_for, available_at,
            start_by, started_at, attempt, failures, recoveries, fencing_token, idempotency_key, params,
            pool
)
SELECT w.*, CASE WHEN row_number() OVER (ORDER BY p.rank, p.later, a.available_at, a.id) = 1 THEN ARRAY(
         SELECT u.id FROM u WHERE u.later AND (u.id IN (SELECT org_id FROM admitted)) IS NOT TRUE
         ORDER BY u.n NULLS FIRST LIMIT (SELECT count(*) FROM others WHERE NOT later)) END, a.*
FROM (
  SELECT count(*), max(n), (SELECT bool_or(reach < room) FROM u),
         (SELECT org_id FROM ring ORDER BY n DESC LIMIT 1)
  FROM ring) w
LEFT JOIN (admitted a FULL JOIN picked p ON p.id = a.id) ON true
ORDER BY p.rank, p.later, a.available_at, a.id
