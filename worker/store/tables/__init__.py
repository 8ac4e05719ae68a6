"""The tables, with named constraints; a column's meaning is its `doc`, and stands in the reference.

`runs` holds identity and outcome and is written twice, at fire and at finish: its
`state` is null until the run has ended and never changes after. `live_runs` holds
the unfinished runs only, narrow and hot. The view `run_view` joins both for
screens; `run_ends` finds those that have ended, by how and when. Hot tables carry no
foreign keys: one module writes them, and `doctor` checks that a live row exists
exactly for each run without a final state.
"""

from worker.store.tables.attempts import ATTEMPT_OUTCOMES, attempts, checkpoints, run_logs, skips
from worker.store.tables.columns import HOT, UPDATED, Id, Instant, json_type, metadata, one_of
from worker.store.tables.definitions import backfills, definition_revisions, definitions, schedule, templates
from worker.store.tables.history import (
    ALERT_KINDS,
    APPEND_ONLY,
    alert_strikes,
    alerts,
    audit,
    rollup_days,
    rollup_hours,
)
from worker.store.tables.live_runs import LIVE_STATES, WAITING_REASONS, live_runs
from worker.store.tables.orgs import FIND_CALLER, ORG_STATES, credentials, orgs
from worker.store.tables.runs import (
    ABSORBING,
    FINAL_STATES,
    ORIGINS,
    RUN_ENDS,
    RUN_QUERY,
    RUN_VIEW,
    run_ends,
    runs,
)
from worker.store.tables.workers import catalogue, facts, workers

__all__ = [
    "ABSORBING",
    "ALERT_KINDS",
    "APPEND_ONLY",
    "ATTEMPT_OUTCOMES",
    "FINAL_STATES",
    "FIND_CALLER",
    "HOT",
    "LIVE_STATES",
    "ORG_STATES",
    "ORIGINS",
    "RUN_ENDS",
    "RUN_QUERY",
    "RUN_VIEW",
    "UPDATED",
    "WAITING_REASONS",
    "Id",
    "Instant",
    "alert_strikes",
    "alerts",
    "attempts",
    "audit",
    "backfills",
    "catalogue",
    "checkpoints",
    "credentials",
    "definition_revisions",
    "definitions",
    "facts",
    "json_type",
    "live_runs",
    "metadata",
    "one_of",
    "orgs",
    "rollup_days",
    "rollup_hours",
    "run_ends",
    "run_logs",
    "runs",
    "schedule",
    "skips",
    "templates",
    "workers",
]
