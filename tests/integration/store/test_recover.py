"""Renew and recover: who owns a run, and what happens to it when its worker is gone."""

from __future__ import annotations

import json
from datetime import timedelta

from tests.fakes.stock import LEASE, Stock
from worker.ids import WorkerId
from worker.runs.run import OwnedRun, Recovered
from worker.store import tables, workers
from worker.store.database import Database
from worker.store.sql import statements


def renew(stock: Stock, worker: WorkerId) -> tuple[bool, list[OwnedRun]]:
    with stock.database.transaction() as connection:
        return statements(connection).renew(connection, worker, LEASE)


def recover(stock: Stock, *, max_recoveries: int = 3) -> list[Recovered]:
    with stock.database.transaction() as connection:
        return workers.recover(connection, max_recoveries=max_recoveries)


def end(stock: Stock, worker: WorkerId) -> None:
    with stock.database.transaction() as connection:
        workers.unregister(connection, worker)


def test_a_renewal_extends_the_lease_and_names_what_is_owned(stock: Stock) -> None:
    worker, other, org = stock.worker(lease=timedelta(seconds=3)), stock.worker(), stock.org()
    stock.put(*(stock.run(org) for _ in range(3)))
    mine = stock.admit(worker, 2)
    stock.admit(other)

    registered, owned = renew(stock, worker)

    assert registered
    assert {run.id for run in owned} == {run.id for run in mine}
    assert {(run.fencing_token, run.cancel_reason) for run in owned} == {(1, None)}
    (row,) = stock.all(tables.workers, tables.workers.c.id == worker)
    assert row["lease_until"] - row["renewed_at"] == LEASE


def test_a_renewal_as_json_is_the_same(stock: Stock) -> None:
    worker, ended, org, suspended = stock.worker(), stock.worker(), stock.org(), stock.org()
    stock.put(stock.run(org), stock.run(suspended))
    stock.admit(worker)
    stock.change(tables.orgs, suspended, state="suspended")
    end(stock, ended)

    def renew_as_json(worker: WorkerId) -> tuple[bool, list[OwnedRun]]:
        with stock.database.transaction() as connection:
            registered, owned = statements(connection).renew_as_json(connection, worker, LEASE)
        return registered, [OwnedRun(*row) for row in json.loads(owned)]

    for each in (worker, ended, stock.worker()):
        registered, owned = renew(stock, each)
        as_json, rows = renew_as_json(each)
        assert as_json is registered
        assert {(run.id, run.fencing_token, run.cancel_reason) for run in rows} == {
            (run.id, run.fencing_token, run.cancel_reason) for run in owned
        }
    assert len(renew_as_json(worker)[1]) == 2


def test_a_renewal_without_runs_is_one_all_the_same(stock: Stock) -> None:
    assert renew(stock, stock.worker()) == (True, [])


def test_a_renewal_passes_a_cancel_request_on_and_a_suspended_org(stock: Stock) -> None:
    worker, org, suspended = stock.worker(), stock.org(), stock.org()
    stock.put(stock.run(org), stock.run(suspended))
    started = {run.org_id: run for run in stock.admit(worker)}
    stock.change(
        tables.live_runs, started[org].id, cancel_requested_at=stock.now(), cancel_reason="requested"
    )
    stock.change(tables.orgs, suspended, state="suspended")

    _, owned = renew(stock, worker)

    assert {run.id: run.cancel_reason for run in owned} == {
        started[org].id: "requested",
        started[suspended].id: "suspended",
    }


def test_a_worker_that_was_given_up_hears_of_it(stock: Stock) -> None:
    worker = stock.worker()
    stock.put(stock.run(stock.org()))
    stock.admit(worker)
    end(stock, worker)

    assert renew(stock, worker) == (False, [])


def test_the_run_of_a_worker_that_ended_waits_again(stock: Stock) -> None:
    worker, other = stock.worker(), stock.worker()
    stock.put(stock.run(stock.org(), start_by=stock.now() + timedelta(hours=1)))
    (run,) = stock.admit(worker)
    end(stock, worker)

    (recovered,) = recover(stock)

    assert (recovered.run_id, recovered.state, recovered.attempt) == (run.id, "waiting", 1)
    assert recovered.worker == worker
    live = stock.live(run.id)
    assert live is not None
    assert (live["state"], live["reason"], live["recoveries"]) == ("waiting", "recovered", 1)
    (attempt,) = stock.attempts(run.id)
    assert (attempt["outcome"], attempt["worker_id"], attempt["handler"]) == ("lost", worker, run.handler)
    assert attempt["started_at"] == run.started_at
    stock.make_available(run.id)
    (again,) = stock.admit(other)
    assert (again.attempt, again.fencing_token, again.recoveries) == (2, 2, 1)
    assert recover(stock) == []


def test_nothing_is_taken_from_a_worker_that_lives(stock: Stock) -> None:
    worker = stock.worker()
    stock.put(stock.run(stock.org()))
    stock.admit(worker)

    assert recover(stock) == []


def test_the_late_end_of_a_run_that_was_recovered_changes_nothing(stock: Stock) -> None:
    worker = stock.worker()
    stock.put(stock.run(stock.org()))
    (run,) = stock.admit(worker)
    end(stock, worker)
    recover(stock)

    assert stock.finish(worker, stock.ended(run)) == set()

    assert stock.stored(run.id)["state"] is None
    assert [row["outcome"] for row in stock.attempts(run.id)] == ["lost"]


def test_a_run_that_lost_its_worker_too_often_fails(stock: Stock) -> None:
    org = stock.org()
    patient = stock.definition(org, spec={"handler": "acme.note", "max_recoveries": 5})
    stock.put(stock.run(org), stock.run(org, patient))
    ended: list[Recovered] = []
    for _ in range(3):
        worker = stock.worker()
        for row in stock.all(tables.live_runs):
            stock.make_available(row["id"])
        stock.admit(worker)
        end(stock, worker)
        ended += [run for run in recover(stock, max_recoveries=2) if run.state == "failed"]

    (failed,) = ended
    row = stock.stored(failed.run_id)
    assert (row["state"], row["reason"], row["attempt"]) == ("failed", "lost", 3)
    assert row["error"]["type"] == "Lost"
    assert stock.live(failed.run_id) is None
    assert [attempt["outcome"] for attempt in stock.attempts(failed.run_id)] == ["lost"] * 3
    (live,) = stock.all(tables.live_runs)
    assert (live["definition_id"], live["recoveries"]) == (patient, 3)


def test_a_cancelled_run_whose_worker_is_gone_ends(stock: Stock) -> None:
    worker = stock.worker()
    stock.put(stock.run(stock.org()))
    (run,) = stock.admit(worker)
    stock.change(tables.live_runs, run.id, cancel_requested_at=stock.now(), cancel_reason="requested")
    end(stock, worker)

    recover(stock)

    assert (stock.stored(run.id)["state"], stock.stored(run.id)["reason"]) == ("cancelled", "requested")


def test_the_holder_of_the_lock_takes_the_runs_of_all_others(stock: Stock) -> None:
    dead, me = stock.worker(), stock.worker()
    stock.put(stock.run(stock.org()), stock.run(stock.org()))
    (theirs,) = stock.admit(dead, 1)
    (mine,) = stock.admit(me, 1)

    with stock.database.transaction() as connection:
        recovered = workers.recover(connection, others_than=me, max_recoveries=3)

    assert [run.run_id for run in recovered] == [theirs.id]
    live = stock.live(mine.id)
    assert live is not None
    assert live["worker_id"] == me
    assert renew(stock, dead)[0] is False
    assert renew(stock, me)[0] is True


def test_old_rows_of_ended_workers_are_forgotten(stock: Stock) -> None:
    old, recent, owner = stock.worker(), stock.worker(), stock.worker()
    stock.put(stock.run(stock.org()))
    stock.admit(owner)
    long_ago = stock.now() - timedelta(days=40)
    for worker in (old, owner):
        stock.change(tables.workers, worker, ended_at=long_ago)
    end(stock, recent)

    with stock.database.transaction() as connection:
        assert workers.forget_workers(connection, timedelta(days=30)) == 1

    assert {row["id"] for row in stock.all(tables.workers)} == {recent, owner}


def test_a_lease_that_passed_gives_the_runs_to_others(postgres: Database) -> None:
    stock = Stock(postgres)
    late, other = stock.worker(), stock.worker()
    stock.put(stock.run(stock.org()))
    (run,) = stock.admit(late)
    stock.let_lease_pass(late)

    (recovered,) = recover(stock)

    assert (recovered.run_id, recovered.worker) == (run.id, late)
    assert renew(stock, late) == (False, [])
    assert renew(stock, other) == (True, [])
    (row,) = stock.all(tables.workers, tables.workers.c.id == late)
    assert row["ended_at"] is not None


def test_a_late_worker_that_renews_first_keeps_its_runs(postgres: Database) -> None:
    """After an outage every lease has passed; whoever comes back in time has lost nothing."""
    stock = Stock(postgres)
    late = stock.worker()
    stock.put(stock.run(stock.org()))
    (run,) = stock.admit(late)
    stock.let_lease_pass(late)

    registered, owned = renew(stock, late)

    assert registered
    assert [mine.id for mine in owned] == [run.id]
    assert recover(stock) == []


def test_two_recoveries_at_once_take_each_run_once(postgres: Database) -> None:
    stock = Stock(postgres)
    dead = stock.worker()
    stock.put(*(stock.run(stock.org()) for _ in range(4)))
    stock.admit(dead)
    stock.let_lease_pass(dead)

    with postgres.transaction() as first, postgres.transaction() as second:
        one = workers.recover(first, max_recoveries=3)
        two = workers.recover(second, max_recoveries=3)

    assert (len(one), len(two)) == (4, 0)


def test_on_sqlite_no_lease_decides(sqlite_stock: Stock) -> None:
    """The lock beside the file does: whoever holds it knows that its runs are its own."""
    worker = sqlite_stock.worker()
    sqlite_stock.put(sqlite_stock.run(sqlite_stock.org()))
    sqlite_stock.admit(worker)
    sqlite_stock.let_lease_pass(worker)

    assert recover(sqlite_stock) == []


def test_a_recovery_that_was_held_up_is_asked_for_once_more(stock: Stock) -> None:
    """The caller's contact may have broken while its connection hung: then the owners renew first."""
    worker = stock.worker()
    stock.put(stock.run(stock.org()))
    stock.admit(worker)
    end(stock, worker)

    with stock.database.transaction() as connection:
        assert workers.recover(connection, max_recoveries=3, still=lambda: False) == []

    assert [found.worker for found in recover(stock)] == [worker]
