"""No text of a run that is long is masked on the worker's loop, however it comes."""

from __future__ import annotations

import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.fakes.answering import Answering
from tests.fakes.clock import START, ManualClock
from tests.unit.engine.runs import admitted
from worker.engine.attempt.answers import Running
from worker.engine.attempt.inflight import InflightRun
from worker.engine.attempt.run_log import RunLogWriter, mask_trail, redacted
from worker.engine.attempt.tools import StoreActs, Tools
from worker.engine.runners.contract import StopSignal
from worker.handlers.calls import OpenWait, Progress, Save, StoreStep
from worker.model.runs.outcome import Error, Failed, Outcome, Succeeded, Trail
from worker.model.runs.run import NewStep
from worker.model.runs.waits import NewWait, WaitState
from worker.telemetry import mask_in_turn
from worker.telemetry.mask_in_turn import AT_ONCE
from worker.telemetry.masking import MASK, Masker

SECRET = 'cañary"5ecret\\value&with%more☃'
LONG = f"{SECRET} " * (AT_ONCE // len(SECRET) + 2)
JSON = json.dumps(LONG)
STEP = NewStep("s", None, 1, 1, JSON, START, START)


class Attempt:
    """An attempt that holds the secret; `store` records what is written of it."""

    def __init__(self, clock: ManualClock) -> None:
        pending = WaitState("answer", "pending")
        self.store = Answering({"save_checkpoint": True, "store_step": True, "open_wait": pending})
        self.inflight = InflightRun(admitted(), StopSignal())
        self.inflight.hold_secrets({"key": SECRET})
        self.run_log = RunLogWriter(cast(Any, self.store), clock)
        acts = StoreActs(cast(Tools, SimpleNamespace(store=self.store, steps=self.store)))
        self.services = Running(self.inflight, Trail("h"), acts, self.run_log, clock)

    async def end(self, outcome: Outcome) -> None:
        self.store.calls.append(("end", await redacted(outcome, self.inflight.run.org_id)))

    async def log(self, *texts: str) -> None:
        for text in texts:
            self.services.log("info", "stdout", text)
        await self.run_log.flush()


WAYS: dict[str, Callable[[Attempt], Awaitable[object]]] = {
    "checkpoint": lambda attempt: attempt.services.ask(Save(JSON)),
    "step": lambda attempt: attempt.services.ask(StoreStep(STEP)),
    "wait": lambda attempt: attempt.services.ask(OpenWait(NewWait("w", 1, "answer", ask_json=JSON))),
    "line": lambda attempt: attempt.log(LONG),
    "lines": lambda attempt: attempt.log(*[f"{SECRET} " * 30] * 20),
    "result": lambda attempt: attempt.end(Succeeded(JSON)),
    "error": lambda attempt: attempt.end(Failed(Error("E", LONG * 8, LONG * 8))),
}


@pytest.fixture
def on_loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many characters are masked at once on the loop."""
    sizes, loop, mask = list[int](), threading.get_ident(), Masker.mask

    def watched(self: Masker, text: str, org: Any) -> str:
        if threading.get_ident() == loop:
            sizes.append(len(text))
        return mask(self, text, org)

    monkeypatch.setattr(Masker, "mask", watched)
    yield sizes


@pytest.mark.parametrize("way", WAYS)
async def test_a_long_text_is_masked_off_the_loop(
    way: str, on_loop: list[int], clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = Attempt(clock)

    await WAYS[way](attempt)

    assert sum(on_loop) <= AT_ONCE
    assert MASK in str(attempt.store.calls)
    assert "5ecret" not in str(attempt.store.calls)
    on_loop.clear()
    with monkeypatch.context() as patched:  # the control
        patched.setattr(mask_in_turn, "AT_ONCE", 10_000_000)
        patched.setattr(mask_in_turn, "mask_each", mask_in_turn.Masking().each)
        patched.setattr("worker.engine.attempt.run_log.mask_each", mask_in_turn.Masking().each)
        await WAYS[way](Attempt(clock))
    assert sum(on_loop) > AT_ONCE


async def test_of_many_notes_only_the_last_is_masked(on_loop: list[int], clock: ManualClock) -> None:
    """The control is what each of them would cost: a run may send thousands in a second."""
    attempt = Attempt(clock)
    for number in range(501):
        attempt.services.tell(Progress(number, 500, f"{SECRET} {number}"))
    assert on_loop == []

    await attempt.run_log.flush()
    await mask_trail(attempt.services.trail, attempt.inflight.run.org_id)

    expected = {"done": 500, "total": 500, "note": f"{MASK} 500"}
    [(_, [(*_, written)])] = attempt.store.asked("write_progress")
    assert written == attempt.services.trail.progress == expected
    assert len(on_loop) == 2
