"""WorkerStore: what the loops call, carried through once from definition to outcome."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest

from tests.fakes.stock import HANDLER, LEASE, Stock
from worker.ids import DefinitionId, WorkerId, new_id
from worker.model.runs.run import Decision, DueDefinition, LogLine, NextFire, StoredProgress
from worker.store import credentials
from worker.store.ring_walk import RingWalk
from worker.store.worker_store import WorkerStore

OFFERED = {HANDLER: None}


@pytest.fixture
def store(stock: Stock) -> WorkerStore:
    store = WorkerStore(stock.database, WorkerId(new_id()), LEASE)
    store.register(version="1", handlers=[HANDLER], capacity={"child": 3})
    return store


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


async def test_a_sweep_tells_what_expired(stock: Stock, store: WorkerStore) -> None:
    late = stock.run(stock.org(), start_by=stock.now() - timedelta(seconds=1))
    stock.put(late)
    await store.handlers_changed([])

    assert [run.run_id for run in await store.sweep()] == [late.id]


async def test_orgs_and_definitions_are_read_together(stock: Stock, store: WorkerStore) -> None:
    """Each with the spec of its own revision; what is gone is left out."""
    acme, globex = stock.org(), stock.org()
    of_acme, of_globex = stock.definition(acme, spec={"v": 1}), stock.definition(globex, spec={"v": "é"})
    gone = DefinitionId(new_id())

    found = await store.orgs_and_definitions([(of_globex, 1), (of_acme, 1), (of_acme, 2), (gone, 1)])

    assert {key: (context.org_id, json.loads(context.spec)) for key, context in found.items()} == {
        (of_acme, 1): (acme, {"v": 1}),
        (of_globex, 1): (globex, {"v": "é"}),
    }


async def test_credentials_are_confirmed_together(stock: Stock) -> None:
    """The active ones of each org, newest first."""
    acme, globex, without = stock.org(), stock.org(), stock.org()
    rows = [
        {"id": new_id(), "org_id": org, "generation": generation, "client_id": "c", "state": state}
        | {"kind": "client_secret", "created_at": stock.now(), "created_by": "tester"}
        for org, generation, state in (
            (acme, 1, "retired"),
            (acme, 2, "active"),
            (acme, 3, "active"),
            (globex, 1, "active"),
            (globex, 2, "pending"),
        )
    ]
    with stock.database.transaction() as connection:
        credentials.add(connection, rows)
        found = credentials.active_ids(connection, [globex, without, acme])

    assert found == {acme: [rows[2]["id"], rows[1]["id"]], globex: [rows[3]["id"]]}


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


async def test_ends_free_their_limits_for_what_is_admitted_with_them(sqlite_stock: Stock) -> None:
    """One transaction for both, within every limit; an end that is fenced out frees nothing."""
    stock, worker_id = sqlite_stock, WorkerId(new_id())
    store = WorkerStore(stock.database, worker_id, LEASE)
    store.register(version="1", handlers=[HANDLER], capacity={"child": 3})
    one_at_a_time, other = stock.org(limit=1), stock.org(limit=1)
    waiting = [stock.run(one_at_a_time) for _ in range(3)]
    lost = [stock.run(other) for _ in range(2)]
    stock.put(*waiting, *lost)
    first, second = await store.admit(OFFERED, {"child": 2})
    mine, stale = (first, second) if first.org_id == one_at_a_time else (second, first)

    ends = [stock.ended(mine), replace(stock.ended(stale), fencing_token=7)]
    accepted, admitted = await store.finish_and_admit(ends, OFFERED, {"child": 2})

    assert store.refills
    assert accepted == {mine.id}
    assert [run.org_id for run in admitted] == [one_at_a_time]
    assert stock.live(mine.id) is None
    assert stock.live(stale.id)["state"] == "running"
    assert {owned.id for owned in store.renew()[1]} == {stale.id, admitted[0].id}


async def test_neither_ends_nor_admissions_are_written_if_one_of_them_fails(
    sqlite_stock: Stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = sqlite_stock
    store = WorkerStore(stock.database, WorkerId(new_id()), LEASE)
    store.register(version="1", handlers=[HANDLER], capacity={"child": 3})
    org = stock.org()
    stock.put(stock.run(org), stock.run(org))
    (run,) = await store.admit(OFFERED, {"child": 1})
    admit = RingWalk.admit

    def fails(*args: Any) -> None:
        admit(*args)
        raise RuntimeError("after the admission")

    monkeypatch.setattr(RingWalk, "admit", fails)
    with pytest.raises(RuntimeError):
        await store.finish_and_admit([stock.ended(run)], OFFERED, {"child": 1})

    assert [owned.id for owned in store.renew()[1]] == [run.id]
    assert await store.finish([stock.ended(run)]) == {run.id}
