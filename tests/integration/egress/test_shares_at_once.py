"""Two workers' shares and pacers on one database of either kind, with the real clock."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from sqlalchemy import insert

from worker.clock import SystemClock
from worker.features.egress.pacing import Pacer
from worker.features.egress.shares import Shares
from worker.handlers.results import RateLimited
from worker.ids import new_id
from worker.model.limits import Limit
from worker.store import limits, tables
from worker.store.database import Database

ORIGIN = "https://api.example.com"
ORG = "00000000-0000-7000-8000-000000000001"


@pytest.fixture
def database(migrated_url: str) -> Iterator[Database]:
    opened = Database.open(migrated_url, clock=SystemClock())
    yield opened
    opened.close()


class Worker:
    """The parts of a worker and its broker that share a limit."""

    def __init__(self, database: Database) -> None:
        clock = SystemClock()
        self.shares = Shares(database, new_id(), clock, on_pauses=self.paused)
        self.pacer = Pacer(clock, self.shares.share)
        self.looking = asyncio.create_task(self.shares.run())

    def paused(self, pauses) -> None:
        for each in pauses:
            self.pacer.pause(each.org_id, each.origin, each.seconds)

    async def send(self, found: list[Limit], seconds: float) -> int:
        """Send as fast as the limits allow; returns how many."""
        loop = asyncio.get_running_loop()
        until, sent = loop.time() + seconds, 0
        while loop.time() < until:
            try:
                slot = await self.pacer.acquire(ORG, ORIGIN, found, until)
            except RateLimited:
                break
            slot.release()
            sent += 1
        return sent

    async def close(self) -> None:
        self.looking.cancel()
        await self.pacer.close()
        await self.shares.close()


async def test_two_workers_share_one_rate(database: Database):
    with database.transaction() as connection:
        at = database.now(connection)
        values = {"origin": ORIGIN, "per": "org", "rate": "50/s", "burst": 10, "max_wait": "10s"}
        limits.put(connection, values, None, at=at, actor="tester")
    workers = [Worker(database), Worker(database)]
    found = list(await workers[0].shares.limits())

    sent = await asyncio.gather(*(worker.send(found, 2.0) for worker in workers))

    # One at a time, each worker waits for its tokens; two seconds allow 100 with a burst of 30.
    assert 60 <= sum(sent) <= 50 * 3 + 10
    assert min(sent) > 0.2 * sum(sent)
    for worker in workers:
        await worker.close()


async def test_a_pause_that_one_worker_learns_holds_at_the_other_within_a_second(database: Database):
    with database.transaction() as connection:
        at = database.now(connection)
        org = {"id": ORG, "code": "org_acme", "name": "Acme", "issuer": "main", "tags": []}
        connection.execute(insert(tables.orgs).values(**org, created_at=at, updated_at=at))
    one, other = Worker(database), Worker(database)
    other.shares.note_requests()
    await one.shares.pause(ORG, ORIGIN, 600, org="org_acme")
    await asyncio.sleep(1.0)

    for worker in (one, other):
        with pytest.raises(RateLimited) as caught:
            await worker.pacer.acquire(ORG, ORIGIN, [], float("inf"))
        assert 590 < caught.value.retry_after <= 600
        await worker.pacer.acquire(ORG, "https://elsewhere.example", [], float("inf"))
        await worker.close()
