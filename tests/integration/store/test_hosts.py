"""Hosts in the database: whose token it is, which incarnation is its own, and which runs are."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from tests.fakes.stock import LEASE, Stock
from worker.features.hosts import operations as operations
from worker.ids import RunId, WorkerId, new_id
from worker.model.runs.hosts import HostCaller
from worker.store import hosts, sign_in, tables, workers

SLOTS: Mapping[str, Any] = {"children": 2, "inline": 5}


def added(stock: Stock, name: str = "gpu1", pool: str = "default") -> tuple[str, HostCaller]:
    """A new host: the hash of its token, and the host as a call of it finds it."""
    row = operations.add_host(stock.database, name, pool, actor="test")
    digest = sign_in.sha256(row["token"])
    found = find(stock, digest)
    assert found is not None
    return digest, found


def find(stock: Stock, digest: str, incarnation: str | None = None) -> HostCaller | None:
    return stock.reading(hosts.find, digest, incarnation)


def begin(stock: Stock, host: HostCaller, lease: timedelta = LEASE) -> WorkerId:
    worker = WorkerId(new_id())
    stock.within(
        hosts.begin, host, worker, lease=lease, capacity=SLOTS, host="gpu1.local", pid=7, version="1"
    )
    return worker


def owned(stock: Stock, worker: WorkerId, fences: Mapping[RunId, int]) -> set[RunId]:
    return {run.id for run in stock.reading(hosts.owned, worker, fences)}


def test_a_host_is_found_by_its_token_and_its_own_incarnation(stock: Stock) -> None:
    digest, host = added(stock, pool="eu-gpu")
    other_digest, _ = added(stock, "gpu2", pool="eu-gpu")
    worker = begin(stock, host)

    mine, foreign = find(stock, digest, worker), find(stock, other_digest, worker)

    assert mine is not None
    assert (mine.name, mine.pool, mine.worker, mine.ended) == ("gpu1", "eu-gpu", worker, False)
    assert foreign is not None
    assert foreign.worker is None
    assert find(stock, sign_in.sha256("guessed"), worker) is None
    assert digest not in repr(mine)


def test_a_removed_host_has_no_token_and_no_incarnation(stock: Stock) -> None:
    digest, host = added(stock)
    worker = begin(stock, host)

    operations.remove_host(stock.database, "gpu1", actor="test")

    assert find(stock, digest, worker) is None
    (row,) = stock.all(tables.workers, tables.workers.c.id == worker)
    assert row["ended_at"] is not None
    again, _ = added(stock)  # the name is free
    assert again != digest


def test_a_removed_host_is_forgotten_with_its_incarnations(stock: Stock) -> None:
    _, host = added(stock)
    begin(stock, host)
    added(stock, "kept")
    operations.remove_host(stock.database, "gpu1", actor="test")
    stock.change(tables.hosts, host.id, removed_at=stock.now() - timedelta(days=90))
    stock.change(
        tables.workers, stock.all(tables.workers)[0]["id"], ended_at=stock.now() - timedelta(days=90)
    )

    stock.within(workers.forget_workers, timedelta(days=30))

    assert [row["name"] for row in stock.all(tables.hosts)] == ["kept"]
    assert stock.all(tables.workers) == []


def test_an_incarnation_that_ended_or_served_another_pool_is_over(stock: Stock) -> None:
    digest, host = added(stock)
    worker, moved = begin(stock, host), begin(stock, host)

    stock.within(workers.unregister, worker)
    stock.change(tables.workers, moved, pools=["eu-gpu"])

    over = [find(stock, digest, incarnation) for incarnation in (worker, moved)]
    assert [found and (found.ended, found.moved) for found in over] == [(True, False), (False, True)]


def test_only_runs_under_their_fencing_token_are_owned(stock: Stock) -> None:
    _, host = added(stock)
    worker, other = begin(stock, host), stock.worker()
    org = stock.org()
    stock.put(*(stock.run(org) for _ in range(3)))
    first, second = stock.admit(worker, 2)
    (foreign,) = stock.admit(other, 1)

    fences = {first.id: first.fencing_token, second.id: second.fencing_token + 1, foreign.id: 1}

    assert owned(stock, worker, fences) == {first.id}
    assert owned(stock, worker, {}) == set()
    (run,) = stock.reading(hosts.owned, worker, {first.id: first.fencing_token})
    assert run == first


def test_runs_of_a_pool_are_due_or_not(stock: Stock) -> None:
    org = stock.org()
    later = stock.run(org, pool="eu", available_at=stock.now() + timedelta(hours=1))
    stock.put(stock.run(org), later)

    def due(pool: str) -> bool:
        return stock.reading(hosts.load, pool) is not None

    assert (due("default"), due("eu"), due("us")) == (True, False, False)
    stock.make_available(later.id)
    assert due("eu")
    stock.admit(stock.worker())
    assert not due("default")


def test_hosts_do_not_count_as_workers_that_request_tokens(stock: Stock) -> None:
    _, host = added(stock)
    begin(stock, host)
    stock.worker()

    assert stock.reading(workers.live_workers) == 1


def test_the_list_says_how_each_host_is(stock: Stock) -> None:
    for name in ("absent", "late", "ready", "stopped"):
        _, host = added(stock, name)
        if name == "absent":
            continue
        lease = timedelta(seconds=-1) if name == "late" else LEASE
        worker = begin(stock, host, lease)
        if name == "stopped":
            stock.within(workers.unregister, worker)

    rows = operations.list_hosts(stock.database)

    assert {row["name"]: row["state"] for row in rows} == {
        name: name for name in ("absent", "late", "ready", "stopped")
    }
    assert rows[1]["machine"] == "gpu1.local"
    assert "token_sha256" not in rows[0]


def test_the_runs_of_a_lost_host_are_recovered_and_those_of_a_live_one_are_not(stock: Stock) -> None:
    _, host = added(stock)
    lost, alive = begin(stock, host, timedelta(seconds=-1)), begin(stock, host)
    org = stock.org()
    stock.put(*(stock.run(org) for _ in range(2)))
    stock.change(tables.workers, lost, lease_until=stock.now() + LEASE)
    (theirs,) = stock.admit(lost, 1)
    (mine,) = stock.admit(alive, 1)
    stock.change(tables.workers, lost, lease_until=stock.now() - LEASE)

    recovered = stock.within(workers.recover, max_recoveries=3)

    assert [run.run_id for run in recovered] == [theirs.id]
    assert owned(stock, alive, {mine.id: mine.fencing_token}) == {mine.id}


def test_a_host_whose_lease_has_passed_gets_no_run(stock: Stock) -> None:
    _, host = added(stock)
    late, alive = begin(stock, host, timedelta(seconds=-1)), begin(stock, host)
    stock.put(stock.run(stock.org()))

    assert stock.admit(late) == []
    assert len(stock.admit(alive)) == 1


def test_a_worker_that_starts_on_sqlite_leaves_the_hosts_runs(sqlite_stock: Stock) -> None:
    stock = sqlite_stock
    _, host = added(stock)
    alive, before, now = begin(stock, host), stock.worker(), stock.worker()
    org = stock.org()
    stock.put(*(stock.run(org) for _ in range(2)))
    (mine,) = stock.admit(alive, 1)
    (theirs,) = stock.admit(before, 1)

    recovered = stock.within(workers.recover, max_recoveries=3, others_than=now)

    assert [run.run_id for run in recovered] == [theirs.id]
    assert owned(stock, alive, {mine.id: mine.fencing_token}) == {mine.id}
