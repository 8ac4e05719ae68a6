"""What is due next, in pages: the schedule as the renewal of tokens reads it."""

from __future__ import annotations

import json
from datetime import timedelta

from tests.fakes.clock import ManualClock
from tests.fakes.stock import LEASE, Stock
from worker.ids import DefinitionId
from worker.store import firing
from worker.store.database import Database
from worker.store.worker_store import WorkerStore


async def read(store: WorkerStore, after: firing.Place | None = None, limit: int = 100):
    return await store.upcoming(after, timedelta(minutes=15), limit)


def make(database: Database, stock: Stock) -> WorkerStore:
    return WorkerStore(database, stock.worker(), LEASE)


async def test_due_definitions_come_in_order_and_in_pages(database: Database, stock: Stock):
    store, now = make(database, stock), stock.now()
    org = stock.org()
    late = stock.definition(org, due_at=now + timedelta(minutes=14))
    hour = sorted(stock.definition(org, due_at=now + timedelta(minutes=10)) for _ in range(3))
    stock.definition(org, due_at=now + timedelta(minutes=16))
    stock.definition(org, due_at=now - timedelta(minutes=1))
    stock.definition(org)

    pages, after = list[DefinitionId](), None
    for _ in range(10):
        _, page = await read(store, after, limit=2)
        pages += [each.definition_id for each in page]
        if len(page) < 2:
            break
        after = (page[-1].next_fire_at, page[-1].definition_id)

    assert pages == [*hour, late]


async def test_a_row_has_what_its_token_depends_on(database: Database, stock: Stock):
    store, now = make(database, stock), stock.now()
    org, paused = stock.org(), stock.org(state="paused")
    spec = {"handler": "acme.other", "schedule": "@hourly", "scopes": ["a", "b"]}
    due_at = now + timedelta(minutes=1)
    stock.definition(org, due_at=due_at, spec=spec)
    stock.definition(paused, due_at=now + timedelta(minutes=2))

    time, (first, second) = await read(store)

    assert abs(time - now) < timedelta(minutes=1)
    assert (first.org_id, first.issuer, json.loads(first.spec)) == (org, "main", spec)
    assert first.org_code
    assert (first.next_scheduled_for, first.org_timezone) == (first.next_fire_at, None)
    assert abs(first.next_fire_at - due_at) < timedelta(seconds=1)
    assert second.org_code is None


async def test_workers_that_hold_their_lease_are_counted(
    database: Database, stock: Stock, clock: ManualClock
):
    store = make(database, stock)
    dead = stock.worker()

    assert await store.live_workers() == 2
    stock.let_lease_pass(dead)
    assert await store.live_workers() == 1
