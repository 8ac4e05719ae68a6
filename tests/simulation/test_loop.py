"""The seeded loop: the same seed makes the same choices, and its processes die as real ones do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from tests.simulation.loop import SeededLoop, SimulatedProcess, SimulatedThreads, Stuck


def run(seed: int, main: Callable[[SeededLoop], Any]) -> Any:
    loop = SeededLoop(Random(seed))
    try:
        return loop.run_until_complete(main(loop))
    finally:
        loop.close()
        assert loop.failures == []


async def race(loop: SeededLoop) -> tuple[list[int], str]:
    """In which order tasks come that all could."""
    order: list[int] = []

    async def come(number: int) -> None:
        await asyncio.sleep(0)
        await asyncio.to_thread(order.append, number)

    await asyncio.gather(*map(come, range(6)))
    return order, loop.digest()


def test_a_seed_decides_the_order_of_what_is_ready():
    orders = [run(seed, race) for seed in range(5)]

    assert orders == [run(seed, race) for seed in range(5)]
    assert len({tuple(order) for order, _ in orders}) > 3


def test_time_passes_only_when_all_wait():
    async def main(loop: SeededLoop) -> float:
        before = loop.time()
        await asyncio.sleep(3600)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(60):
                await asyncio.sleep(3600)
        return loop.time() - before

    assert run(1, main) == pytest.approx(3660, abs=0.01)


def test_what_can_never_end_is_an_error():
    async def main(loop: SeededLoop) -> None:
        await asyncio.Event().wait()

    with pytest.raises(Stuck):
        run(1, main)


def test_a_killed_process_runs_no_finally_and_a_frozen_one_goes_on_where_it_was():
    async def main(loop: SeededLoop) -> tuple[list[str], list[str]]:
        told: dict[str, list[str]] = {"killed": [], "frozen": []}

        async def live(lines: list[str]) -> None:
            try:
                await asyncio.sleep(1)
                lines.append("woke")
                await asyncio.to_thread(lines.append, "threads too")
            finally:
                lines.append("finally")

        for name, lines in told.items():
            process = SimulatedProcess(loop, name)
            process.context.run(loop.create_task, live(lines))
            await asyncio.sleep(0.5)
            if name == "killed":
                process.kill()
            else:
                process.freeze()
                await asyncio.sleep(100)
                assert lines == []
                process.thaw()
            await asyncio.sleep(10)
        return told["killed"], told["frozen"]

    assert run(3, main) == ([], ["woke", "threads too", "finally"])


def test_a_loop_that_joins_a_thread_blocks_its_process_and_no_other():
    async def main(loop: SeededLoop) -> list[str]:
        told: list[str] = []
        process = SimulatedProcess(loop, "joins")

        async def beside() -> None:
            while True:
                await asyncio.sleep(1)
                told.append("beside")

        async def joins() -> None:
            threads = SimulatedThreads()
            flag = threads.flag()
            thread = threads.start("slow", lambda: flag.wait(3) or told.append("ended"))
            beside_it = asyncio.create_task(beside())
            thread.join(10)
            told.append("joined")
            beside_it.cancel()

        other: list[int] = []

        async def others() -> None:
            for second in range(3):
                await asyncio.sleep(1)
                other.append(second)

        task = process.context.run(loop.create_task, joins())
        await asyncio.gather(task, others())
        assert other == [0, 1, 2]
        return told

    assert run(5, main) == ["ended", "joined"]
