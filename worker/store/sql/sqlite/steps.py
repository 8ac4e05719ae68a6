"""Steps: store the results of a batch of steps, each fenced."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection

from worker.clock import to_text
from worker.ids import RunId
from worker.runs.run import RunStep
from worker.store.dialect import driver
from worker.store.sql.contract import in_order
from worker.store.sql.sqlite.values import Rows, in_one_answer, in_one_step, json_list

# One row for the whole batch: see `values`.
OURS = """
SELECT json_group_array(json_array(l.id, l.fencing_token, l.recoveries))
FROM json_each(?) e CROSS JOIN live_runs l ON l.id = e.value
WHERE l.state = 'running'
"""

MOVED = "UPDATE live_runs SET recoveries = 0 WHERE id IN {rows}"

# A step that is stored already was stored by this attempt: places are not used twice.
STORE = """
INSERT OR IGNORE INTO steps (run_id, org_id, fencing_token, attempt, handler, seq, name, key, occurrence,
                             started_at, ended_at, size, result)
SELECT * FROM {rows} WHERE column1 IS NOT NULL
"""


# Of a `RunStep`.
STEPS = Rows(
    (None, "run.id run.org_id run.fencing_token run.attempt handler"),
    (None, "step.seq step.name step.key step.occurrence"),
    (to_text, "step.started_at step.ended_at"),
    (None, "size step.result_json"),
)


def store_steps(
    connection: Connection, steps: Sequence[RunStep], *, commit: bool = True
) -> set[tuple[RunId, int]]:
    cursor = driver(connection).cursor()
    rows = in_one_answer(cursor, OURS, (json_list({step.run.id for step in steps}),))
    locked = {(RunId(id_), token): recoveries for id_, token, recoveries in rows}
    mine = [step for step in in_order(steps) if (step.run.id, step.run.fencing_token) in locked]
    moved = {step.run.id for step in mine if locked[step.run.id, step.run.fencing_token] > 0}
    in_one_step(cursor, MOVED, [(id_,) for id_ in sorted(moved)])
    in_one_step(cursor, STORE, STEPS.of(mine))
    return set(locked)
