"""Placements: a run on its way to a host is its placing worker's until one host takes it, once."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import pytest

from tests.fakes.stock import HANDLER, LEASE, Stock
from worker.diagnosis import doctor
from worker.ids import RunId, WorkerId, new_id
from worker.model.runs.children import FamilyCap, NewChild
from worker.model.runs.hosts import PoolRoom, Ticket
from worker.model.runs.run import AdmittedRun
from worker.store import children, placements, tables, workers
from worker.store.database import Database
from worker.store.ring_walk import RingWalk

POOL = "eu-gpu"


class Pool:
    """A placing worker, and hosts of the pool."""

    def __init__(self, stock: Stock) -> None:
        self.stock = stock
        self.placer = stock.worker()
        self._walk = RingWalk(stock.database, self.placer, pools=(POOL,), placing=True)

    def host(self, slots: int = 10, *, inline: int = 0, handlers: Sequence[str] = (HANDLER,)) -> WorkerId:
        host = WorkerId(new_id())
        self.stock.within(
            workers.register,
            host,
            host="there",
            pid=1,
            version="1",
            lease=LEASE,
            handlers=handlers,
            capacity={"children": slots, "inline": inline},
            pools=[POOL],
            host_id=new_id(),
        )
        return host

    def put(self, count: int = 1, **values: object) -> None:
        org = self.stock.org(limit=1000)
        self.stock.put(*self.stock.runs([org] * count, pool=POOL, **values))

    def admit(self, free: int = 1000) -> list[AdmittedRun]:
        return self._walk.admit({HANDLER: None}, {"child": free, "inline": free})

    def place(self, runs: Sequence[AdmittedRun]) -> list[Ticket]:
        tickets = [Ticket.new(run.id, run.fencing_token) for run in runs]
        self.stock.within(
            placements.place,
            self.placer,
            POOL,
            {(ticket.run_id, ticket.fencing_token): ticket.sha256 for ticket in tickets},
        )
        return tickets

    def placed(self) -> tuple[AdmittedRun, Ticket]:
        """A run that was placed."""
        self.put()
        (run,) = self.admit(1)
        (ticket,) = self.place([run])
        return run, ticket

    def take(self, host: WorkerId, ticket: Ticket) -> AdmittedRun | None:
        return self.stock.within(placements.take, host, ticket)

    def withdraw(self, run: AdmittedRun, worker: WorkerId | None = None) -> set[tuple[RunId, int]]:
        return self.stock.within(
            placements.withdraw,
            worker or self.placer,
            [(run.id, run.fencing_token)],
            detail="no host took it",
            after=timedelta(),
        )

    def recover(self) -> list[object]:
        return list(self.stock.within(workers.recover, max_recoveries=3))

    def open_placements(self) -> list[dict[str, object]]:
        return self.stock.all(tables.placements)


@pytest.fixture
def pool(stock: Stock) -> Pool:
    return Pool(stock)


def test_a_host_takes_a_placed_run_and_its_timeout_starts_then(pool: Pool, stock: Stock) -> None:
    host = pool.host()
    run, ticket = pool.placed()

    taken = pool.take(host, ticket)

    assert taken is not None
    assert (taken.id, taken.fencing_token, taken.attempt, taken.pool) == (run.id, 1, 1, POOL)
    assert taken.started_at >= run.started_at
    live = stock.unended(run.id)
    assert (live["worker_id"], live["started_at"], live["state"]) == (host, taken.started_at, "running")
    assert pool.open_placements() == []
    assert stock.finish(host, stock.ended(taken)) == {run.id}


def test_a_ticket_is_valid_once(pool: Pool) -> None:
    host, other = pool.host(), pool.host()
    _, ticket = pool.placed()
    assert pool.take(host, ticket) is not None

    assert pool.take(host, ticket) is None
    assert pool.take(other, ticket) is None


@pytest.mark.parametrize("what", ["secret", "fence", "run", "pool", "ended", "lapsed", "unknown"])
def test_a_wrong_ticket_or_host_gets_nothing_and_the_right_one_still_does(
    pool: Pool, stock: Stock, what: str
) -> None:
    host, wrong = pool.host(), pool.host()
    run, ticket = pool.placed()
    other, _ = pool.placed()
    used = ticket
    if what == "secret":
        used = Ticket.new(run.id, run.fencing_token)
    elif what == "fence":
        used = Ticket.new(run.id, run.fencing_token + 1)
    elif what == "run":
        parts = ticket.reveal().split(".")
        used = Ticket.parse(".".join((other.id, *parts[1:]))) or ticket
    elif what == "pool":
        wrong = stock.worker(pools=["elsewhere"])
    elif what == "ended":
        stock.within(workers.unregister, wrong)
    elif what == "lapsed":
        stock.let_lease_pass(wrong)
    else:
        wrong = WorkerId(new_id())

    assert pool.take(wrong, used) is None

    assert pool.take(host, ticket) is not None


def test_a_withdrawn_run_waits_as_if_it_had_not_been_placed(pool: Pool, stock: Stock) -> None:
    host = pool.host()
    run, ticket = pool.placed()

    assert pool.withdraw(run) == {(run.id, 1)}

    live = stock.unended(run.id)
    assert (live["state"], live["reason"], live["detail"]) == ("waiting", "unplaced", "no host took it")
    assert (live["attempt"], live["failures"], live["recoveries"], live["fencing_token"]) == (0, 0, 0, 1)
    assert stock.attempts(run.id) == []
    assert pool.open_placements() == []
    assert pool.take(host, ticket) is None
    stock.make_available(run.id)
    (again,) = pool.admit()
    assert (again.id, again.attempt, again.fencing_token) == (run.id, 1, 2)


def test_a_taken_run_cannot_be_withdrawn(pool: Pool, stock: Stock) -> None:
    host = pool.host()
    run, ticket = pool.placed()
    pool.take(host, ticket)

    assert pool.withdraw(run) == set()

    live = stock.unended(run.id)
    assert live["worker_id"] == host


def test_withdrawing_a_run_that_was_asked_to_stop_cancels_it(pool: Pool, stock: Stock) -> None:
    pool.host()
    run, _ = pool.placed()
    stock.change(tables.live_runs, run.id, cancel_requested_at=stock.now(), cancel_reason="requested")

    assert pool.withdraw(run) == {(run.id, 1)}

    assert (stock.stored(run.id)["state"], stock.stored(run.id)["reason"]) == ("cancelled", "requested")
    assert stock.live(run.id) is None
    assert pool.open_placements() == []


def test_the_runs_that_a_dead_worker_placed_wait_and_none_counts_as_lost(pool: Pool, stock: Stock) -> None:
    host = pool.host()
    untaken, _ = pool.placed()
    taken, ticket = pool.placed()
    pool.take(host, ticket)
    pool.put()
    (admitted,) = pool.admit(1)  # it died before this one was placed
    own_org = stock.org()
    stock.put(stock.run(own_org))
    (own,) = stock.admit(pool.placer)
    stock.within(workers.unregister, pool.placer)

    pool.recover()

    for run in (untaken, admitted):
        live = stock.unended(run.id)
        assert (live["state"], live["reason"]) == ("waiting", "unplaced")
        assert (live["recoveries"], live["attempt"]) == (0, 0)
    assert [stock.live(run.id)["reason"] for run in (own,)] == ["recovered"]  # type: ignore[index]
    live = stock.unended(taken.id)
    assert live["worker_id"] == host
    assert pool.open_placements() == []


def test_a_run_that_a_dead_host_had_taken_is_recovered(pool: Pool, stock: Stock) -> None:
    host = pool.host()
    run, ticket = pool.placed()
    pool.take(host, ticket)
    stock.within(workers.unregister, host)

    pool.recover()

    live = stock.unended(run.id)
    assert (live["state"], live["reason"], live["recoveries"]) == ("waiting", "recovered", 1)


def test_no_more_is_admitted_than_the_hosts_have_free_slots(pool: Pool, stock: Stock) -> None:
    host = pool.host(slots=3)
    pool.host(slots=2)
    for other in (["elsewhere"], [POOL]):  # of which the second is no host
        stock.worker(pools=other)
    pool.put(20)

    first = pool.admit(4)
    tickets = pool.place(first)
    pool.take(host, tickets[0])

    assert len(first) == 4
    assert len(pool.admit()) == 1
    assert pool.admit() == []
    stock.finish(host, stock.ended(first[0]))
    assert len(pool.admit()) == 1


def test_slots_of_each_isolation_count_for_themselves(pool: Pool) -> None:
    pool.host(slots=2, inline=3)
    pool.put(5)
    pool.put(5, isolation="inline")

    admitted = pool.admit()

    assert sorted(run.isolation for run in admitted) == ["child"] * 2 + ["inline"] * 3


def test_without_hosts_nothing_is_admitted(pool: Pool, stock: Stock) -> None:
    pool.put()
    host = pool.host()
    stock.let_lease_pass(host)

    assert pool.admit() == []


def test_two_placing_workers_together_admit_no_more_than_there_is_room(postgres: Database) -> None:
    stock = Stock(postgres)
    pool, other = Pool(stock), Pool(stock)
    pool.host(slots=7)
    pool.put(50)
    admitted: list[AdmittedRun] = []

    threads = [
        threading.Thread(target=lambda each=each: [admitted.extend(each.admit()) for _ in range(5)])
        for each in (pool, other)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len({run.id for run in admitted}) == len(admitted) == 7


def test_the_room_of_a_pool_is_what_all_of_its_hosts_offer(pool: Pool, stock: Stock) -> None:
    one = pool.host(slots=5, handlers=[HANDLER, "acme.one"])
    pool.host(slots=4, inline=2, handlers=[HANDLER, "acme.two"])
    pool.host(slots=9, handlers=[])
    _, ticket = pool.placed()
    _, _ = pool.placed()
    pool.take(one, ticket)

    with stock.database.transaction() as connection:
        room = placements.room_of(connection, POOL)
        nowhere = placements.room_of(connection, "elsewhere")

    assert room == PoolRoom({"child": 7, "inline": 2}, {HANDLER: None})
    assert nowhere == PoolRoom({}, {})


def test_what_hosts_of_a_pool_declare_beyond_their_ceiling_is_not_placed(stock: Stock) -> None:
    """Nor does a host limit what another pool's hosts may take."""
    pool, org = Pool(stock), stock.org(limit=1000)
    one, two = pool.host(), pool.host()
    elsewhere = pool.host()
    stock.change(tables.workers, elsewhere, pools=["elsewhere"])
    plain = {"distribution": "gpu", "version": "1", "entry_point": "g:f", "isolation": "child", "scopes": []}
    plain |= {"secrets": [], "timeout": None, "max_attempts": None, "memory": None, "state": False}
    plain |= {"max_concurrent": None}

    def declare(host: WorkerId, **changed: Any) -> None:
        stock.change(tables.workers, host, offers={HANDLER: plain | changed})

    def room() -> Mapping[str, int | None]:
        return stock.within(placements.room_of, POOL).handlers

    declare(one)
    declare(two, max_concurrent=3)
    declare(elsewhere, max_concurrent=0)
    assert room() == {HANDLER: 3}
    declare(two, secrets=["openai"])
    assert room() == {}
    # With a definition that lists its scopes, the handler's are not used.
    declare(two, scopes=["admin"])
    assert room() == {}
    scoped = stock.definition(org, spec={"handler": HANDLER, "scopes": ["read"]})
    stock.put(stock.run(org, scoped, pool=POOL))
    assert room() == {HANDLER: None}


def test_what_a_worker_has_placed_is_listed_until_it_is_taken(pool: Pool, stock: Stock) -> None:
    host = pool.host()
    run, ticket = pool.placed()
    cancelled, _ = pool.placed()
    ended, _ = pool.placed()
    stock.change(tables.live_runs, cancelled.id, cancel_requested_at=stock.now(), cancel_reason="requested")
    stock.finish(pool.placer, stock.ended(ended, "cancelled"))

    def listed() -> dict[str, bool]:
        found = stock.within(placements.placed_by, pool.placer, POOL)
        return {placed.placement.run_id: placed.cancel_requested for placed in found}

    assert listed() == {run.id: False, cancelled.id: True}
    # Forgotten is what has ended without being taken.
    assert {row["run_id"] for row in pool.open_placements()} == {run.id, cancelled.id}
    pool.take(host, ticket)
    assert listed() == {cancelled.id: True}


def test_due_runs_of_a_pool_whose_engine_is_away_say_so(pool: Pool, stock: Stock) -> None:
    pool.host()
    pool.put(2)
    pool.put(available_at=stock.now() + timedelta(hours=1))
    elsewhere = stock.run(stock.org())
    stock.put(elsewhere)

    def mark(detail: str | None) -> int:
        return stock.within(placements.mark, POOL, detail)

    def reasons() -> list[tuple[str, str, str | None]]:
        rows = stock.all(tables.live_runs)
        return sorted((row["pool"], row["reason"], row["detail"]) for row in rows)

    assert mark("Temporal is away") == 2
    assert mark("Temporal is away") == 0
    away = [(POOL, "unplaced", "Temporal is away")] * 2
    assert reasons() == [("default", "due", None), (POOL, "due", None), *away]
    assert mark(None) == 2
    assert reasons() == [("default", "due", None), *[(POOL, "due", None)] * 3]
    assert len(pool.admit()) == 2


def test_doctor_names_handlers_that_only_some_hosts_offer(pool: Pool, stock: Stock) -> None:
    assert doctor.placed_pool(stock.database, POOL).ok
    pool.host(handlers=[HANDLER, "acme.one"])
    assert doctor.placed_pool(stock.database, POOL).ok
    pool.host(handlers=[HANDLER])
    pool.host(handlers=[])

    found = doctor.placed_pool(stock.database, POOL)

    assert not found.ok
    assert found.detail == f"not all hosts of pool {POOL} offer acme.one, so its runs are not placed"


def test_children_are_placed_in_the_pool_of_their_tree(stock: Stock) -> None:
    """By the placer, whichever it is; a worker of another pool does not take them."""
    pool = Pool(stock)
    pool.host()
    pool.put()
    [run] = pool.admit()
    new, cap = NewChild(HANDLER, "page", 1, "{}"), FamilyCap(HANDLER)
    placed = stock.within(children.start, run, [new], cap=cap, keep=False, isolations={HANDLER: "child"})
    assert isinstance(placed, list)

    assert stock.admit(stock.worker()) == []
    [child] = pool.admit()

    assert (child.id, child.origin, child.pool) == (placed[0].run_id, "child", POOL)
    [ticket] = pool.place([child])
    assert ticket.run_id == child.id
