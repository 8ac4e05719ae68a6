"""Runs and ends for the tests of the loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.fakes.clock import START, ManualClock
from worker.engine.attempt.inflight import InflightRuns
from worker.engine.attempt.plan import HandlerRegistry
from worker.engine.loops.admission import Admission
from worker.ids import DefinitionId, OrgId, RunId
from worker.model.runs.outcome import EndedAttempt, Trail
from worker.model.runs.run import AdmittedRun


def admitted(name: str = "r1", *, fencing_token: int = 1, **changes: Any) -> AdmittedRun:
    """A run of definition d1 of org o1, admitted just now."""
    values: dict[str, Any] = {
        "id": RunId(name),
        "org_id": OrgId("o1"),
        "definition_id": DefinitionId("d1"),
        "revision": 1,
        "handler": "acme.digest",
        "isolation": "child",
        "origin": "schedule",
        "scheduled_for": START,
        "available_at": START,
        "start_by": None,
        "started_at": START,
        "attempt": 1,
        "failures": 0,
        "recoveries": 0,
        "fencing_token": fencing_token,
        "idempotency_key": name,
        "params": None,
    }
    return AdmittedRun(**(values | changes))


def ended(name: str = "r1", *, fencing_token: int = 1, **changes: Any) -> EndedAttempt:
    """The end of that run, succeeded."""
    values: dict[str, Any] = {
        "run_id": RunId(name),
        "org_id": OrgId("o1"),
        "definition_id": DefinitionId("d1"),
        "fencing_token": fencing_token,
        "attempt": 1,
        "started_at": START,
        "ended_at": START,
        "outcome": "succeeded",
        "state": "succeeded",
        "reason": None,
        "trail": Trail("acme.digest"),
    }
    return EndedAttempt(**(values | changes))


def admission(store: Any, inflight_runs: InflightRuns, clock: ManualClock, **changes: Any) -> Admission:
    """An admission that adds to `inflight_runs` what it admits."""

    def start(runs: Sequence[AdmittedRun]) -> None:
        for run in runs:
            inflight_runs.add(run)

    values: dict[str, Any] = {"poll": 60.0, "start": start, "on_taking": lambda: None}
    return Admission(store, inflight_runs, HandlerRegistry(), clock, **(values | changes))
