"""The pacer of a broker, against a worker that answers by the same arithmetic as the database."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import pytest

from tests.fakes.clock import ManualClock, settle
from worker.features.egress.pacing import MAX_ORIGINS, OTHERS, Pacer, Slot, Stopped
from worker.handlers.results import RateLimited
from worker.model.limits import (
    LIFE,
    MAX_PAUSE,
    SLOT_LIFE,
    Ask,
    Bucket,
    BucketKey,
    Limit,
    Share,
    answer,
    new_bucket,
)

ORIGIN = "https://api.example.com"
NEVER = float("inf")


@dataclass
class Worker:
    """Answers questions at once, or after `delay` seconds; fails while `broken`."""

    clock: ManualClock
    limits: dict[str, Limit]
    name: str = "worker"
    buckets: dict[BucketKey, Bucket] = field(default_factory=dict)
    asked: list[Ask] = field(default_factory=list)
    broken: bool = False
    delay: float = 0.0

    async def __call__(self, ask: Ask) -> Share:
        self.asked.append(ask)
        sent = self.clock.monotonic()
        if self.broken:
            raise ConnectionError("the control socket is closed")
        if self.delay:
            await self.clock.sleep(self.delay)
        limit = self.limits[ask.key.limit_id]
        now = self.clock.monotonic()
        bucket = self.buckets.setdefault(ask.key, new_bucket(limit, now))
        share = answer(limit, bucket, self.name, ask, now)
        return share._replace(until=sent + LIFE, slots_until=sent + SLOT_LIFE)


def limit(rate: float | None = None, **values) -> Limit:
    values = {"id": "1", "origin": ORIGIN, "per": "org", "rate": rate} | values
    return Limit(**values)


@dataclass
class Bench:
    clock: ManualClock
    limits: list[Limit]
    worker: Worker = field(init=False)
    pacer: Pacer = field(init=False)
    sent: list[tuple[float, str]] = field(default_factory=list)
    floods: list[asyncio.Task[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.worker = Worker(self.clock, {each.id: each for each in self.limits})
        self.pacer = Pacer(self.clock, self.worker)

    def acquire(self, org: str = "acme", *, deadline: float = NEVER, group: str = "") -> Awaitable[Slot]:
        return self.pacer.acquire(org, ORIGIN, self.limits, deadline, group=group)

    def start(self, org: str = "acme", *, group: str = "", deadline: float = NEVER) -> asyncio.Task[Slot]:
        async def one() -> Slot:
            slot = await self.acquire(org, group=group, deadline=deadline)
            self.sent.append((self.clock.monotonic(), group or org))
            return slot

        return asyncio.create_task(one())

    def flood(self, number: int, org: str = "acme", *, group: str = "") -> None:
        """Start requests that may also be refused."""

        async def one(task: asyncio.Task[Slot]) -> None:
            with suppress(RateLimited, Stopped):
                await task

        self.floods += [asyncio.create_task(one(self.start(org, group=group))) for _ in range(number)]


@pytest.fixture
def bench(clock: ManualClock):
    return lambda *limits: Bench(clock, list(limits))


def test_it_loads_neither_an_http_client_nor_a_database():
    code = (
        "import sys, worker.features.egress.pacing\n"
        "print([name for name in ('httpx', 'httpcore', 'sqlalchemy', 'pydantic', 'cryptography')"
        " if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "[]"


async def test_without_a_limit_nothing_waits_and_nothing_is_asked(bench):
    empty = bench()

    slot = await empty.acquire()
    slot.release()

    assert slot.waited == 0
    assert empty.worker.asked == []


async def test_requests_wait_for_tokens_in_their_order(bench, clock):
    setup = bench(limit(10, burst=1))
    tasks = [setup.start() for _ in range(10)]

    await clock.pass_time(2, step=0.05)

    assert all(task.done() for task in tasks)
    times = [at for at, _ in setup.sent]
    assert times == sorted(times)
    # Five at once, burst and advance; the others as the rate allows.
    assert times[-1] - times[0] == pytest.approx(0.5, abs=0.25)
    assert [task.result().waited for task in tasks] == sorted(task.result().waited for task in tasks)


async def test_a_steady_caller_uses_what_was_leased_in_advance(bench, clock):
    setup = bench(limit(100, burst=10))
    waited = []
    for _ in range(40):
        task = setup.start()
        await clock.pass_time(0.05)
        waited.append((await task).waited)

    assert max(waited[10:]) == 0
    assert len(setup.worker.asked) < 20


async def test_waiting_groups_take_turns(bench, clock):
    setup = bench(limit(5, burst=1))
    setup.flood(20, group="many")
    await settle()
    setup.flood(2, group="few")

    await clock.pass_time(1, step=0.05)

    assert [group for _, group in setup.sent].count("few") == 2
    await setup.pacer.close()


async def test_a_wait_above_max_wait_is_refused_at_once_with_the_time(bench, clock):
    setup = bench(limit(0.1, burst=1, max_wait=5))
    first, second = setup.start(), setup.start()
    await settle()

    await first
    with pytest.raises(RateLimited) as caught:
        await second

    assert caught.value.retry_after == pytest.approx(10, abs=0.5)
    assert setup.pacer.counts()[0].refused == 1
    assert "api.example.com" in str(caught.value)


async def test_a_wait_beyond_the_deadline_is_refused(bench, clock):
    setup = bench(limit(1, burst=1))
    await setup.start()

    with pytest.raises(RateLimited):
        task = setup.start(deadline=clock.monotonic() + 0.2)
        await clock.pass_time(0.5, step=0.05)
        await task


async def test_a_worker_that_does_not_answer_lets_them_wait_until_max_wait(bench, clock):
    setup = bench(limit(10, max_wait=3))
    setup.worker.broken = True
    task = setup.start()
    await clock.pass_time(2.9, step=0.1)
    assert not task.done()

    await clock.pass_time(0.2, step=0.1)

    with pytest.raises(RateLimited):
        await task


async def test_tokens_end_also_for_a_process_that_was_frozen(bench, clock):
    setup = bench(limit(10, burst=10))
    (await setup.start()).release()
    # What is left was granted for LIFE; frozen, the process runs no task meanwhile.
    clock.advance(LIFE + 0.01)

    task = setup.start()
    before = len(setup.worker.asked)
    await settle()

    assert task.done()
    assert len(setup.worker.asked) > before


async def test_an_answer_that_comes_after_a_freeze_is_of_no_use(bench, clock):
    setup = bench(limit(10, burst=1))
    setup.worker.delay = 0.1
    task = setup.start()
    await settle()

    # The answer was sent in time, and is read after the freeze.
    clock.advance(5)
    await settle(3)

    assert setup.sent == []
    await clock.pass_time(1, step=0.05)
    assert task.done()


async def test_nothing_that_waits_goes_on_after_a_stop(bench, clock):
    setup = bench(limit(1, burst=1))
    setup.pacer.pause("other", ORIGIN, 5)
    (await setup.start()).release()
    waiting, paused = setup.start(), setup.start("other")
    await settle()

    setup.pacer.stop()
    setup.pacer.resume()
    await clock.pass_time(10, step=0.1)

    for task in (waiting, paused):
        with pytest.raises(Stopped):
            await task
    assert len(setup.sent) == 1
    assert (await setup.start()).waited == 0


@pytest.mark.parametrize("turns", range(25))
async def test_whenever_the_stop_comes_nothing_is_sent_after_it(bench, clock, turns):
    """Also a request that was let through, but whose task has not run since."""
    setup = bench(limit(1, burst=1))
    task = setup.start()
    for _ in range(turns):
        await asyncio.sleep(0)
    sent_before = list(setup.sent)

    setup.pacer.stop()
    setup.pacer.resume()
    await settle()

    assert setup.sent == sent_before or not turns
    if not sent_before and turns:
        with pytest.raises(Stopped):
            await task


async def test_a_cancelled_request_leaves_its_place_to_the_next(bench, clock):
    setup = bench(limit(2, burst=1))
    (await setup.start()).release()
    gone, stays = setup.start(group="a"), setup.start(group="b")
    await settle()

    gone.cancel()
    await clock.pass_time(0.6, step=0.05)

    assert stays.done()
    assert [group for _, group in setup.sent] == ["acme", "b"]


async def test_slots_bound_the_requests_under_way(bench, clock):
    setup = bench(limit(concurrent=2))
    tasks = [setup.start() for _ in range(4)]
    await clock.pass_time(1, step=0.1)
    begun = [task for task in tasks if task.done()]
    assert len(begun) == 2

    for task in begun:
        task.result().release()
        task.result().release()
    await clock.pass_time(0.5, step=0.1)

    assert sum(task.done() for task in tasks) == 4


async def test_slots_are_given_back_when_nothing_uses_them(bench, clock):
    setup = bench(limit(concurrent=2))
    (await setup.start()).release()

    await clock.pass_time(2, step=0.1)

    assert setup.worker.buckets[BucketKey("1", "acme")].holders == {}
    before = len(setup.worker.asked)
    await clock.pass_time(10, step=0.1)
    assert len(setup.worker.asked) == before


@pytest.mark.timeout(20)
async def test_slots_that_cannot_be_given_back_are_left_to_end(bench, clock):
    """As after the last attempt of an org. Asked for again at once, they keep the loop from all others."""
    setup = bench(limit(concurrent=2))
    (await setup.start()).release()
    setup.worker.broken, asked = True, len(setup.worker.asked)

    await clock.pass_time(2, step=0.1)

    assert len(setup.worker.asked) <= asked + 2
    setup.worker.broken = False
    (await setup.start()).release()


async def test_what_is_not_used_comes_back(bench, clock):
    setup = bench(limit(1, burst=20))
    for _ in range(12):
        (await setup.start()).release()
        await clock.pass_time(0.05)

    await clock.pass_time(2, step=0.1)

    assert sum(ask.returned for ask in setup.worker.asked) > 0
    assert setup.worker.buckets[BucketKey("1", "acme")].tokens + 3 > 20.4 - 12


async def test_a_pause_stops_that_org_at_that_origin_only(bench, clock):
    setup = bench(limit(1000, burst=1000))
    setup.pacer.pause("acme", ORIGIN, 3)

    paused, other = setup.start("acme"), setup.start("other")
    await settle()
    elsewhere = await setup.pacer.acquire("acme", "https://elsewhere.example", [], NEVER)
    await clock.pass_time(0.2, step=0.1)
    assert other.done()
    assert not paused.done()
    assert elsewhere.waited == 0

    await clock.pass_time(3, step=0.1)
    assert paused.result().waited == pytest.approx(3, abs=0.11)


async def test_a_pause_reaches_requests_that_wait_for_a_limit(bench, clock):
    setup = bench(limit(2, burst=1))
    (await setup.start()).release()
    task = setup.start()
    await settle()

    setup.pacer.pause("acme", ORIGIN, 4)
    await clock.pass_time(3.9, step=0.1)
    assert not task.done()

    await clock.pass_time(1, step=0.1)
    assert task.done()


async def test_a_pause_ends_the_leave_of_requests_that_are_still_connecting(bench, clock):
    setup = bench()
    connecting, other = await setup.acquire("acme"), await setup.acquire("other")
    assert connecting.may_send()

    setup.pacer.pause("acme", ORIGIN, 3)

    assert not connecting.may_send()
    assert other.may_send()


async def test_a_pause_that_is_learned_twice_is_one(bench, clock):
    setup = bench()
    for seconds in (10, 10.05, 10.09, 5):
        setup.pacer.pause("acme", ORIGIN, seconds)

    assert setup.pacer.counts()[0].pauses == 1


async def test_a_pause_longer_than_max_wait_is_refused_with_its_time(bench):
    setup = bench()
    setup.pacer.pause("acme", ORIGIN, 1e9)

    with pytest.raises(RateLimited) as caught:
        await setup.acquire()

    assert caught.value.retry_after == pytest.approx(MAX_PAUSE)


async def test_a_request_waits_for_the_limit_of_its_org_and_of_all(bench, clock):
    of_org, of_all = limit(2, burst=1), limit(6, burst=1, id="2", per="all")
    setup = bench(of_org, of_all)
    for org in ("a", "b", "c", "d", "e", "f"):
        setup.flood(30, org)

    await clock.pass_time(8, step=0.05)

    by_org = {org: sum(1 for _, each in setup.sent if each == org) for org in "abcdef"}
    assert 0.9 * 6 * 8 <= len(setup.sent) <= 6 * 9 + 1
    assert max(by_org.values()) <= 2 * 9 + 1
    assert min(by_org.values()) >= 4
    await setup.pacer.close()


async def test_one_org_at_its_limit_delays_no_other(bench, clock):
    setup = bench(limit(1, burst=1), limit(100, burst=100, id="2", per="all"))
    setup.flood(50, "busy")
    await clock.pass_time(1, step=0.05)

    task = setup.start("quiet")
    await clock.pass_time(0.25, step=0.05)

    assert task.done()
    await setup.pacer.close()


async def test_counts_name_only_so_many_origins(bench, clock):
    setup = bench()
    for number in range(MAX_ORIGINS + 20):
        setup.pacer.pause("acme", f"https://{number}.example", 1)

    counts = {each.origin: each for each in setup.pacer.counts()}

    assert len(counts) == MAX_ORIGINS + 1
    assert counts[OTHERS].pauses == 20


async def test_no_task_is_left_when_a_lane_is_idle(bench, clock):
    setup = bench(limit(10, burst=10))
    before = asyncio.all_tasks()
    (await setup.start()).release()

    await clock.pass_time(3, step=0.1)

    assert asyncio.all_tasks() == before


@dataclass
class Fleet:
    """Pacers of several workers on one set of buckets, and the requests that are under way at the service."""

    clock: ManualClock
    limit: Limit
    seconds: float
    under_way: int = 0
    most: int = 0
    busy: float = 0.0
    done: dict[str, int] = field(default_factory=dict)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def start(self, workers: int, requests: int) -> list[Pacer]:
        """Each worker keeps so many requests waiting or under way."""
        buckets: dict[BucketKey, Bucket] = {}
        pacers = []
        for number in range(workers):
            worker = Worker(self.clock, {self.limit.id: self.limit}, f"w{number}", buckets, delay=0.01)
            pacers.append(Pacer(self.clock, worker))
            for _ in range(requests):
                self.tasks.append(asyncio.create_task(self._send(pacers[-1], worker.name)))
        return pacers

    async def _send(self, pacer: Pacer, name: str) -> None:
        while True:
            slot = await pacer.acquire("acme", ORIGIN, [self.limit], NEVER)
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            await self.clock.sleep(self.seconds)
            self.under_way -= 1
            self.done[name] = self.done.get(name, 0) + 1
            slot.release()

    async def pass_time(self, seconds: float, step: float = 0.01) -> None:
        for _ in range(round(seconds / step)):
            await self.clock.pass_time(step)
            self.busy += self.under_way * step

    async def stop(self, pacers: Sequence[Pacer]) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for pacer in pacers:
            await pacer.close()


@pytest.mark.parametrize("slots", [8, 6])
async def test_workers_keep_all_slots_busy_and_never_use_more(clock, slots):
    fleet = Fleet(clock, limit(concurrent=slots, max_wait=3600), seconds=0.1)
    pacers = fleet.start(workers=4, requests=6)

    await fleet.pass_time(20)

    done = fleet.done
    await fleet.stop(pacers)
    assert fleet.most == slots
    assert fleet.busy >= 0.95 * 20 * slots
    assert min(done.values()) > 0.15 * sum(done.values())


async def test_the_last_slot_goes_round(clock):
    fleet = Fleet(clock, limit(concurrent=1, max_wait=3600), seconds=0.1)
    pacers = fleet.start(workers=3, requests=2)

    await fleet.pass_time(30)

    done = fleet.done
    await fleet.stop(pacers)
    assert fleet.most == 1
    assert min(done.get(name, 0) for name in ("w0", "w1", "w2")) > 0.2 * sum(done.values())
    assert fleet.busy >= 0.75 * 30
