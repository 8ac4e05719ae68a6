"""Work that arrives at once is spread over iterations of the loop."""

from __future__ import annotations

import asyncio
from collections import Counter

from worker.pacing import Turns


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


async def order_of(groups: list[str]) -> list[str]:
    """The groups of works in the order in which they begin, two in an iteration, if all ask at once."""
    turns, order = Turns(2), list[str]()

    async def work(group: str) -> None:
        await turns.take(1, group)
        order.append(group)

    await asyncio.gather(*map(work, groups))
    return order


async def test_groups_take_turns() -> None:
    order = await order_of([*["many"] * 100, "few", "few"])

    assert [place for place, group in enumerate(order) if group == "few"] == [3, 5]


async def test_in_a_group_work_waits_for_all_that_came_before() -> None:
    """The control."""
    turns, order = Turns(2), list[int]()

    async def work(number: int) -> None:
        await turns.take(1, "many")
        order.append(number)

    await asyncio.gather(*map(work, range(102)))

    assert order == list(range(102))


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
