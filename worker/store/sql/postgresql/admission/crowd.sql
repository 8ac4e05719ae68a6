-- Of orgs that it finds itself, as walk.sql and newest.sql do. `reach`, how many runs of a queue to read, is
-- then at least that of `contract.reach`: all of the ranks up to which long queues would fill the free slots.
-- The first row names the orgs whose turn it was while the newest went first.
WITH RECURSIVE {walk}, others(id, later, running, weight) AS MATERIALIZED (
  SELECT n.id, n.later, o.running, o.weight FROM (
    SELECT id, bool_and(later) AS later FROM (
      (SELECT org_id, false FROM (
         SELECT org_id, min(place) AS place FROM (
           SELECT n.org_id, row_number() OVER () AS place FROM (
{newest}) n) n
         GROUP BY org_id) n
       ORDER BY place LIMIT %(newest)s)
      UNION ALL
      SELECT id, true FROM unnest(%(passed)s::uuid[]) AS p(id)) AS n(id, later)
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
      CASE WHEN %(whole)s THEN most - running ELSE
      LEAST(most - running, floor((%(slots)s + sum(running + 1) OVER ()) * weight::float8
                                  / sum(weight) OVER ()) - running)::bigint END AS reach
    FROM ring WHERE ready) r
  FULL JOIN others n ON n.id = r.org_id
), {admitted}
SELECT w.*, CASE WHEN row_number() OVER (ORDER BY p.rank, p.later, a.available_at, a.id) = 1 THEN ARRAY(
         SELECT u.id FROM u WHERE u.later AND (u.id IN (SELECT org_id FROM admitted)) IS NOT TRUE
         ORDER BY u.n NULLS FIRST LIMIT (SELECT count(*) FROM others WHERE NOT later)) END, a.*
FROM (
  SELECT count(*), max(n), (SELECT bool_or(reach < room) FROM u),
         (SELECT org_id FROM ring ORDER BY n DESC LIMIT 1)
  FROM ring) w
LEFT JOIN (admitted a FULL JOIN picked p ON p.id = a.id) ON true
ORDER BY p.rank, p.later, a.available_at, a.id
