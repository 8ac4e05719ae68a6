"""WorkerStore: what the loops call, carried through once from definition to outcome."""

from __future__ import annotations

import json
from datetime import datetime, timedelta

import pytest

from tests.fakes.stock import HANDLER, LEASE, Stock
from worker.ids import WorkerId, new_id
from worker.runs.run import Decision, DueDefinition, LogLine, NextFire, StoredProgress
from worker.store.worker_store import WorkerStore

OFFERED = {HANDLER: None}


@pytest.fixture
def store(stock: Stock) -> WorkerStore:
    store = WorkerStore(stock.database, WorkerId(new_id()), LEASE)
    store.register(version="1", handlers=[HANDLER], capacity={"child": 3})
    return store


@pytest.mark.anyio
async def test_a_definition_is_carried_to_its_outcome(stock: Stock, store: WorkerStore) -> None:
    org = stock.org()
    spec = {"handler": HANDLER, "params": {"n": 1}}
    definition = stock.definition(org, due_at=stock.now() - timedelta(seconds=1), spec=spec)

    def decide(due: DueDefinition, now: datetime) -> Decision:
        run = stock.run(
            due.org_id,
            due.definition_id,
            origin="schedule",
            scheduled_for=due.next_scheduled_for,
            serial=True,
        )
        return Decision([run], [], NextFire(due.definition_id, None, None))

    report = await store.fire(decide)
    (run,) = await store.admit(OFFERED, {"child": 3})
    context = await store.org_and_definition(run)
    assert report.inserted[0].id == run.id
    assert (context.org_id, context.issuer, json.loads(context.spec)) == (org, "main", spec)
    assert context.definition_name.startswith("definition-")

    assert await store.save_checkpoint(run, "acme.note", '{"done":1}')
    assert await store.load_progress(run.id) == StoredProgress({"done": 1}, "acme.note")
    await store.write_progress([(run.id, run.fencing_token, {"done": 1})])
    await store.append_logs([LogLine(run.id, 1, 1, org, stock.now(), "info", "log", "hello")])
    assert store.renew()[1][0].id == run.id
    assert await store.finish([stock.ended(run)]) == {run.id}

    assert stock.stored(run.id)["state"] == "succeeded"
    assert stock.stored(run.id)["progress"] == {"done": 1}
    assert store.renew() == (True, [])
    assert definition == run.definition_id


@pytest.mark.anyio
async def test_a_new_incarnation_takes_over_what_the_old_one_left(stock: Stock, store: WorkerStore) -> None:
    stock.put(stock.run(stock.org(limit=600)), *(stock.run(stock.org()) for _ in range(3)))
    runs = await store.admit(OFFERED, {"child": 10})
    new = WorkerStore(stock.database, WorkerId(new_id()), LEASE)
    new.register(version="1", handlers=[HANDLER], capacity={})

    recovered = await new.recover_all_others()

    assert {run.run_id for run in recovered} == {run.id for run in runs}
    assert await new.recover(lambda: True) == []
    store.unregister()
    assert not store.renew()[0]


@pytest.mark.anyio
async def test_a_sweep_tells_what_expired(stock: Stock, store: WorkerStore) -> None:
    late = stock.run(stock.org(), start_by=stock.now() - timedelta(seconds=1))
    stock.put(late)
    await store.handlers_changed([])

    assert [run.run_id for run in await store.sweep()] == [late.id]


@pytest.mark.anyio
async def test_the_spec_is_read_once_a_revision(stock: Stock, store: WorkerStore) -> None:
    org = stock.org()
    definition = stock.definition(org, due_at=stock.now() - timedelta(hours=1), spec={"v": 1})
    specs: list[object] = []

    def decide(due: DueDefinition, now: datetime) -> Decision:
        specs.append(due.spec)
        return Decision([], [], NextFire(definition, due.next_scheduled_for, due.next_scheduled_for))

    await store.fire(decide)
    await store.fire(decide)

    assert specs[0] is specs[1]
