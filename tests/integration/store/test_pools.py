"""Pools: a worker admits runs of the pools that it serves, and no other."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

import pytest

from tests.fakes.stock import HANDLER, Stock
from worker.handlers.catalogue import HandlerEntry
from worker.ids import WorkerId, new_id
from worker.model.claims import PoolRules, Rules
from worker.model.runs.run import AdmittedRun, Declared
from worker.store import catalogue, edit_runs, tables
from worker.store import pools as stored_pools
from worker.store.ring_walk import RingWalk
from worker.store.worker_store import WorkerStore


def test_a_run_goes_to_a_worker_of_its_pool_only(stock: Stock) -> None:
    org = stock.org()
    run = stock.run(org, pool="eu-gpu")
    stock.put(run)
    elsewhere, of_the_pool = stock.worker(), stock.worker(pools=["eu-gpu"])

    assert stock.admit(elsewhere) == []
    (admitted,) = stock.admit(of_the_pool)

    assert (admitted.id, admitted.pool) == (run.id, "eu-gpu")
    assert stock.stored(run.id)["pool"] == "eu-gpu"


def test_without_a_pool_a_run_is_in_the_default_one(stock: Stock) -> None:
    run = stock.run(stock.org())
    stock.put(run)

    assert stock.admit(stock.worker(pools=["eu-gpu"])) == []
    (admitted,) = stock.admit(stock.worker())

    assert (admitted.pool, stock.stored(run.id)["pool"]) == ("default", "default")


def test_a_run_made_by_hand_keeps_its_pool(stock: Stock) -> None:
    run = stock.run(stock.org(), pool="eu-gpu")
    stock.within(edit_runs.insert_run, run, at=stock.now())

    assert stock.admit(stock.worker()) == []
    assert [admitted.pool for admitted in stock.admit(stock.worker(pools=["eu-gpu"]))] == ["eu-gpu"]


def test_a_worker_of_several_pools_ranks_their_runs_together(stock: Stock) -> None:
    org, at = stock.org(limit=2), stock.now()
    older = stock.run(org, pool="b", available_at=at - timedelta(seconds=9))
    newer = stock.run(org, pool="a", available_at=at - timedelta(seconds=1))
    oldest = stock.run(org, pool="c", available_at=at - timedelta(seconds=99))
    urgent = stock.run(org, pool="a", priority=1)
    stock.put(newer, older, oldest, urgent)

    admitted = stock.admit(stock.worker(pools=["a", "b"]))

    assert [run.id for run in admitted] == [urgent.id, older.id]


def test_the_limit_of_an_org_holds_over_all_pools(stock: Stock) -> None:
    org = stock.org(limit=3)
    stock.put(*(stock.run(org, pool=pool) for pool in ("a", "b") for _ in range(5)))
    one, other = stock.worker(pools=["a"]), stock.worker(pools=["b"])

    assert len(stock.admit(one, 2)) == 2
    assert len(stock.admit(other)) == 1
    assert stock.admit(one) == []


def test_runs_of_other_pools_before_it_do_not_hide_a_run(stock: Stock) -> None:
    org, at = stock.org(limit=100), stock.now()
    stock.put(
        *(stock.run(org, pool="full", available_at=at - timedelta(seconds=100 + n)) for n in range(50)),
        mine := stock.run(org, pool="mine"),
    )

    assert [run.id for run in stock.admit(stock.worker(pools=["mine"]), 1)] == [mine.id]


def test_the_newest_of_another_pool_do_not_go_first(stock: Stock) -> None:
    """The part of each admission that goes to the newest runs looks at the pool, too."""
    orgs = [stock.org() for _ in range(40)]
    stock.put(*(stock.run(org, pool="mine" if n % 2 else "other") for n, org in enumerate(orgs)))
    worker = stock.worker(pools=["mine"])

    admitted = [run for _ in range(8) for run in stock.admit(worker, 5)]

    assert Counter(run.pool for run in admitted) == {"mine": 20}


def test_a_worker_that_serves_no_pool_at_the_moment_admits_nothing(stock: Stock) -> None:
    worker = stock.worker()
    stock.put(stock.run(stock.org()))
    walk = RingWalk(stock.database, worker, pools=())

    assert walk.admit({HANDLER: None}, {"child": 5}) == []

    walk.pools = ("default",)
    assert len(walk.admit({HANDLER: None}, {"child": 5})) == 1


async def test_the_store_of_a_worker_registers_its_pools_and_admits_from_them(stock: Stock) -> None:
    worker = WorkerId(new_id())
    store = WorkerStore(stock.database, worker, timedelta(seconds=30), pools=["eu", "a"])
    store.register(version="1", handlers=[HANDLER], capacity={})
    stock.put(stock.run(stock.org(), pool="eu"), stock.run(stock.org()))

    admitted = await store.admit({HANDLER: None}, {"child": 5})

    assert [run.pool for run in admitted] == ["eu"]
    (row,) = stock.all(tables.workers, tables.workers.c.id == worker)
    assert row["pools"] == ["a", "eu"]


@pytest.mark.parametrize("seed", range(3))
def test_every_run_ends_up_in_its_pool_and_all_of_them_start(stock: Stock, seed: int) -> None:
    """Random orgs, pools, limits and workers: no run in a wrong pool, and none that may start is left."""
    dice = random.Random(seed)
    pools = ["default", "eu", "us", "gpu", "null"]
    orgs = [stock.org(limit=dice.choice((1, 2, 50))) for _ in range(12)]
    runs = [
        stock.run(
            dice.choice(orgs),
            pool=dice.choice(pools),
            priority=dice.choice((0, 0, 1)),
            isolation=dice.choice(("child", "inline")),
        )
        for _ in range(150)
    ]
    stock.put(*runs)
    serves = {
        stock.worker(pools=chosen): set(chosen)
        for chosen in ([dice.choice(pools)], dice.sample(pools, 2), dice.sample(pools, 3), pools)
    }
    wanted = {run.id: run.pool for run in runs}
    started: dict[str, str] = {}

    while len(started) < len(runs):
        ended: list[tuple[WorkerId, AdmittedRun]] = []
        for worker, served in serves.items():
            for run in stock.admit(worker, 4, inline=4):
                assert run.pool == wanted[run.id]
                assert run.pool in served
                started[run.id] = run.pool
                ended.append((worker, run))
        assert ended, "no run starts, and some wait"
        for worker, run in ended:
            stock.finish(worker, stock.ended(run))

    assert started == wanted


def opened(stock: Stock, rules: Rules | None = None, pools: Sequence[str] = ("default", "eu")) -> WorkerStore:
    """The store of a worker that has just registered, with these rules in its configuration."""
    store = WorkerStore(
        stock.database, WorkerId(new_id()), timedelta(seconds=30), pools=pools, pool_rules=PoolRules(rules)
    )
    store.register(version="1", handlers=[HANDLER], capacity={})
    return store


async def admitted_by(store: WorkerStore) -> set[str]:
    """The pools of the runs that the worker admits now."""
    return {run.pool for run in await store.admit({HANDLER: None}, {"child": 50})}


async def test_a_worker_without_the_rules_of_a_pool_learns_those_that_another_stored(stock: Stock) -> None:
    early = opened(stock)
    opened(stock, {"eu": {"region": "eu", "copies": 2}})
    late = opened(stock)

    assert early.pool_rules.stored == {}
    await early.look_at_pools()

    for store in (early, late):
        assert store.pool_rules.stored == {"eu": {"region": "eu", "copies": "2"}}
        assert store.pool_rules.differing == set()


async def test_a_worker_with_older_rules_takes_no_run_of_that_pool(stock: Stock) -> None:
    older = opened(stock, {"eu": {"region": "eu"}})
    same = opened(stock, {"eu": {"region": "eu"}})
    newer = opened(stock, {"eu": {"region": "europe"}})
    stock.put(*(stock.run(stock.org(), pool=pool) for pool in ("default", "eu", "default", "eu")))
    for store in (older, same, newer):
        await store.look_at_pools()

    assert await admitted_by(older) == {"default"}
    assert await admitted_by(same) == set()
    assert await admitted_by(newer) == {"eu"}

    stock.put(stock.run(stock.org(), pool="eu"))
    assert await admitted_by(older) == set()
    assert await admitted_by(opened(stock, {"eu": {"region": "europe"}})) == {"eu"}


async def test_rules_stay_until_someone_forgets_them(stock: Stock) -> None:
    store = opened(stock, {"eu": {"region": "eu"}})
    other = opened(stock)

    with stock.database.transaction() as connection:
        assert stored_pools.forget_rules(connection, "eu") == {"region": "eu"}
        assert stored_pools.forget_rules(connection, "eu") is None
    await other.look_at_pools()
    await store.look_at_pools()

    assert other.pool_rules.stored == {}
    assert store.pool_rules.differing == {"eu"}


async def test_what_handlers_of_other_workers_and_hosts_declare_is_known(stock: Stock) -> None:
    entries = [
        HandlerEntry("acme.gpu", "acme-jobs", "1", "acme:gpu", isolation="inline", pool="eu-gpu"),
        HandlerEntry("acme.broken", "acme-jobs", "1", "acme:broken", pool="us", error="ImportError"),
    ]
    stock.within(catalogue.put, entries, at=stock.now())

    assert await opened(stock).look_at_pools() == {"acme.gpu": Declared("inline", "eu-gpu")}
