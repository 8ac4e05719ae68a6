-- Ids of runs begin with the time at which they were due: see `ids.new_id_at`. Ends after the first that wait.
SELECT l.org_id FROM (
  SELECT org_id, state, available_at, handler, isolation, pool FROM live_runs
  ORDER BY id DESC LIMIT %(window)s) l
WHERE l.state = 'waiting' AND l.available_at <= (SELECT clock_timestamp())
  AND l.handler = ANY(%(handlers)s::text[]) AND l.isolation = ANY(%(isolations)s::text[])
  AND l.pool = ANY(%(pools)s::text[])
LIMIT %(runs)s
