"""The hosts of a pool share its runs: the emptiest comes first, and nobody waits long for another one."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest

from tests.fakes.clock import ManualClock, settle
from tests.unit.engine.runs import admitted
from worker.features.hosts.sharing import PASSED_OVER, Sharing
from worker.ids import WorkerId
from worker.model.runs.hosts import PoolLoad
from worker.model.runs.run import AdmittedRun, Isolation

POLL = 1.0


class Pool:
    """A pool in a database, with hosts of so many slots; `only` are the hosts that can run what waits."""

    def __init__(self, clock: ManualClock, **slots: int) -> None:
        self.slots = {WorkerId(name): count for name, count in slots.items()}
        self.used = Counter[WorkerId]()
        self.due = 0
        self.waited = 0.0
        self.limit = 1_000_000
        self.only = set(self.slots)
        self.loads = 0
        self.clock = clock
        self.sharing = Sharing(self, clock, POLL)
        # Whom runs were given to, in order.
        self.given = list[str]()

    async def pool_load(self, pool: str) -> PoolLoad | None:
        self.loads += 1
        await asyncio.sleep(0)
        if not self.due:
            return None
        return PoolLoad(
            Counter({"child": min(self.due, sum(self.slots.values()))}),
            self.waited,
            {name: {"child": slots, "inline": 0} for name, slots in self.slots.items()},
            {name: Counter({"child": self.used[name]}) for name in self.slots},
        )

    def add(self, runs: int) -> None:
        self.due += runs
        self.sharing.wake()

    async def take(self, name: str, free: int | None = None) -> int:
        """The number of runs that a host gets if it asks for all its free slots."""
        worker = WorkerId(name)

        async def admit(part: Mapping[Isolation, int]) -> Sequence[AdmittedRun]:
            await asyncio.sleep(0)
            left = min(self.due, self.limit - self.used.total()) if worker in self.only else 0
            runs = [admitted(f"r{place}") for place in range(min(part["child"], left))]
            self.due -= len(runs)
            self.used[worker] += len(runs)
            self.given += [name] * len(runs)
            return runs

        asked: dict[Isolation, int] = {"child": self.slots[worker] - self.used[worker], "inline": 0}
        if free is not None:
            asked["child"] = free
        return len(await self.sharing.share("eu", worker, asked, admit))

    async def take_all(self, *names: str) -> list[int]:
        """The same, if several ask at once, in this order."""
        return await asyncio.gather(*(self.take(name) for name in names))


@pytest.fixture
def pool(clock: ManualClock) -> Pool:
    return Pool(clock, a=18, b=18, c=18)


def first_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule before: who comes first gets what it has slots for."""
    monkeypatch.setattr(Sharing, "_first", lambda self, line: line.asking[0])
    monkeypatch.setattr(PoolLoad, "part", lambda self, worker, free: dict(free))


@pytest.mark.parametrize("shared", [True, False], ids=["", "control"])
async def test_a_burst_is_parted_among_idle_hosts(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    if not shared:
        first_come(monkeypatch)
    pool.add(27)
    assert await pool.take_all("a", "b", "c") == ([9, 9, 9] if shared else [18, 9, 0])


@pytest.mark.parametrize("shared", [True, False], ids=["", "control"])
async def test_runs_that_come_one_by_one_go_around(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """Each ends before the next one comes, so all hosts are equally idle."""
    if not shared:
        first_come(monkeypatch)
    for _ in range(54):
        pool.add(1)
        await pool.take_all("a", "b", "c")
        pool.used.clear()
    assert Counter(pool.given) == ({"a": 18, "b": 18, "c": 18} if shared else {"a": 54})


async def test_the_emptiest_is_first_by_its_share_of_free_slots(clock: ManualClock) -> None:
    pool = Pool(clock, a=10, b=4, c=10)
    pool.used.update({WorkerId("a"): 6, WorkerId("b"): 1, WorkerId("c"): 5})
    pool.add(1)
    assert await pool.take_all("a", "b", "c") == [0, 1, 0]
    pool.add(1)
    # Now b has 2 of 4, a 4 of 10 and c 5 of 10: c got nothing so far, so it comes before b.
    assert await pool.take_all("a", "b", "c") == [0, 0, 1]


@pytest.mark.parametrize("told", [True, False], ids=["", "control"])
async def test_the_host_that_looks_first_lets_the_others_ask(pool: Pool, told: bool) -> None:
    """Without a hint, as on SQLite, each host looks at its own times."""
    for _ in range(6):
        assert await pool.take("a") == 0
        pool.add(1)
        looked = asyncio.Event()
        if told:
            pool.sharing.takes("eu").append(looked)

        async def wait(name: str, looked: asyncio.Event = looked) -> None:
            await looked.wait()
            await pool.take(name)

        others = [asyncio.create_task(wait(name)) for name in "bc"]
        await asyncio.sleep(0)
        await pool.take("a")
        looked.set()
        await asyncio.gather(*others)
        pool.sharing.takes("eu").clear()
        pool.used.clear()
    assert Counter(pool.given) == ({"a": 2, "b": 2, "c": 2} if told else {"a": 6})


async def test_a_host_alone_gets_what_it_has_slots_for(clock: ManualClock) -> None:
    pool = Pool(clock, a=18)
    pool.add(30)
    assert await pool.take("a") == 18


async def test_a_backlog_beyond_a_limit_does_not_fill_one_host(pool: Pool) -> None:
    pool.add(1_000)
    pool.limit = 27
    assert await pool.take_all("a", "b", "c") == [9, 9, 9]


async def test_full_hosts_get_each_slot_that_is_free_under_a_backlog(pool: Pool) -> None:
    """Also before the database has the ends that free them."""
    pool.add(1_000)
    pool.waited = 10.0
    pool.used.update(dict.fromkeys(pool.slots, 18))
    assert [await pool.take(name, free=3) for name in "abc"] == [3, 3, 3]


async def test_a_host_that_lies_gets_no_more_than_it_registered(pool: Pool) -> None:
    pool.add(1_000)
    assert await pool.take("a", free=100_000) <= 18
    alone = Pool(pool.clock, a=18)
    alone.add(1_000)
    assert await alone.take("a", free=100_000) == 18


async def test_hosts_that_register_many_slots_leave_a_run_at_a_time_to_others(clock: ManualClock) -> None:
    pool = Pool(clock, a=4, liar=100_000)
    pool.waited = 10.0
    pool.add(100)
    assert await pool.take_all("a", "liar") != [0, 100]
    pool.only = {WorkerId("a")}
    pool.due = 100
    assert await pool.take("a") == 1


async def test_runs_are_left_to_an_emptier_host_elsewhere_for_half_a_poll(
    pool: Pool, clock: ManualClock
) -> None:
    pool.used[WorkerId("a")] = 1
    pool.add(1)
    assert await pool.take("a") == 0
    assert pool.sharing.pause("eu") == POLL / 2

    clock.advance(POLL / 2)
    pool.waited = POLL / 2
    assert await pool.take("a") == 1
    assert pool.sharing.pause("eu") == POLL


async def test_a_host_that_took_nothing_is_not_waited_for_again(pool: Pool, clock: ManualClock) -> None:
    """It may be gone, full in memory, draining, or unable to run what waits."""
    pool.used[WorkerId("a")] = 1
    pool.add(1)
    await pool.take("a")
    clock.advance(POLL / 2)
    pool.waited = POLL / 2
    assert await pool.take("a") == 1

    pool.waited = 0.0
    pool.add(1)
    assert await pool.take("a") == 1
    clock.advance(PASSED_OVER + 1)
    pool.add(1)
    assert await pool.take("a") == 0


async def test_a_run_that_waits_for_long_is_left_to_nobody(pool: Pool) -> None:
    """It was due before this worker looked: hosts that poll get it within one poll."""
    pool.used[WorkerId("a")] = 1
    pool.waited = POLL / 2
    pool.add(1)
    assert await pool.take("a") == 1


async def test_the_first_run_of_an_idle_pool_waits_for_nobody(pool: Pool) -> None:
    pool.add(1)
    assert await pool.take("b") == 1


async def test_an_emptiest_host_that_can_run_nothing_gives_its_turn_away(pool: Pool) -> None:
    pool.used.update({WorkerId("a"): 2, WorkerId("b"): 1})
    pool.only = {WorkerId("a"), WorkerId("b")}
    pool.add(2)
    assert sum(await pool.take_all("a", "b", "c")) == 2


@pytest.mark.parametrize("patient", [True, False], ids=["", "control"])
async def test_the_fullest_host_gets_its_turn_though_emptier_ones_keep_asking(
    pool: Pool, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, patient: bool
) -> None:
    """Without a bound its call would outlive its deadline, and the host would leave the worker."""
    if not patient:
        monkeypatch.setattr(
            Sharing, "_first", lambda self, line: max(line.asking, key=lambda one: line.share(one.worker))
        )
    pool.used.update({WorkerId("a"): 17})
    pool.only = {WorkerId("a")}
    pool.add(5)
    stop = False

    async def ask(name: str) -> None:
        while not stop:
            await pool.take(name)
            clock.advance(0.01)

    others = [asyncio.create_task(ask(name)) for name in "bcbc"]
    await settle(10)
    fullest = asyncio.create_task(pool.take("a"))
    await settle(1_000)
    done, stop = fullest.done(), True
    await asyncio.gather(fullest, *others)
    assert done == patient


@pytest.mark.parametrize("holding", [True, False])
async def test_a_call_that_ends_while_it_waits_passes_its_turn_on(pool: Pool, holding: bool) -> None:
    pool.add(2)
    first = asyncio.create_task(pool.take("a"))
    second = asyncio.create_task(pool.take("b"))
    await asyncio.sleep(0)
    (first if holding else second).cancel()
    await settle()
    assert await pool.take("c") == 1
    assert (await asyncio.gather(first, second, return_exceptions=True))[1 if holding else 0] == 1


async def test_what_waits_is_read_once_for_all_hosts(clock: ManualClock) -> None:
    pool = Pool(clock, **{f"h{place}": 2 for place in range(100)})
    pool.limit = 0
    pool.add(1_000)
    await pool.take_all(*pool.slots)
    assert pool.loads == 1
    pool.due = 0
    pool.sharing.wake()
    await pool.take_all(*pool.slots)
    assert pool.loads == 2


async def test_a_wake_while_the_database_answers_is_not_lost(pool: Pool) -> None:
    first = asyncio.create_task(pool.take("a"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    pool.add(1)
    await first
    assert sum(await pool.take_all("a", "b")) + len(pool.given) >= 1
