"""Save: checkpoints, progress and log lines of a running run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sqlalchemy import update

from tests.fakes.stock import HANDLER, Stock
from worker.model.runs.run import AdmittedRun, LogLine, NewStep, RunStep, StoredProgress
from worker.store import tables, worker_store


def save(
    stock: Stock,
    run: AdmittedRun,
    data: str,
    *,
    token: int | None = None,
    handler: str = HANDLER,
    number: int = 0,
) -> bool:
    return stock.hot(
        "save_checkpoint",
        run if token is None else replace(run, fencing_token=token),
        handler,
        data,
        number=number,
    )


def load(stock: Stock, run: AdmittedRun) -> object:
    return stock.reading(worker_store.load_progress, run.id).checkpoint


def recoveries(stock: Stock, run: AdmittedRun) -> int:
    live = stock.unended(run.id)
    count: int = live["recoveries"]
    return count


def test_the_last_checkpoint_is_what_the_next_attempt_gets(stock: Stock) -> None:
    run = stock.running()
    assert load(stock, run) is None

    assert save(stock, run, '{"done":1}')
    assert save(stock, run, '{"done":2,"note":"é \\"x\\""}')

    assert load(stock, run) == {"done": 2, "note": 'é "x"'}
    (row,) = stock.all(tables.checkpoints)
    assert (row["attempt"], row["fencing_token"], row["org_id"]) == (1, 1, run.org_id)


def test_a_save_that_arrives_after_a_later_one_changes_nothing(stock: Stock) -> None:
    run = stock.running()
    assert save(stock, run, '{"done":1}', number=1)
    assert save(stock, run, '{"done":3}', number=3)

    assert save(stock, run, '{"done":2}', number=2)
    assert load(stock, run) == {"done": 3}
    assert save(stock, run, '{"done":3}', number=3)

    with stock.database.transaction() as connection:
        connection.execute(update(tables.live_runs).values(fencing_token=2))
    assert save(stock, run, '{"done":4}', token=2, number=1)
    assert load(stock, run) == {"done": 4}


@pytest.mark.parametrize("data", ["null", "[]", '"text"', "0"])
def test_any_json_is_a_checkpoint(stock: Stock, data: str) -> None:
    run = stock.running()

    assert save(stock, run, data)
    assert load(stock, run) == {"null": None, "[]": [], '"text"': "text", "0": 0}[data]


def test_a_checkpoint_under_an_older_fencing_token_is_refused(stock: Stock) -> None:
    run = stock.running()
    save(stock, run, '{"done":1}')

    assert not save(stock, run, '{"done":2}', token=0)
    stock.change(
        tables.live_runs, run.id, state="waiting", reason="recovered", worker_id=None, started_at=None
    )
    assert not save(stock, run, '{"done":3}')

    assert load(stock, run) == {"done": 1}


def test_only_a_checkpoint_that_moved_forgives_lost_workers(stock: Stock) -> None:
    run = stock.running()
    save(stock, run, '{"done":1}')
    stock.change(tables.live_runs, run.id, recoveries=2)

    save(stock, run, '{"done":1}')
    assert recoveries(stock, run) == 2

    save(stock, run, '{"done":2}')
    assert recoveries(stock, run) == 0


def test_a_first_checkpoint_moved(stock: Stock) -> None:
    run = stock.running()
    stock.change(tables.live_runs, run.id, recoveries=2)

    save(stock, run, "null")

    assert recoveries(stock, run) == 0


def test_progress_is_written_where_the_fencing_token_holds(stock: Stock) -> None:
    mine, lost = stock.running(), stock.running()
    progress = {"done": 3, "total": 9, "note": 'half "way", {é}'}

    stock.hot("write_progress", [(lost.id, lost.fencing_token + 1, progress), (mine.id, 1, progress)])

    rows = stock.live(mine.id), stock.live(lost.id)
    assert rows[0] is not None
    assert rows[1] is not None
    assert rows[0]["progress"] == progress
    assert rows[1]["progress"] is None


def test_log_lines_are_appended_once(stock: Stock) -> None:
    run, at = stock.running(), stock.now()
    lines = [
        LogLine(run.id, 1, n, run.org_id, at, "info", "stdout", text)
        for n, text in enumerate(('a "b" {c}, \\', "", "NULL", "line\nbreak"), start=1)
    ]

    for part in (lines[:2], lines):
        stock.hot("append_logs", part)

    rows = stock.all(tables.run_logs)
    assert [(row["seq"], row["text"]) for row in rows] == [(line.seq, line.text) for line in lines]
    assert {(row["level"], row["source"], row["at"]) for row in rows} == {("info", "stdout", at)}


def test_a_run_keeps_the_handler_that_stored_progress_first(stock: Stock) -> None:
    saving, stepping, neither = stock.running(), stock.running(), stock.running()
    for data, handler in (("1", "acme.v1"), ("2", "acme.v2")):
        save(stock, saving, data, handler=handler)
    at = stepping.started_at
    steps = [
        RunStep(stepping, handler, NewStep("ask", None, n, n, "1", at, at), 1)
        for n, handler in ((2, "acme.v2"), (1, "acme.v1"))
    ]

    stock.hot("store_steps", steps)

    with stock.database.autocommit() as connection:
        progress = [worker_store.load_progress(connection, run.id) for run in (saving, stepping, neither)]
    assert progress == [StoredProgress(2, "acme.v1"), StoredProgress(None, "acme.v1"), StoredProgress()]


def test_a_checkpoint_of_an_earlier_release_gets_its_handler_at_the_next_save(stock: Stock) -> None:
    run = stock.running()
    save(stock, run, "1", handler="acme.v1")
    with stock.database.transaction() as connection:
        connection.execute(update(tables.checkpoints).values(handler=None))

    save(stock, run, "2", handler="acme.v2")

    assert stock.reading(worker_store.load_progress, run.id) == StoredProgress(2, "acme.v2")
