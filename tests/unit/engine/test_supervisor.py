"""The pulse: a loop that does not come round is noticed, and the watchdog is not fed for it."""

from __future__ import annotations

import asyncio
import contextlib

from tests.fakes.clock import ManualClock
from tests.fakes.manager import Manager
from worker.engine.loops.supervisor import PATIENCE, Liveness


class Loop:
    def __init__(self, clock: ManualClock) -> None:
        self.ticked_at = clock.monotonic()

    async def run(self) -> None:
        """Nothing runs here."""


def make(clock: ManualClock, *, resting: bool = False) -> tuple[Liveness, dict[str, Loop], Manager]:
    loops, dog = {"scheduler": Loop(clock), "admission": Loop(clock)}, Manager()
    pulse = Liveness(loops, dog, clock, resting=lambda: resting, status=lambda: f"stalled: {pulse.stalled()}")
    return pulse, loops, dog


def test_a_loop_is_stalled_once_patience_is_over(clock):
    pulse, loops, _ = make(clock)
    clock.advance(PATIENCE)
    assert pulse.stalled() == []

    clock.advance(1)
    loops["admission"].ticked_at = clock.monotonic()

    assert pulse.stalled() == ["scheduler"]
    assert pulse.ages() == {"scheduler": PATIENCE + 1, "admission": 0}


def test_loops_that_a_drain_has_ended_are_not_stalled(clock):
    pulse, _, _ = make(clock, resting=True)
    clock.advance(PATIENCE + 1)

    assert pulse.stalled() == []


async def test_the_watchdog_is_fed_only_while_every_loop_ticks_and_the_status_says_which_does_not(clock):
    pulse, loops, dog = make(clock)
    task = asyncio.create_task(pulse.run())
    await asyncio.sleep(0)
    assert dog.told.count("alive") == 1

    clock.advance(PATIENCE + 1)
    for _ in range(3):
        await asyncio.sleep(0)
    assert dog.told.count("alive") == 1
    assert dog.told == ["stalled: []", "alive", "stalled: ['scheduler', 'admission']"]

    for loop in loops.values():
        loop.ticked_at = clock.monotonic() + PATIENCE
    clock.advance(PATIENCE)
    for _ in range(3):
        await asyncio.sleep(0)
    assert dog.told.count("alive") == 2
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
