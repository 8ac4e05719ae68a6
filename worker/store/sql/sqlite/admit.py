"""Admit: waiting runs become running ones, fair over held slots and within every limit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime

from sqlalchemy import Connection

from worker.clock import from_text, to_text
from worker.ids import OrgId, WorkerId
from worker.runs.run import AdmittedRun, Isolation
from worker.store.connection import driver, file_now
from worker.store.sql import RingStep
from worker.store.sql.level import Line
from worker.store.sql.sqlite.lines import ID, Candidate, Limits, Lines, best
from worker.store.sql.sqlite.values import in_one_answer, in_one_step, json_list, json_value

# Each of these answers in one row, whatever it has found: see `values`.
RING = """
WITH RECURSIVE hop(org_id, n) AS (
  SELECT (SELECT org_id FROM live_runs WHERE state = 'waiting' AND org_id > ? ORDER BY org_id LIMIT 1), 1
  UNION ALL
  SELECT (SELECT l.org_id FROM live_runs l
          WHERE l.state = 'waiting' AND l.org_id > hop.org_id ORDER BY l.org_id LIMIT 1), hop.n + 1
  FROM hop WHERE hop.org_id IS NOT NULL AND hop.n < ?
)
SELECT json_group_array(org_id) FROM hop WHERE org_id IS NOT NULL
"""

COUNTS = """
SELECT EXISTS (SELECT 1 FROM workers WHERE id = ? AND ended_at IS NULL),
       (SELECT json_group_object(h.value, (SELECT count(*) FROM live_runs l
                                           WHERE l.state = 'running' AND l.handler = h.value))
        FROM json_each(?) h),
       (SELECT json_group_array(json_array(o.id, (SELECT count(*) FROM live_runs l
                                                  WHERE l.org_id = o.id AND l.state = 'running'),
                                           o.max_concurrent_runs, o.weight))
        FROM json_each(?) e CROSS JOIN orgs o ON o.id = e.value AND o.state = 'active')
"""

ADMIT = """
UPDATE live_runs SET state = 'running', reason = NULL, detail = NULL, worker_id = ?, started_at = ?,
                     attempt = attempt + 1, fencing_token = fencing_token + 1
WHERE id IN {rows} AND state = 'waiting'
"""


def admit_ring(
    connection: Connection,
    cursor: OrgId,
    *,
    want: int,
    hops: int,
    handlers: Sequence[str],
    free: Mapping[Isolation, int],
) -> RingStep:
    # What the orgs found can start is looked at when they are chosen from: here a hop
    # costs less than a second look, and there is no other admitter to be kept waiting.
    rows = driver(connection).cursor()
    most = min(want, hops)
    orgs = in_one_answer(rows, RING, (cursor, most))
    complete = False
    if len(orgs) < most:
        round_ = in_one_answer(rows, RING, ("", most - len(orgs)))
        before = [org_id for org_id in round_ if org_id <= cursor]
        complete = len(before) < len(round_) or len(orgs) + len(before) < most
        orgs += before
    return RingStep(
        dict.fromkeys(orgs, sum(free.values())),
        partial=False,
        cursor=orgs[-1] if orgs else cursor,
        hops=len(orgs),
        complete=complete,
    )


def admit_choose(
    connection: Connection,
    worker_id: WorkerId,
    orgs: Mapping[OrgId, int],
    *,
    offered: Mapping[str, int | None],
    free: Mapping[Isolation, int],
) -> list[AdmittedRun]:
    cursor = driver(connection).cursor()
    limited = [name for name, most in offered.items() if most is not None]
    registered, of_handlers, of_orgs = cursor.execute(
        COUNTS, (worker_id, json_list(limited), json_list(orgs))
    ).fetchone()
    if not registered:
        return []
    now = file_now(connection)
    limits = Limits(cursor, offered, json.loads(of_handlers), free)
    if not limits.handlers:
        return []
    lines = Lines(cursor, limits, offered, to_text(now))
    counted = [(org_id, Line(*counts)) for org_id, *counts in json.loads(of_orgs)]
    picked = best(lines, counted, limits)
    in_one_step(cursor, ADMIT, [(run[ID],) for run in picked], first=(worker_id, to_text(now)))
    return [_admitted(run, now) for run in picked]


def _admitted(run: Candidate, now: datetime) -> AdmittedRun:
    (
        id_,
        org_id,
        definition_id,
        revision,
        handler,
        isolation,
        origin,
        scheduled_for,
        available_at,
        start_by,
        attempt,
        failures,
        recoveries,
        fencing_token,
        idempotency_key,
        params,
        _,
    ) = run
    return AdmittedRun(
        id_,
        org_id,
        definition_id,
        revision,
        handler,
        isolation,
        origin,
        from_text(scheduled_for),
        from_text(available_at),
        None if start_by is None else from_text(start_by),
        now,
        attempt + 1,
        failures,
        recoveries,
        fencing_token + 1,
        idempotency_key,
        json_value(params),
    )
