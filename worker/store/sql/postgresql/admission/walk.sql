-- Walks from org to org along the index, full circle at most. Orgs that cannot start anything are left out
-- here. Mostly the first run of a queue, which finds its org, shows that it can.
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
)
