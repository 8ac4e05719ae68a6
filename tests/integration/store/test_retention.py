"""Retention: old rows go, each at its age and a few at a time; what still matters stays."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import insert

from tests.fakes.stock import HANDLER, Stock
from worker.ids import new_id
from worker.model.runs.run import LogLine
from worker.store import sweeps, tables, workers
from worker.store.sql import statements

DAY = timedelta(days=1)


def test_an_old_run_goes_with_all_that_belongs_to_it(stock):
    worker_id, org_id = stock.worker(), stock.org()
    run = stock.run(org_id)
    stock.put(run)
    (admitted,) = stock.admit(worker_id)
    with stock.database.transaction() as connection:
        hot = statements(connection)
        hot.save_checkpoint(connection, admitted, HANDLER, '{"done":1}')
        line = LogLine(run.id, 1, 1, org_id, stock.now(), "info", "log", "hello")
        hot.append_logs(connection, [line])
    stock.finish(worker_id, stock.ended(admitted))

    assert forget(stock, "succeeded", DAY) == 0
    assert forget(stock, "failed", timedelta(0)) == 0
    assert forget(stock, "succeeded", timedelta(seconds=-1)) == 1

    for table in (tables.runs, tables.attempts, tables.run_logs, tables.checkpoints):
        assert stock.all(table) == []
    assert stock.all(tables.rollup_days)[0]["runs"] == 1
    assert stock.all(tables.rollup_hours)[0]["runs"] == 1


def test_the_many_lines_and_attempts_of_a_run_go_before_it_a_few_at_a_time(stock):
    """A run that snoozed for weeks has thousands of attempts; a newer one keeps its own."""
    org_id, worker_id, count = stock.org(), stock.worker(), 7
    runs = [stock.run(org_id) for _ in range(2)]
    for run in runs:
        stock.put(run)
        for number in range(1, count + 1):
            (admitted,) = stock.admit(worker_id)
            line = LogLine(run.id, number, 1, org_id, stock.now(), "info", "log", "hello")
            stock.hot("append_logs", [line])
            last = number == count
            stock.finish(worker_id, stock.ended(admitted, *([] if last else ["waiting"])))
            if not last:
                stock.make_available(run.id)

    def some() -> int:
        return stock.within(sweeps.forget_parts, "succeeded", timedelta(seconds=-1), runs=1, limit=3)

    assert [some() for _ in range(4)] == [3, 3, 1, 0]

    for table in (tables.attempts, tables.run_logs):
        assert {row["run_id"] for row in stock.all(table)} == {runs[1].id}
        assert len(stock.all(table)) == count
    assert len(stock.all(tables.runs)) == 2


def test_an_unfinished_run_is_never_forgotten(stock):
    org_id = stock.org()
    run = stock.run(org_id)
    stock.put(run)

    for state in tables.FINAL_STATES:
        assert forget(stock, state, timedelta(seconds=-1)) == 0

    assert stock.stored(run.id)["state"] is None


def test_a_batch_takes_the_oldest_and_no_more_than_its_limit(stock):
    worker_id, org_id = stock.worker(), stock.org(limit=10)
    runs = [stock.run(org_id) for _ in range(5)]
    stock.put(*runs)
    for admitted in stock.admit(worker_id):
        stock.finish(worker_id, stock.ended(admitted))

    assert forget(stock, "succeeded", timedelta(seconds=-1), limit=3) == 3
    assert forget(stock, "succeeded", timedelta(seconds=-1), limit=3) == 2


def test_skips_lines_and_workers_go_at_their_own_age(stock):
    org_id, definition_id, now = stock.org(), new_id(), stock.now()
    ended, alive = stock.worker(), stock.worker()
    with stock.database.transaction() as connection:
        for days in (10, 1):
            at = now - days * DAY
            skip = {"skipped_from": at, "skipped_until": at, "count": 1, "reason": "missed", "revision": 1}
            connection.execute(
                insert(tables.skips).values(id=new_id(), org_id=org_id, definition_id=definition_id, **skip)
            )
            statements(connection).append_logs(
                connection, [LogLine("0" * 8 + new_id()[8:], 1, days, org_id, at, "info", "log", "hello")]
            )
        workers.unregister(connection, ended)

        assert sweeps.forget_skips(connection, 7 * DAY, limit=10) == 1
        assert sweeps.forget_logs(connection, 7 * DAY, limit=10) == 1
        assert workers.forget_workers(connection, timedelta(seconds=-1)) == 1

    assert [row["skipped_from"] for row in stock.all(tables.skips)] == [now - DAY]
    assert [row["seq"] for row in stock.all(tables.run_logs)] == [1]
    assert [row["id"] for row in stock.all(tables.workers)] == [alive]


def forget(stock: Stock, state: str, age: timedelta, *, limit: int = 100) -> int:
    return stock.within(sweeps.forget_runs, state, age, limit=limit)
