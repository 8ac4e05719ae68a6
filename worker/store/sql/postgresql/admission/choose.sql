-- Of orgs that were found before.
WITH RECURSIVE u(id, later, reach, running, weight) AS (
  SELECT g.id, g.id <> ALL(%(first)s::uuid[]), LEAST(o.most - o.running, g.reach), o.running, o.weight
  FROM unnest(%(orgs)s::uuid[], %(reach)s::integer[]) AS g(id, reach)
  CROSS JOIN LATERAL (
    SELECT o.weight, o.max_concurrent_runs AS most, (
      SELECT count(*) FROM live_runs l WHERE l.org_id = o.id AND l.state = 'running') AS running
    FROM orgs o WHERE o.id = g.id AND o.state = 'active' LIMIT 1) o
), {admitted}
SELECT a.* FROM admitted a FULL JOIN picked p ON p.id = a.id
ORDER BY p.rank, p.later, a.available_at, a.id
