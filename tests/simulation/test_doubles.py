"""The doubles of threads and executors keep the contract of the real ones: one suite for both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import pytest

from tests.simulation.loop import SeededLoop, SimulatedThreads
from worker.threads import SYSTEM, Threads

Scenario = Callable[[Threads, Callable[[float], None]], Any]


def as_it_is(scenario: Scenario) -> Any:
    return scenario(SYSTEM, time.sleep)


def simulated(scenario: Scenario) -> Any:
    loop = SeededLoop(Random(7))

    async def main() -> Any:
        threads = SimulatedThreads()
        return await asyncio.to_thread(scenario, threads, lambda seconds: threads.flag().wait(seconds))

    try:
        return loop.run_until_complete(main())
    finally:
        assert loop.failures == []
        loop.close()


either = pytest.mark.parametrize("carried_out", [as_it_is, simulated])


@either
def test_a_flag_waits_until_it_is_set_or_its_time_is_over(carried_out: Callable[[Scenario], Any]):
    def scenario(threads: Threads, sleep: Callable[[float], None]) -> Any:
        flag = threads.flag()
        found = [flag.is_set(), flag.wait(0.01)]
        flag.set()
        found += [flag.is_set(), flag.wait(0.01), flag.wait()]
        flag.clear()
        return [*found, flag.is_set(), flag.wait(0)]

    assert carried_out(scenario) == [False, False, True, True, True, False, False]


@either
def test_a_thread_that_waits_is_woken_by_another(carried_out: Callable[[Scenario], Any]):
    def scenario(threads: Threads, sleep: Callable[[float], None]) -> Any:
        asked, answered, told = threads.flag(), threads.flag(), []

        def work() -> None:
            asked.wait()
            told.append("asked")
            answered.set()

        thread = threads.start("answers", work)
        sleep(0.01)
        told.append("asks")
        asked.set()
        told.append(answered.wait(5))
        thread.join(5)
        return told

    assert carried_out(scenario) == ["asks", "asked", True]


@either
def test_a_join_ends_with_the_thread_or_with_its_time(carried_out: Callable[[Scenario], Any]):
    def scenario(threads: Threads, sleep: Callable[[float], None]) -> Any:
        go_on, ended = threads.flag(), []

        def work() -> None:
            go_on.wait()
            ended.append(True)

        thread = threads.start("waits", work)
        thread.join(0.02)
        found = [list(ended)]
        go_on.set()
        thread.join()
        return [*found, ended]

    assert carried_out(scenario) == [[], [True]]


@either
def test_a_loop_that_waits_on_a_flag_sees_each_time_out(carried_out: Callable[[Scenario], Any]):
    """As the heartbeat does, which renews at each time-out until it is stopped."""

    def scenario(threads: Threads, sleep: Callable[[float], None]) -> Any:
        stop, beats = threads.flag(), []

        def work() -> None:
            while not stop.wait(0.01):
                beats.append(1)
                if len(beats) == 3:
                    stop.set()

        threads.start("heartbeat", work).join(5)
        return len(beats), stop.is_set()

    assert carried_out(scenario) == (3, True)


async def calls(pool: ThreadPoolExecutor | None) -> list[Any]:
    """What an executor returns, raises, and in which order one of a single thread works."""
    loop, order = asyncio.get_running_loop(), []

    def fail() -> None:
        raise ValueError("as asked")

    def number(value: int) -> int:
        order.append(value)
        return value

    found: list[Any] = await asyncio.gather(
        *(loop.run_in_executor(pool, number, value) for value in range(5))
    )
    try:
        await loop.run_in_executor(pool, fail)
    except ValueError as error:
        found.append(str(error))
    return [*found, order if pool is not None else sorted(order)]


def on_seeded(work: Awaitable[Any]) -> Any:
    loop = SeededLoop(Random(11))
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


@pytest.mark.parametrize("run", [asyncio.run, on_seeded])
@pytest.mark.parametrize("threads", [1, None])
def test_an_executor_answers_in_order_and_passes_errors_on(run: Callable[[Any], Any], threads: int | None):
    pool = None if threads is None else ThreadPoolExecutor(threads)

    assert run(calls(pool)) == [0, 1, 2, 3, 4, "as asked", [0, 1, 2, 3, 4]]
    if pool is not None:
        pool.shutdown()
