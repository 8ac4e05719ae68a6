"""Admit: waiting runs become running ones, fair over held slots and exact within every limit."""

from __future__ import annotations

import random
import threading
from collections import Counter
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.fakes.clock import ManualClock
from tests.fakes.stock import HANDLER, Stock
from tests.faults.proxy import Proxy
from tests.faults.watches import muter
from worker.ids import DefinitionId, OrgId, RunId, WorkerId, new_id
from worker.model.runs.run import AdmittedRun, NewRun
from worker.store import tables
from worker.store.database import Database
from worker.store.dialect import driver
from worker.store.ring_walk import RingWalk
from worker.store.sql.postgresql import admit


def by_org(stock: Stock, worker: WorkerId, free: int) -> Counter[str]:
    return Counter(run.org_id for run in stock.admit(worker, free))


def test_an_admitted_run_is_running_under_a_new_fencing_token(stock: Stock) -> None:
    org, worker = stock.org(), stock.worker()
    run = stock.run(org, params={"n": 1}, start_by=stock.now() + timedelta(hours=1))
    stock.put(run)

    (admitted,) = stock.admit(worker)

    assert admitted.id == run.id
    assert (admitted.attempt, admitted.fencing_token, admitted.failures) == (1, 1, 0)
    assert (admitted.scheduled_for, admitted.available_at) == (run.scheduled_for, run.available_at)
    assert (admitted.params, admitted.start_by) == ({"n": 1}, run.start_by)
    assert admitted.idempotency_key == run.idempotency_key
    live = stock.unended(run.id)
    assert (live["state"], live["reason"], live["worker_id"]) == ("running", None, worker)
    assert live["started_at"] == admitted.started_at
    assert stock.admit(worker) == []


def test_what_is_not_available_yet_waits(stock: Stock) -> None:
    org, worker = stock.org(), stock.worker()
    later = stock.run(org, available_at=stock.now() + timedelta(minutes=1), priority=5)
    now = stock.run(org)
    stock.put(later, now)

    assert [run.id for run in stock.admit(worker)] == [now.id]


def test_priority_goes_first_within_an_org_then_age(stock: Stock) -> None:
    org, worker, at = stock.org(), stock.worker(), stock.now()
    newer = stock.run(org, available_at=at - timedelta(seconds=1))
    older = stock.run(org, available_at=at - timedelta(seconds=9))
    urgent = stock.run(org, priority=1)
    unimportant = stock.run(org, priority=-1, available_at=at - timedelta(hours=1))
    stock.put(newer, older, urgent, unimportant)

    admitted = [run.id for run in stock.admit(worker)]

    assert admitted == [urgent.id, older.id, newer.id, unimportant.id]


@pytest.mark.parametrize("state", ["paused", "suspended", "removed"])
def test_only_an_active_org_starts_anything(stock: Stock, state: str) -> None:
    stock.put(stock.run(stock.org(state=state)))

    assert stock.admit(stock.worker()) == []


def test_no_more_of_an_org_than_its_limit(stock: Stock) -> None:
    org, worker = stock.org(limit=3), stock.worker()
    stock.put(*stock.runs([org] * 10))

    first = stock.admit(worker)
    assert len(first) == 3
    assert stock.admit(worker) == []

    stock.finish(worker, stock.ended(first[0]))
    assert len(stock.admit(worker)) == 1


def test_no_more_of_a_definition_than_its_limit_and_the_others_go_on(stock: Stock) -> None:
    """A long queue of the definition at its limit must not stand in the way of its org's others."""
    org, worker = stock.org(limit=10), stock.worker()
    limited = stock.definition(org)
    stock.put(*stock.runs([org] * 30, limited, max_concurrent=2))
    others = [stock.run(org) for _ in range(5)]
    stock.put(*others)

    started = stock.admit(worker) + stock.admit(worker)

    counts = Counter(run.definition_id for run in started)
    assert counts[limited] == 2
    assert {run.id for run in others} <= {run.id for run in started}


def test_a_handlers_limit_holds_over_all_orgs(stock: Stock) -> None:
    worker = stock.worker()
    stock.put(*(stock.run(stock.org(), handler="acme.heavy") for _ in range(6)))
    stock.put(*(stock.run(stock.org()) for _ in range(3)))
    offered = {"acme.heavy": 2, HANDLER: None}

    started = Counter(run.handler for run in stock.admit(worker, offered=offered))

    assert started == {"acme.heavy": 2, HANDLER: 3}
    assert stock.admit(worker, offered=offered) == []


def test_only_handlers_that_are_offered_and_with_variants_all_of_them(stock: Stock) -> None:
    org, worker = stock.org(), stock.worker()
    plain = stock.run(org)
    foreign = stock.run(org, handler="acme.foreign")
    both = stock.run(org, variant_handlers=(HANDLER, "acme.v2"))
    stock.put(foreign, both, plain)

    assert [run.id for run in stock.admit(worker)] == [plain.id]
    assert [run.id for run in stock.admit(worker, offered={HANDLER: None, "acme.v2": None})] == [both.id]
    assert stock.admit(worker, offered={}) == []


def test_each_isolation_has_its_own_slots(stock: Stock) -> None:
    org, worker = stock.org(limit=50), stock.worker()
    stock.put(*stock.runs([org] * 20))
    stock.put(*stock.runs([org] * 20, isolation="inline"))

    assert Counter(run.isolation for run in stock.admit(worker, 0, inline=4)) == {"inline": 4}
    assert Counter(run.isolation for run in stock.admit(worker, 3, inline=0)) == {"child": 3}
    rest = stock.admit(worker, 2, inline=5) + stock.admit(worker, 0, inline=5)
    assert Counter(run.isolation for run in rest)["inline"] >= 5


def test_nobody_but_a_registered_worker_admits(stock: Stock) -> None:
    worker = stock.worker()
    stock.put(stock.run(stock.org()))
    stock.change(tables.workers, worker, ended_at=stock.now())

    assert stock.admit(worker) == []
    assert stock.admit(WorkerId(new_id())) == []


def test_a_worker_whose_lease_has_passed_admits_nothing(postgres: Database) -> None:
    """Its runs could be taken from it at any moment."""
    stock = Stock(postgres)
    worker = stock.worker()
    stock.put(stock.run(stock.org()))
    stock.let_lease_pass(worker)

    assert stock.admit(worker) == []


def test_an_org_that_adds_few_runs_does_not_wait_behind_one_that_floods(stock: Stock) -> None:
    flood, few, worker = stock.org(limit=100), stock.org(limit=100), stock.worker()
    stock.put(*stock.runs([flood] * 50))
    held = stock.admit(worker, 10)
    stock.put(*stock.runs([few] * 5))

    first_of_few = None
    for n, run in enumerate(held, start=1):
        stock.finish(worker, stock.ended(run))
        (started,) = stock.admit(worker, 1)
        if started.org_id == few:
            first_of_few = n
            break

    assert first_of_few is not None
    assert first_of_few <= 11


def test_slots_are_shared_by_weight(stock: Stock) -> None:
    light, heavy, worker = stock.org(limit=100), stock.org(limit=100, weight=3), stock.worker()
    stock.put(*stock.runs([light] * 60), *stock.runs([heavy] * 60))

    assert by_org(stock, worker, 40) == {light: 10, heavy: 30}


def test_held_slots_count_and_whoever_holds_many_waits(stock: Stock) -> None:
    hog, other, worker = stock.org(limit=100), stock.org(limit=100), stock.worker()
    stock.put(*stock.runs([hog] * 30))
    stock.admit(worker, 10)
    stock.put(*stock.runs([other] * 30))

    assert by_org(stock, worker, 10) == {other: 10}
    assert by_org(stock, worker, 10) == {hog: 5, other: 5}


def test_the_walk_goes_round_and_nobody_is_left_out(stock: Stock) -> None:
    """More orgs than one step looks at, and one slot at a time."""
    worker, orgs = stock.worker(), [stock.org() for _ in range(40)]
    stock.put(*stock.runs(orgs))

    started = [run.org_id for _ in orgs for run in stock.admit(worker, 1)]

    assert sorted(started) == sorted(orgs)
    assert stock.admit(worker, 1) == []


def test_orgs_that_can_start_nothing_do_not_hide_those_behind_them(stock: Stock) -> None:
    worker = stock.worker()
    full = [stock.org(limit=1) for _ in range(40)]
    stock.put(*stock.runs(full), *stock.runs(full))
    assert len(stock.admit(worker)) == 40
    last = stock.run(stock.org())
    stock.put(last)

    assert [run.id for run in stock.admit(worker, 2)] == [last.id]


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_admission_agrees_with_the_plain_ranking(stock: Stock, seed: int, locked: bool) -> None:
    """Random weights, org limits and priorities against the reference, call after call, slots kept."""
    crowd = _Crowd(stock, random.Random(seed), limited=False, locked=locked)
    while True:
        free = crowd.chance.randint(1, 12)
        expected = crowd.expected(free)
        admitted = crowd.admit(free)
        assert admitted == expected
        if not admitted:
            break


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_with_every_kind_of_limit_all_that_may_start_starts_and_no_more(
    stock: Stock, seed: int, locked: bool
) -> None:
    """Admit until no run starts: no limit is ever exceeded, and the reference starts no run either."""
    crowd = _Crowd(stock, random.Random(seed), limited=True, locked=locked)
    while crowd.admit(crowd.chance.randint(1, 12)):
        running = crowd.running()
        for org, (limit, _) in crowd.shares.items():
            assert running[org] <= limit
        for name, most in (crowd.limits | crowd.offered).items():
            assert most is None or running[name] <= most

    assert crowd.expected(50) == []


class _Crowd:
    """Orgs, definitions and waiting runs by chance, and one worker for them."""

    def __init__(self, stock: Stock, chance: random.Random, *, limited: bool, locked: bool) -> None:
        self.stock, self.chance, self.locked = stock, chance, locked
        pairs = ((chance.randint(1, 9), chance.randint(1, 4)) for _ in range(8))
        self.shares = {stock.org(limit=limit, weight=weight): (limit, weight) for limit, weight in pairs}
        definitions = {org: [DefinitionId(new_id()) for _ in range(3)] for org in self.shares}
        self.limits: dict[DefinitionId, int | None] = {
            id_: chance.choice((None, 1, 3)) if limited else None
            for ids in definitions.values()
            for id_ in ids
        }
        handlers = (HANDLER, "acme.b", "acme.c")
        self.offered = {name: chance.choice((None, 4)) if limited else None for name in handlers}
        self.left = {}
        for _ in range(90):
            org = chance.choice(list(definitions))
            definition = chance.choice(definitions[org])
            run = stock.run(
                org,
                definition,
                handler=chance.choice(handlers),
                max_concurrent=self.limits[definition],
                priority=chance.choice((0, 0, 0, 2)),
                available_at=stock.now() - timedelta(seconds=chance.randint(1, 5)),
            )
            self.left[run.id] = run
        stock.put(*self.left.values())
        self.worker = stock.worker(handlers=handlers)

    def admit(self, free: int) -> list[RunId]:
        if self.locked:
            self.stock.walk(self.worker).crowded = True
        admitted = [run.id for run in self.stock.admit(self.worker, free, offered=self.offered)]
        for id_ in admitted:
            del self.left[id_]
        return admitted

    def expected(self, free: int) -> list[RunId]:
        """The reference: each org's line by priority, then age; lines merged by held slots per weight.

        Exact without limits of definitions and handlers; with them it is empty if no run may start.
        """
        running = self.running()
        lines: dict[OrgId, list[NewRun]] = {}
        for run in sorted(self.left.values(), key=lambda run: (-run.priority, run.available_at, run.id)):
            line = lines.setdefault(run.org_id, [])
            limit, _ = self.shares[run.org_id]
            if running[run.org_id] + len(line) < limit and self._may_start(run, running):
                line.append(run)
        ranks = {
            run.id: (running[org] + place) / self.shares[org][1]
            for org, line in lines.items()
            for place, run in enumerate(line, start=1)
        }
        ranked = sorted(ranks, key=lambda id_: (ranks[id_], self.left[id_].available_at, id_))
        return ranked[:free]

    def _may_start(self, run: NewRun, running: Counter[str]) -> bool:
        limits = (
            (run.definition_id, self.limits[run.definition_id]),
            (run.handler, self.offered[run.handler]),
        )
        return all(limit is None or running[name] < limit for name, limit in limits)

    def running(self) -> Counter[str]:
        """The number of running runs by org, definition and handler."""
        rows = self.stock.all(tables.live_runs, tables.live_runs.c.state == "running")
        return Counter(row[column] for row in rows for column in ("org_id", "definition_id", "handler"))


def test_what_others_took_after_the_walk_is_replaced_in_the_same_call(
    stock: Stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = stock.worker(), stock.worker()
    orgs = [stock.org() for _ in range(40)]
    stock.put(*stock.runs(orgs))
    walk, taken = stock.walk(second)._walk, list[AdmittedRun]()

    def walk_too_late(call: Any) -> Any:
        step = walk(call)
        taken.extend(stock.admit(first, 16))
        return step

    monkeypatch.setattr(stock.walk(second), "_walk", walk_too_late)
    admitted = stock.admit(second, 16)

    assert len(taken) == len(admitted) == 16
    assert {run.org_id for run in taken}.isdisjoint(run.org_id for run in admitted)


def test_a_worker_that_found_nothing_under_the_lock_looks_without_it(postgres: Database) -> None:
    stock = Stock(postgres)
    worker, org = stock.worker(), stock.org(limit=1)
    stock.put(stock.run(org), stock.run(org))
    stock.admit(worker)
    stock.walk(worker).crowded = True
    assert stock.admit(worker) == []

    with postgres.transaction() as other:
        driver(other).execute(admit.LOCK, (admit.ADMISSION_LOCK,))
        assert stock.admit(worker) == []


def test_a_full_round_that_finds_nothing_takes_no_lock(postgres: Database) -> None:
    """Orgs at their limit are passed without keeping other admitters waiting."""
    stock = Stock(postgres)
    worker, org = stock.worker(), stock.org(limit=1)
    stock.put(stock.run(org), stock.run(org))
    assert len(stock.admit(worker)) == 1

    with postgres.transaction() as other:
        driver(other).execute(admit.LOCK, (admit.ADMISSION_LOCK,))
        assert stock.admit(worker) == []


def test_a_worker_that_falls_silent_while_it_admits_keeps_no_other_waiting(
    postgres: Database, migrated_postgres_url: str, clock: ManualClock
) -> None:
    stock, admitted = Stock(postgres), list[AdmittedRun]()
    org, worker, silent_worker = stock.org(), stock.worker(), stock.worker()
    stock.put(stock.run(org), stock.run(org))
    with Proxy(urlsplit(migrated_postgres_url).port or 5432) as proxy:
        proxy.watch = muted = muter(b"offer AS MATERIALIZED")
        url = urlsplit(migrated_postgres_url)._replace(netloc=f"postgres@127.0.0.1:{proxy.port}").geturl()
        silent = Database.open(url, clock=clock)

        def admit_in_silence() -> None:
            admitted.extend(RingWalk(silent, silent_worker).admit({HANDLER: None}, {"child": 1}))

        waiting = threading.Thread(target=admit_in_silence)
        waiting.start()
        muted.sent.wait()

        (run,) = stock.admit(worker, free=1)

        assert waiting.is_alive()
        proxy.let_go()
        waiting.join()
        silent.close()
    assert len({run.id, *(other.id for other in admitted)}) == 2
