"""No text of a run that is long is masked on the worker's loop, however it comes."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.fakes.clock import START, ManualClock
from tests.unit.execution.runs import admitted
from worker.execution.attempts.answers import Running
from worker.execution.attempts.attempt import conclude
from worker.execution.attempts.inflight import InflightRun
from worker.execution.attempts.run_log import RunLogWriter
from worker.execution.attempts.tools import StoreActs, Tools
from worker.execution.runners.contract import StopSignal
from worker.handlers.calls import OpenWait, Progress, Save, StoreStep
from worker.handlers.steps import StepError
from worker.runs.outcome import Error, Failed, Outcome, Succeeded, Trail
from worker.runs.run import NewStep
from worker.runs.waits import NewWait, WaitState
from worker.telemetry import mask_in_turn
from worker.telemetry.mask_in_turn import AT_ONCE
from worker.telemetry.masking import MASK, Masker, masker

pytestmark = pytest.mark.anyio

SECRET = 'cañary"5ecret\\value&with%more☃'
LONG = f"{SECRET} " * (AT_ONCE // len(SECRET) + 2)
JSON = json.dumps(LONG)


class Store:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    async def save_checkpoint(self, run: Any, handler: str, text: str, number: int) -> bool:
        self.texts.append(text)
        return True

    async def store_step(self, row: Any) -> bool:
        self.texts.append(row.step.result_json)
        return True

    async def open_wait(self, run: Any, wait: NewWait) -> WaitState:
        self.texts.append(wait.ask_json or "")
        return cast(WaitState, SimpleNamespace(state="pending"))

    async def append_logs(self, rows: Any) -> None:
        self.texts += [row.text for row in rows]

    async def write_progress(self, rows: Any) -> None:
        self.texts += [progress["note"] for _, _, progress in rows]


class Attempt:
    def __init__(self, clock: ManualClock) -> None:
        self.store = Store()
        self.inflight = InflightRun(admitted(), StopSignal())
        self.inflight.hold_secrets({"key": SECRET})
        self.trail = Trail("h")
        self.run_log = RunLogWriter(self.store, clock)
        store, random = self.store, Random(1)
        names: dict[str, Any] = {"store": store, "steps": store, "handlers": {}}
        fake = SimpleNamespace(run_log=self.run_log, clock=clock, random=random, **names)
        self.tools = cast(Tools, fake)
        acts = StoreActs(self.tools)
        self.services = Running(self.inflight, self.trail, acts, self.run_log, clock)

    async def end(self, outcome: Outcome) -> None:
        ended = await conclude(self.inflight, outcome, self.trail, self.tools)
        self.store.texts += [text for text in (ended.result, ended.detail) if text]
        if ended.error is not None:
            self.store.texts += [ended.error["message"], ended.error["trace"]]

    async def log(self, *texts: str) -> None:
        for text in texts:
            self.services.log("info", "stdout", text)
        await self.run_log.flush()

    async def report(self, note: str) -> None:
        self.services.tell(Progress(1, None, note))
        await self.run_log.flush()


def step(text: str) -> NewStep:
    return NewStep("s", None, 1, 1, text, START, START)


WAYS: dict[str, Callable[[Attempt], Awaitable[object]]] = {
    "checkpoint": lambda attempt: attempt.services.ask(Save(JSON)),
    "step": lambda attempt: attempt.services.ask(StoreStep(step(JSON))),
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
    assert attempt.store.texts
    assert all(MASK in text and "cañary" not in text for text in attempt.store.texts)
    on_loop.clear()
    with monkeypatch.context() as patched:  # the control
        patched.setattr(mask_in_turn, "AT_ONCE", 10_000_000)
        patched.setattr(mask_in_turn, "mask_each", mask_in_turn.Masking().each)
        patched.setattr("worker.execution.attempts.run_log.mask_each", mask_in_turn.Masking().each)
        await WAYS[way](Attempt(clock))
    assert sum(on_loop) > AT_ONCE


async def test_of_many_notes_only_the_last_is_masked(on_loop: list[int], clock: ManualClock) -> None:
    """The control is what each of them would cost: a run may send thousands in a second."""
    attempt = Attempt(clock)
    for number in range(500):
        attempt.services.tell(Progress(number, 500, f"{SECRET} {number}"))
    assert on_loop == []

    await attempt.report(f"{SECRET} 500")
    await attempt.end(Succeeded(None))

    assert attempt.store.texts == [f"{MASK} 500"]
    assert attempt.trail.progress == {"done": 1, "total": None, "note": f"{MASK} 500"}
    assert len(on_loop) == 2


async def test_saves_are_numbered_as_they_were_sent(clock: ManualClock) -> None:
    """A short one overtakes a long one that is masked; the store drops the older by its number."""
    attempt, numbers = Attempt(clock), list[tuple[int, int]]()

    async def save(run: Any, handler: str, text: str, number: int) -> bool:
        numbers.append((number, len(text)))
        return True

    attempt.store.save_checkpoint = save  # type: ignore[method-assign]

    await asyncio.gather(attempt.services.ask(Save(JSON, 1)), attempt.services.ask(Save('"short"', 2)))

    assert [number for number, _ in sorted(numbers, key=lambda each: -each[1])] == [1, 2]


def test_the_secret_is_masked_only_while_it_is_held() -> None:
    assert masker.mask(SECRET, admitted().org_id) == SECRET


async def test_an_option_that_contains_a_secret_is_refused(clock: ManualClock) -> None:
    """Two of them would be the same answer. The control: other options are stored."""
    attempt = Attempt(clock)

    for option in (SECRET, f"not {SECRET}"):
        with pytest.raises(StepError, match="an option of a wait .* contains a secret"):
            await attempt.services.ask(OpenWait(NewWait("w", 1, "answer", options=("yes", option))))
    assert attempt.store.texts == []
    await attempt.services.ask(OpenWait(NewWait("w", 1, "answer", options=("yes", "no"))))
    assert attempt.store.texts == [""]
