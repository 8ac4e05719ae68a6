"""Steps: stored once and fenced, read in pages, copied to the run that continues another one."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from tests.fakes.stock import HANDLER, Stock
from worker.ids import RunId
from worker.model.runs.run import AdmittedRun, NewStep, RunStep, StepPage
from worker.store import steps, tables


def step(run: AdmittedRun, seq: int, result: str = "1", **values: Any) -> RunStep:
    at = run.started_at
    new = NewStep("ask", None, seq, seq, result, at, at + timedelta(seconds=2))
    return RunStep(run, HANDLER, replace(new, **values), len(result.encode()))


def store(stock: Stock, *rows: RunStep) -> set[RunId]:
    ours = stock.hot("store_steps", rows)
    return {
        id_ for id_, token in ours for row in rows if row.run.id == id_ and row.run.fencing_token == token
    }


def load(stock: Stock, run_id: RunId, after: int = 0) -> StepPage:
    return stock.reading(steps.load_steps, run_id, after)


def recoveries(stock: Stock, run: AdmittedRun) -> int:
    live = stock.unended(run.id)
    return int(live["recoveries"])


def test_what_is_stored_is_what_a_later_attempt_reads(stock: Stock) -> None:
    run = stock.running()
    texts = [
        '{"b":1.0,"a":[1e22,12345678901234567890]}',
        '"é \\"x\\" \\\\ \\u001f {,}"',
        "null",
        '"NULL"',
        "[]",
    ]

    assert store(stock, *(step(run, n, text) for n, text in enumerate(texts, 1))) == {run.id}

    page = load(stock, run.id)
    assert [(row.seq, row.occurrence, row.result_json) for row in page.steps] == [
        (n, n, text) for n, text in enumerate(texts, 1)
    ]
    assert not page.more
    first = stock.all(tables.steps)[0]
    assert (first["attempt"], first["fencing_token"], first["org_id"]) == (1, run.fencing_token, run.org_id)
    assert (first["handler"], first["name"], first["key"], first["size"]) == (HANDLER, "ask", None, 41)
    assert first["ended_at"] - first["started_at"] == timedelta(seconds=2)
    assert first["result"] == {"a": [1e22, 12345678901234567890], "b": 1.0}


def test_a_step_under_an_older_fencing_token_is_not_stored(stock: Stock) -> None:
    mine, lost, unknown = stock.running(), stock.running(), stock.running()
    stale = replace(lost, fencing_token=lost.fencing_token - 1)
    gone = replace(unknown, id=RunId("01890000-0000-7000-8000-000000000000"))

    assert store(stock, step(stale, 1), step(mine, 1), step(gone, 1)) == {mine.id}

    assert [row["run_id"] for row in stock.all(tables.steps)] == [mine.id]


@pytest.mark.parametrize("state", ["waiting", "held"])
def test_a_step_of_a_run_that_does_not_run_is_not_stored(stock: Stock, state: str) -> None:
    run = stock.running()
    stock.change(tables.live_runs, run.id, state=state, reason="recovered", worker_id=None, started_at=None)

    assert store(stock, step(run, 1)) == set()
    assert load(stock, run.id).steps == []


def test_the_same_step_again_is_accepted_and_changes_nothing(stock: Stock) -> None:
    """The answer to the first write was lost."""
    run = stock.running()
    store(stock, step(run, 1, '"first"'))

    assert store(stock, step(run, 1, '"first"'), step(run, 2, '"second"')) == {run.id}

    assert [row.result_json for row in load(stock, run.id).steps] == ['"first"', '"second"']


def test_steps_of_many_runs_are_stored_together(stock: Stock) -> None:
    runs = [stock.running() for _ in range(5)]
    rows = [step(run, seq, f'"{run.id} {seq}"') for seq in (2, 1, 3) for run in reversed(runs)]

    assert store(stock, *rows) == {run.id for run in runs}

    for run in runs:
        assert [row.result_json for row in load(stock, run.id).steps] == [
            f'"{run.id} {n}"' for n in (1, 2, 3)
        ]


def test_a_new_step_forgives_lost_workers(stock: Stock) -> None:
    mine, stale = stock.running(), stock.running()
    for run in (mine, stale):
        stock.change(tables.live_runs, run.id, recoveries=2)

    store(stock, step(mine, 1), step(replace(stale, fencing_token=0), 1))

    assert (recoveries(stock, mine), recoveries(stock, stale)) == (0, 2)


def test_steps_are_read_in_pages_by_number_and_by_size(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "PAGE", 3)
    monkeypatch.setattr(steps, "PAGE_BYTES", 1000)
    run = stock.running()
    sizes = [10, 10, 10, 600, 600, 600, 2000, 10]
    store(stock, *(step(run, n, '"' + "x" * (size - 2) + '"') for n, size in enumerate(sizes, 1)))

    pages, after = [], 0
    while True:
        page = load(stock, run.id, after)
        pages.append([row.seq for row in page.steps])
        if not page.more:
            break
        after = page.steps[-1].seq

    assert pages == [[1, 2, 3], [4, 5], [6, 7], [8]]
    assert stock.reading(steps.step_totals, run.id) == (8, sum(sizes))


def test_a_run_without_steps_has_an_empty_page(stock: Stock) -> None:
    run = stock.running()

    assert load(stock, run.id) == StepPage([], more=False)
    assert stock.reading(steps.step_totals, run.id) == (0, 0)


def test_a_run_that_continues_another_has_its_steps(stock: Stock) -> None:
    old = stock.running()
    store(stock, step(old, 1, '"a"'), step(old, 4, '{"b": 1}', key="k"))
    new = stock.running()

    with stock.database.transaction() as connection:
        assert steps.copy_steps(connection, old.org_id, old.id, new.id) == 2
        assert steps.copy_steps(connection, new.org_id, old.id, new.id) == 0

    assert [(row.seq, row.key, row.result_json) for row in load(stock, new.id).steps] == [
        (1, None, '"a"'),
        (4, "k", '{"b": 1}'),
    ]
    copied = [row for row in stock.all(tables.steps) if row["run_id"] == new.id]
    assert {(row["fencing_token"], row["attempt"], row["org_id"]) for row in copied} == {(0, 1, old.org_id)}
