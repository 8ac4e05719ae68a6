"""A worker's shares: one transaction for many questions, claims of hosts with a ceiling, and the pauses."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest

from tests.fakes.clock import ManualClock, settle
from worker.errors import StoreUnavailable, Unavailable
from worker.features.egress.broker import KNOWN
from worker.features.egress.shares import ACTIVE, MAX_COUNT, MAX_ORIGINS, OTHERS, POLL, Shares
from worker.model.limits import GATHERING, LIFE, MAX_PAUSE, SLOT_LIFE, SPACING, Ask, BucketKey, Limit, Share
from worker.store import limits
from worker.store.limits import Pause

ORIGIN = "https://api.example.com"


def key(number: int = 0) -> BucketKey:
    return BucketKey("limit", f"org {number}")


@dataclass
class Database:
    """Answers calls of the store as a test says; notes them with their time."""

    clock: ManualClock
    calls: list[tuple[str, float, Any]] = field(default_factory=list)
    rows: set[BucketKey] = field(default_factory=set)
    pauses: list[Pause] = field(default_factory=list)
    broken: bool = False
    delay: float = 0.0

    async def call(self, work, argument):
        self.calls.append((work.__name__, self.clock.monotonic(), argument))
        if self.delay:
            await self.clock.sleep(self.delay)
        if self.broken:
            raise StoreUnavailable("no answer")
        if work is limits.add_rows:
            self.rows |= set(argument)
            return None
        if work is limits.pause:
            return None
        at = self.clock.now().timestamp()
        return [Share(ask.want, ask.slots, at) if ask.key in self.rows else None for _, ask in argument]

    async def call_autocommit(self, work, *_):
        self.calls.append((work.__name__, self.clock.monotonic(), None))
        if self.broken:
            raise StoreUnavailable("no answer")
        if work is limits.load:
            return {"limit": Limit("limit", ORIGIN, "org", 10.0)}
        return list(self.pauses)

    def times(self, name: str) -> list[float]:
        return [at for called, at, _ in self.calls if called == name]

    def asked(self) -> list[tuple[str, Ask]]:
        return [each for name, _, argument in self.calls if name == "share" for each in argument]


@pytest.fixture
def database(clock: ManualClock) -> Database:
    return Database(clock, rows={key(number) for number in range(50)})


@pytest.fixture
def told() -> list[Pause]:
    return []


@pytest.fixture
def shares(database: Database, clock: ManualClock, told: list[Pause]) -> Shares:
    return Shares(database, "worker", clock, on_pauses=told.extend)


async def test_questions_of_all_keys_are_one_transaction(shares, database, clock):
    asking = [asyncio.create_task(shares.share(Ask(key(number), 1))) for number in range(50)]
    await settle()

    await clock.pass_time(GATHERING)

    assert [task.result().tokens for task in asking] == [1] * 50
    assert len(database.times("share")) == 1


async def test_there_are_at_most_five_transactions_a_second(shares, database, clock):
    asking = []
    for _ in range(100):
        asking.append(asyncio.create_task(shares.share(Ask(key(), 1))))
        await clock.pass_time(0.05)

    times = database.times("share")
    assert sum(task.done() for task in asking) > 90
    assert len(times) <= 5 / SPACING + 1
    assert min(b - a for a, b in pairwise(times)) >= SPACING - 0.001


async def test_a_share_ends_by_the_time_before_the_question(shares, database, clock):
    database.delay = 0.3
    task = asyncio.create_task(shares.share(Ask(key(), 1, slots=1)))
    await settle()
    await clock.pass_time(GATHERING)
    sent = clock.monotonic()
    await clock.pass_time(0.3)

    share = await task

    assert share.until == pytest.approx(sent + LIFE)
    assert share.slots_until == pytest.approx(sent + SLOT_LIFE)
    assert share.until - clock.monotonic() < LIFE - 0.2


async def test_a_key_without_a_row_gets_one(shares, database, clock):
    database.rows.clear()
    task = asyncio.create_task(shares.share(Ask(key(), 3)))
    await settle()
    await clock.pass_time(GATHERING)

    assert task.result().tokens == 3
    assert [name for name, _, _ in database.calls] == ["share", "add_rows", "share"]


async def test_without_the_database_a_question_fails_and_the_next_one_is_asked(shares, database, clock):
    database.broken = True
    failing = asyncio.create_task(shares.share(Ask(key(), 1)))
    await settle()
    await clock.pass_time(GATHERING)
    with pytest.raises(StoreUnavailable):
        await failing

    database.broken = False
    task = asyncio.create_task(shares.share(Ask(key(), 1)))
    await settle()
    await clock.pass_time(1, step=0.05)
    assert task.result().tokens == 1


@pytest.mark.parametrize("passed", [0.0, GATHERING])
async def test_when_the_worker_stops_questions_fail(shares, database, clock, passed):
    database.delay = 5
    asking = asyncio.create_task(shares.share(Ask(key(), 1)))
    await settle()
    await clock.pass_time(passed)

    await shares.close()

    with pytest.raises(Unavailable):
        await asking


async def ask(shares: Shares, clock: ManualClock, ask: Ask, holder: str | None = None) -> Share:
    task = asyncio.create_task(shares.share(ask, holder))
    await settle()
    await clock.pass_time(SPACING + GATHERING, step=0.05)
    return await task


async def test_a_host_returns_no_token_that_it_was_not_granted(shares, database, clock):
    """A lie would fill the bucket of its org again and again."""
    await ask(shares, clock, Ask(key(), 5), "host")
    await ask(shares, clock, Ask(key(), 0, returned=10**9, granted_at=10**12), "host")
    await ask(shares, clock, Ask(key(), 0, returned=10**9, granted_at=10**12), "host")

    returned = [each.returned for _, each in database.asked()]
    assert returned == [0, 5, 0]
    assert database.asked()[1][1].granted_at == pytest.approx(clock.now().timestamp(), abs=2)


async def test_numbers_of_a_host_have_a_ceiling(shares, database, clock):
    await ask(shares, clock, Ask(key(), 10**12, 0, 0.0, 10**12, 10**12), "host")
    await ask(shares, clock, Ask(key(), -5, -5, 0.0, -5, -5), "host")

    (_, high), (_, low) = database.asked()
    assert (high.want, high.slots, high.in_use) == (MAX_COUNT, MAX_COUNT, MAX_COUNT)
    assert (low.want, low.returned, low.slots, low.in_use) == (0, 0, 0, 0)


async def test_what_was_granted_long_ago_does_not_come_back(shares, database, clock):
    await ask(shares, clock, Ask(key(), 5))
    await clock.pass_time(LIFE + POLL + 1)

    await ask(shares, clock, Ask(key(), 0, returned=5, granted_at=clock.now().timestamp()))

    assert database.asked()[-1][1].returned == 0


async def test_a_pause_is_told_at_once_and_stored(shares, database, clock, told):
    storing = asyncio.create_task(shares.pause("org", ORIGIN, 30))
    await settle()
    assert [(each.org_id, each.seconds) for each in told] == [("org", 30)]

    await clock.pass_time(1, step=0.05)

    await storing
    [[stored]] = [argument for name, _, argument in database.calls if name == "pause"]
    assert (stored.org_id, stored.origin) == ("org", ORIGIN)
    assert stored.seconds == pytest.approx(30, abs=0.1)


async def test_a_flood_of_429_is_few_transactions_and_events(shares, database, clock, told):
    """All orgs of a service that is down, and every request that was under way."""
    storing = []
    for _ in range(10):
        for number in range(100):
            storing.append(asyncio.create_task(shares.pause(f"org {number}", ORIGIN, 5)))
        await clock.pass_time(0.05)

    await clock.pass_time(1, step=0.05)

    assert len(database.times("pause")) == 1
    assert all(task.done() for task in storing)
    assert len(told) == 100


async def test_a_pause_that_a_service_asks_for_has_a_ceiling(shares, clock, told):
    storing = asyncio.create_task(shares.pause("org", ORIGIN, 1e12))
    await clock.pass_time(1, step=0.05)
    await storing

    assert told[0].seconds == MAX_PAUSE


async def test_a_pause_that_is_not_stored_holds_here(shares, database, clock, told):
    database.broken = True
    storing = asyncio.create_task(shares.pause("org", ORIGIN, 30))
    await clock.pass_time(1, step=0.05)

    with pytest.raises(StoreUnavailable):
        await storing
    assert len(told) == 1


async def test_pauses_of_other_workers_are_known_within_a_second(shares, database, clock, told):
    loop = asyncio.create_task(shares.run())
    shares.note_requests()
    await settle()
    database.pauses = [Pause("org", ORIGIN, 20)]

    await clock.pass_time(1, step=0.1)

    assert {(each.org_id, each.origin) for each in told} == {("org", ORIGIN)}
    loop.cancel()


async def test_pauses_are_looked_at_only_while_there_are_requests_or_pauses(shares, database, clock):
    loop = asyncio.create_task(shares.run())
    await clock.pass_time(10, step=0.5)
    assert database.calls == []

    shares.note_requests()
    await clock.pass_time(ACTIVE + 1, step=0.25)
    looked = len(database.times("pauses"))
    assert looked <= ACTIVE / POLL + 2
    await clock.pass_time(10, step=0.5)
    assert len(database.times("pauses")) == looked
    loop.cancel()


async def test_the_limits_are_kept_for_a_while_and_through_an_outage(shares, database, clock):
    first, again = await shares.limits(), await shares.limits()
    database.broken = True
    clock.advance(10)

    assert first == again == await shares.limits()
    assert database.times("load") == [1000.0, 1010.0]


def test_metrics_name_only_so_many_origins(shares):
    labels = {shares.label_of(f"https://{number}.example") for number in range(MAX_ORIGINS + 50)}

    assert len(labels) == MAX_ORIGINS + 1
    assert OTHERS in labels


def test_all_workers_know_of_a_pause_within_a_second():
    """It is gathered and stored by one; another reads it, and its broker asks again."""
    assert GATHERING + POLL + KNOWN < 1.0
