"""The watch over definitions that pause after failures: what it lets the chore count, and what it leaves."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.engine.runs import admitted, ended
from worker.engine.attempt.inflight import InflightRun
from worker.engine.attempt.plan import AttemptPlan
from worker.engine.loops.maintenance import FailureWatch
from worker.engine.runners.contract import StopSignal
from worker.ids import DefinitionId, OrgId
from worker.model.definitions.definition import Definition
from worker.model.orgs import OrgRef
from worker.model.runs.run import Recovered


def held(pause_after: int | None = 3, **fields: Any) -> InflightRun:
    run = admitted(**fields)
    definition = Definition("org_acme", "digest", "acme.digest", "@hourly", pause_after_failures=pause_after)
    return InflightRun(
        run, StopSignal(), AttemptPlan(definition, OrgRef(run.org_id, "org_acme"), "Acme", "main", ())
    )


@pytest.fixture
def watch() -> FailureWatch:
    return FailureWatch()


@pytest.mark.parametrize("state", ["succeeded", "failed", "refused"])
def test_an_end_that_tells_is_counted_once(watch: FailureWatch, state: str) -> None:
    run = held()
    watch.ended(ended(state=state), run)
    watch.ended(ended(state=state), run)

    assert watch.take() == [(run.run.org_id, run.run.definition_id)]
    assert watch.take() == []


def test_a_definition_that_does_not_ask_costs_nothing(watch: FailureWatch) -> None:
    run = held(pause_after=None)
    watch.ended(ended(state="failed"), run)
    watch.ended(ended(state="failed"), None)

    assert watch.take() == []


@pytest.mark.parametrize("state", ["waiting", "cancelled", "skipped"])
def test_an_end_that_tells_nothing_is_left(watch: FailureWatch, state: str) -> None:
    run = held()
    watch.ended(ended(state=state), run)

    assert watch.take() == []


def test_runs_of_a_backfill_are_left(watch: FailureWatch) -> None:
    run = held(origin="backfill")
    watch.ended(ended(state="failed"), run)

    assert watch.take() == []


def test_a_success_after_a_success_is_left_until_it_is_forgotten(watch: FailureWatch) -> None:
    run = held()
    key = (run.run.org_id, run.run.definition_id)
    watch.counted(key, 0)

    watch.ended(ended(state="succeeded"), run)
    assert watch.take() == []

    watch.forget_sound()
    watch.ended(ended(state="succeeded"), run)
    assert watch.take() == [key]

    watch.counted(key, 0)
    watch.ended(ended(state="failed"), run)
    watch.counted(key, 1)
    watch.ended(ended(state="succeeded"), run)
    assert watch.take() == [key]


def test_a_run_lost_too_often_is_counted(watch: FailureWatch) -> None:
    run = held().run
    lost = Recovered(run.id, OrgId("o"), DefinitionId("d"), "org_a", "d", 4, "w", "failed")
    again = Recovered(run.id, OrgId("o"), DefinitionId("e"), "org_a", "e", 2, "w", "waiting")

    watch.recovered([lost, again])

    assert watch.take() == [("o", "d")]


def test_what_could_not_be_counted_is_remembered(watch: FailureWatch) -> None:
    key = (OrgId("o"), DefinitionId("d"))
    watch.put_back([key])

    assert watch.take() == [key]
