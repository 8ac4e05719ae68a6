"""Renew and recover: who owns a run, and what happens to it when its worker is gone."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from tests.fakes.stock import LEASE, Stock
from worker.ids import ALL_ORGS, RunId, WorkerId, new_id
from worker.model.runs import worker_ends
from worker.model.runs.run import LogLine, OwnedRun, Recovered
from worker.store import hosts, tables, workers
from worker.store.database import Database
from worker.store.dialect import Row
from worker.store.lists import runs as run_lists
from worker.store.sql import statements

AT = datetime(2030, 1, 1, tzinfo=UTC)


def renew(stock: Stock, worker: WorkerId) -> tuple[bool, list[OwnedRun]]:
    return stock.hot("renew", worker, LEASE)


def recover(stock: Stock, *, max_recoveries: int = 3) -> list[Recovered]:
    return stock.within(workers.recover, max_recoveries=max_recoveries)


def end(stock: Stock, worker: WorkerId) -> None:
    stock.within(workers.unregister, worker)


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
        registered, owned = stock.hot("renew_as_json", worker, LEASE)
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
    stock.running(worker)
    end(stock, worker)

    assert renew(stock, worker) == (False, [])


def test_the_run_of_a_worker_that_ended_waits_again(stock: Stock) -> None:
    worker, other = stock.worker(), stock.worker()
    run = stock.running(worker, start_by=stock.now() + timedelta(hours=1))
    end(stock, worker)

    (recovered,) = recover(stock)

    assert (recovered.run_id, recovered.state, recovered.attempt) == (run.id, "waiting", 1)
    assert recovered.worker == worker
    live = stock.unended(run.id)
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
    stock.running(worker)

    assert recover(stock) == []


def test_the_late_end_of_a_run_that_was_recovered_changes_nothing(stock: Stock) -> None:
    worker = stock.worker()
    run = stock.running(worker)
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
    run = stock.running(worker)
    stock.change(tables.live_runs, run.id, cancel_requested_at=stock.now(), cancel_reason="requested")
    end(stock, worker)

    recover(stock)

    assert (stock.stored(run.id)["state"], stock.stored(run.id)["reason"]) == ("cancelled", "requested")


def test_the_holder_of_the_lock_takes_the_runs_of_all_others(stock: Stock) -> None:
    dead, me = stock.worker(), stock.worker()
    stock.put(stock.run(stock.org()), stock.run(stock.org()))
    (theirs,) = stock.admit(dead, 1)
    (mine,) = stock.admit(me, 1)

    recovered = stock.within(workers.recover, others_than=me, max_recoveries=3)

    assert [run.run_id for run in recovered] == [theirs.id]
    live = stock.unended(mine.id)
    assert live["worker_id"] == me
    assert renew(stock, dead)[0] is False
    assert renew(stock, me)[0] is True


def test_old_rows_of_ended_workers_are_forgotten(stock: Stock) -> None:
    old, recent, owner = stock.worker(), stock.worker(), stock.worker()
    stock.running(owner)
    long_ago = stock.now() - timedelta(days=40)
    for worker in (old, owner):
        stock.change(tables.workers, worker, ended_at=long_ago)
    end(stock, recent)

    assert stock.within(workers.forget_workers, timedelta(days=30)) == 1

    assert {row["id"] for row in stock.all(tables.workers)} == {recent, owner}


def test_a_lease_that_passed_gives_the_runs_to_others(postgres: Database) -> None:
    stock = Stock(postgres)
    late, other = stock.worker(), stock.worker()
    run = stock.running(late)
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
    run = stock.running(late)
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
    sqlite_stock.running(worker)
    sqlite_stock.let_lease_pass(worker)

    assert recover(sqlite_stock) == []


def test_a_recovery_that_was_held_up_is_asked_for_once_more(stock: Stock) -> None:
    """The caller's contact may have broken while its connection hung: then the owners renew first."""
    worker = stock.worker()
    stock.running(worker)
    end(stock, worker)

    with stock.database.transaction() as connection:
        assert workers.recover(connection, max_recoveries=3, still=lambda: False) == []

    assert [found.worker for found in recover(stock)] == [worker]


def take_over(stock: Stock, by: WorkerId) -> list[Recovered]:
    """As the next worker does: on PostgreSQL after the leases, on SQLite with the file's lock."""
    return stock.within(workers.recover, max_recoveries=3, by=by, others_than=by)


def row_of(stock: Stock, worker: WorkerId) -> Row:
    (row,) = stock.all(tables.workers, tables.workers.c.id == worker)
    return row


def silent_host(stock: Stock) -> WorkerId:
    """An incarnation of a host whose lease has expired."""
    host = stock.worker()
    stock.change(tables.workers, host, host_id=new_id())
    stock.let_lease_pass(host)
    return host


def test_a_crash_is_stored_with_who_recovered_how_many_runs(stock: Stock) -> None:
    dead, idle, stopped = stock.worker(), stock.worker(), stock.worker()
    stock.put(*(stock.run(stock.org()) for _ in range(3)))
    stock.admit(dead, 2)
    stock.admit(stopped, 1)
    end(stock, stopped)
    me = stock.worker()

    assert len(take_over(stock, me)) == 3

    ends = [row_of(stock, worker) for worker in (dead, idle, stopped, me)]
    assert [worker_ends.end_of(row) for row in ends] == ["crashed", "crashed", "stopped", None]
    assert [row["recovered_runs"] for row in ends] == [2, 0, 1, 0]
    assert [row["recovered_by"] for row in ends] == [me, me, me, None]
    # The control: what the previous release writes of a crash reads as a stop.
    stock.change(tables.workers, dead, outcome=None)
    assert worker_ends.end_of(row_of(stock, dead)) == "stopped"


def test_a_host_that_was_taken_for_dead_says_late_that_it_has_stopped(stock: Stock) -> None:
    idle, busy, me = silent_host(stock), stock.worker(), stock.worker()
    stock.put(stock.run(stock.org()))
    stock.admit(busy, 1)
    stock.change(tables.workers, busy, host_id=new_id())
    stock.let_lease_pass(busy)
    stock.within(workers.recover, max_recoveries=3, by=me)
    found = [worker_ends.end_of(row_of(stock, host)) for host in (idle, busy)]

    for host in (idle, busy):
        end(stock, host)

    assert found == ["silent", "crashed"]
    # It cannot take back what was lost with it.
    assert [worker_ends.end_of(row_of(stock, host)) for host in (idle, busy)] == ["stopped", "crashed"]
    assert row_of(stock, idle)["recovered_by"] is None


def test_the_incarnations_of_a_removed_host_end_as_such(stock: Stock) -> None:
    host, other = silent_host(stock), silent_host(stock)
    with stock.database.transaction() as connection:
        hosts.remove(connection, row_of(stock, host)["host_id"], at=stock.now())
        workers.recover(connection, max_recoveries=3, by=other)

    assert [worker_ends.end_of(row_of(stock, one)) for one in (host, other)] == ["removed", "silent"]


def logged(run_id: RunId, org_id: str, *places: tuple[int, int]) -> list[LogLine]:
    return [
        LogLine(run_id, attempt, seq, org_id, AT, "info", "log", f"line {seq} of {attempt}")  # type: ignore[arg-type]
        for attempt, seq in places
    ]


@pytest.mark.parametrize("size", [1, 2, 10])
def test_the_log_says_between_the_attempts_why_one_was_lost(stock: Stock, size: int) -> None:
    dead = stock.worker()
    run = stock.running(dead)
    me = stock.worker()
    take_over(stock, me)
    with stock.database.transaction() as connection:
        lines = logged(run.id, run.org_id, (1, 1), (1, 2), (2, 1))
        # A line of the dead worker may come late.
        statements(connection).append_logs(connection, lines[1:])
        statements(connection).append_logs(connection, lines[:1])

    def pages() -> list[Row]:
        found: list[Row] = []
        last = run_lists.START
        with stock.database.autocommit() as connection:
            while page := run_lists.lines(connection, ALL_ORGS, run.id, after=last, limit=size):
                found += page
                last = (page[-1]["attempt"], page[-1]["seq"])
        return found

    def pages_back() -> list[Row]:
        found: list[Row] = []
        before = None
        with stock.database.autocommit() as connection:
            while page := run_lists.newest_lines(connection, ALL_ORGS, run.id, before=before, limit=size):
                found = [*page, *found]
                before = (page[0]["attempt"], page[0]["seq"])
        return found

    seen = f"{row_of(stock, dead)['renewed_at']:%H:%M:%S}"
    lost = f"attempt 1 was lost: worker {dead} crashed, last seen {seen} UTC; recovered by worker {me}"
    assert [row["text"] for row in pages()] == ["line 1 of 1", "line 2 of 1", lost, "line 1 of 2"]
    assert pages_back() == pages()
    (line,) = [row for row in pages() if row["source"] == "worker"]
    assert (line["level"], line["attempt"]) == ("warning", 1)


def test_a_run_that_fails_with_its_worker_is_not_called_recovered(stock: Stock) -> None:
    run = stock.running(stock.worker())
    me = stock.worker()
    stock.within(workers.recover, max_recoveries=0, by=me, others_than=me)

    (line,) = stock.all(tables.run_logs, tables.run_logs.c.run_id == run.id)
    assert line["text"].endswith(f" UTC; found by worker {me}")
