-- Most runs have no limit but that of their org; the others go through two more steps. How each count says
-- "running", and the UPDATE "waiting", decides which index can serve it: see `tables.live_runs`. A full join
-- is never a nested loop; a join would be one if the statistics are of a moment without runs. What was
-- picked and not admitted, because it has ended meanwhile, comes as a row of nulls.
owner(id) AS (
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
            pool, parent_id
)
