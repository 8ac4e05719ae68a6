"""Steps of a handler in a process of its own: what crosses the channel, and what the worker refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.fakes.running import RecordingServices, work
from worker.execution.runners.child.pool import ChildPool
from worker.execution.runners.contract import StopSignal
from worker.handlers.steps import StepError
from worker.runs.outcome import Failed, Succeeded
from worker.runs.run import NewStep

pytestmark = pytest.mark.anyio


async def run(children: ChildPool, services: RecordingServices, handler: str, **fields: Any) -> Any:
    outcome = await children.run(work(handler, **fields), services, StopSignal())
    assert isinstance(outcome, Succeeded), outcome
    return json.loads(outcome.result or "null")


@pytest.mark.parametrize("handler", ["stepwise", "stepwise_blocking"])
async def test_results_are_stored_and_replayed_over_the_channel(children: ChildPool, handler: str) -> None:
    services = RecordingServices()
    first = await run(children, services, handler)

    again = await run(children, services, handler, attempt=2, replays=True)

    assert again == first
    assert first[0] == {"answer": "[masked]", "attempt": 1}
    assert first[-3:] == [{"answer": letter, "attempt": 1} for letter in "abc"]
    assert sorted(step.seq for step in services.steps) == list(range(1, len(services.steps) + 1))
    assert {step.name for step in services.steps} - {"blocking"} == {"ask", "all"}


async def test_an_error_of_the_worker_reaches_the_handler(children: ChildPool) -> None:
    class Refusing(RecordingServices):
        async def store_step(self, step: NewStep) -> str:
            raise StepError(f"step {step.name}: no room")

    outcome = await children.run(work("step_refused"), Refusing(), StopSignal())

    assert isinstance(outcome, Failed)
    assert outcome.permanent
    assert outcome.error.type == "worker.handlers.steps.StepError"
    assert outcome.error.message == "step refused: no room"
