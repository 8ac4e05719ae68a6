"""The workers that have running runs, each once: a walk along the index by worker."""

OWNER = """
owner(id) AS (
  (SELECT worker_id FROM live_runs WHERE worker_id IS NOT NULL ORDER BY worker_id LIMIT 1)
  UNION ALL
  SELECT (SELECT l.worker_id FROM live_runs l WHERE l.worker_id > owner.id
          ORDER BY l.worker_id LIMIT 1)
  FROM owner WHERE owner.id IS NOT NULL)
"""
