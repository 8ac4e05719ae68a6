"""Work that arrives at once is spread over iterations of the loop, and work on large texts leaves it."""

from __future__ import annotations

import asyncio
import re
import threading
from collections import Counter
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker import pacing
from worker.pacing import AT_ONCE, Turns, pace
from worker.telemetry import secret_index

pytestmark = pytest.mark.anyio


class Iterations:
    """Counts the iterations of the running loop."""

    def __init__(self) -> None:
        self.count = 0
        self._next()

    def _next(self) -> None:
        self.count += 1
        self._handle = asyncio.get_running_loop().call_soon(self._next)

    def stop(self) -> None:
        self._handle.cancel()


async def begun(turns: Turns, sizes: list[int]) -> tuple[list[int], int]:
    """The order in which works of these sizes begin, and the largest sum of one iteration."""
    order: list[int] = []
    sums: Counter[int] = Counter()
    iterations = Iterations()

    async def work(number: int, size: int) -> None:
        await turns.take(size)
        order.append(number)
        sums[iterations.count] += size

    await asyncio.gather(*(work(number, size) for number, size in enumerate(sizes)))
    iterations.stop()
    return order, max(sums.values())


async def test_one_iteration_begins_a_limited_amount_of_work_first_come_first() -> None:
    order, most = await begun(Turns(20), [10] * 9)

    assert (order, most) == (list(range(9)), 20)


async def test_without_a_limit_all_of_it_begins_in_one_iteration() -> None:
    """The control."""
    _, most = await begun(Turns(10**9), [10] * 9)

    assert most == 90


async def test_work_that_is_larger_than_the_limit_begins_alone() -> None:
    order, most = await begun(Turns(20), [10, 500, 10, 10])

    assert (order, most) == ([0, 1, 2, 3], 500)


async def test_work_that_no_longer_waits_takes_no_turn() -> None:
    turns = Turns(10)
    _, gone, waiting = (asyncio.ensure_future(turns.take(10)) for _ in range(3))
    await asyncio.sleep(0)
    gone.cancel()

    await waiting

    assert gone.cancelled()


def test_turns_outlive_a_loop() -> None:
    turns = Turns(10)

    async def leave_one_waiting() -> None:
        await turns.take(10)
        waiting = asyncio.ensure_future(turns.take(10))
        await asyncio.sleep(0)
        waiting.cancel()

    asyncio.run(leave_one_waiting())
    asyncio.run(turns.take(10))


async def test_little_text_is_worked_on_at_once_and_much_in_a_thread() -> None:
    def here(text: str) -> bool:
        return threading.current_thread() is threading.main_thread()

    await asyncio.sleep(0)  # an iteration of its own
    small, large = "x" * (AT_ONCE // 2), "x" * (AT_ONCE + 1)

    assert await pace(len(small), here, small)
    assert not await pace(len(large), here, large)


async def test_many_small_texts_of_one_iteration_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def here() -> bool:
        return threading.current_thread() is threading.main_thread()

    monkeypatch.setattr(pacing, "_turns", Turns(AT_ONCE))
    size = AT_ONCE // 4
    found = await asyncio.gather(*(pace(size, here) for _ in range(6)))
    monkeypatch.setattr(pacing, "_turns", Turns(10**9))
    control = await asyncio.gather(*(pace(size, here) for _ in range(6)))

    assert found == [True] * 4 + [False] * 2
    assert control == [True] * 6


PATTERNS = (secret_index.BASE64, secret_index.ESCAPED_BASE64, secret_index.PERHAPS_TOKEN)


@given(
    st.lists(
        st.sampled_from(["a" * 15, "b" * 17, " ", "-", "00000000-0000-0000-0000-000000000001", "é", "="])
    )
)
def test_a_text_is_searched_in_steps_as_at_once(pieces: list[str]) -> None:
    text = "".join(pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pacing, "AT_ONCE", 8)
        for pattern in PATTERNS:
            in_steps = [word.span() for word in pacing.in_steps(pattern, text)]
            assert in_steps == [word.span() for word in pattern.finditer(text)]


def test_a_search_does_not_go_over_a_whole_text_at_once() -> None:
    """The control is `finditer`, which has only one step for it."""
    steps: list[int] = []

    class Pattern:
        def finditer(self, text: str, start: int, end: int) -> list[Any]:
            steps.append(end - start)
            return []

    list(pacing.in_steps(cast("re.Pattern[str]", Pattern()), "[]," * 100_000))

    assert sum(steps) == 300_000
    assert max(steps) <= AT_ONCE + 1
