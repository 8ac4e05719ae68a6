"""Overlap: what a scheduled run does that meets an unfinished one, by the rule of its definition."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from tests.fakes.stock import Stock
from worker.ids import DefinitionId, OrgId, RunId
from worker.model.definitions import Overlap
from worker.model.runs.outcome import EndedAttempt
from worker.model.runs.run import AdmittedRun, FireReport, NewRun
from worker.store import tables
from worker.store.database import Database
from worker.store.sql import statements

MINUTE = timedelta(minutes=1)


class Line:
    """The scheduled runs of one definition, a minute apart."""

    def __init__(self, stock: Stock, overlap: Overlap) -> None:
        self.stock = stock
        self.overlap = overlap
        self.org: OrgId = stock.org()
        self.definition: DefinitionId = stock.definition(self.org)
        self.worker = stock.worker()
        self.next = stock.now() - timedelta(hours=1)

    def due(self, count: int = 1) -> tuple[list[NewRun], FireReport]:
        """So many instants come at once."""
        runs = [self.run() for _ in range(count)]
        return runs, self.stock.put(*runs)

    def start(self) -> list[AdmittedRun]:
        return self.stock.admit(self.worker)

    def states(self) -> dict[RunId, tuple[str, str | None]]:
        live = {row["id"]: (row["state"], row["reason"]) for row in self.stock.all(tables.live_runs)}
        ended = {
            row["id"]: (row["state"], row["reason"])
            for row in self.stock.all(tables.runs)
            if row["state"] is not None
        }
        return live | ended

    def skipped(self) -> list[tuple[int, str]]:
        return [(row["count"], row["reason"]) for row in self.stock.all(tables.skips)]

    def end(self, run: AdmittedRun, state: str = "succeeded") -> None:
        self.stock.finish(self.worker, self.stock.ended(run, state))

    def run(self) -> NewRun:
        self.next += MINUTE
        return self.stock.run(
            self.org,
            self.definition,
            origin="schedule",
            scheduled_for=self.next,
            available_at=self.next,
            serial=self.overlap != "allow",
            overlap=self.overlap,
        )


def test_skip_counts_the_instants_that_met_the_run_in_one_row(stock: Stock) -> None:
    line = Line(stock, "skip")
    (first,), _ = line.due()
    line.start()

    for _ in range(5):
        line.due()

    assert line.states() == {first.id: ("running", None)}
    assert line.skipped() == [(5, "overlap")]


def test_allow_lets_them_all_run(stock: Stock) -> None:
    line = Line(stock, "allow")

    line.due(3)

    assert len(line.start()) == 3
    assert line.skipped() == []


def test_queue_one_holds_the_oldest_and_skips_the_rest(stock: Stock) -> None:
    line = Line(stock, "queue_one")
    (first,), _ = line.due()
    (admitted,) = line.start()

    (second,), report = line.due()
    line.due(2)

    assert [run.id for run in report.inserted] == [second.id]
    assert line.states() == {first.id: ("running", None), second.id: ("held", "held")}
    assert line.skipped() == [(2, "overlap")]
    assert line.start() == []
    line.end(admitted)
    assert line.states()[second.id] == ("waiting", "due")
    assert [run.id for run in line.start()] == [second.id]


def test_queue_one_takes_missed_instants_in_their_order(stock: Stock) -> None:
    """Four at once, as a worker that was away finds them: one runs, one waits behind it, two are skips."""
    line = Line(stock, "queue_one")

    (first, second, *_), _ = line.due(4)

    assert line.states() == {first.id: ("waiting", "due"), second.id: ("held", "held")}
    assert line.skipped() == [(2, "overlap")]


def test_replace_asks_the_run_to_stop_and_starts_once_it_has(stock: Stock) -> None:
    line = Line(stock, "replace")
    (first,), _ = line.due()
    (admitted,) = line.start()

    (second,), _ = line.due()

    row = stock.unended(first.id)
    assert (row["state"], row["cancel_reason"]) == ("running", "replaced")
    assert line.states()[second.id] == ("held", "held")
    assert line.start() == []
    stock.finish(line.worker, cancelled(stock, admitted))
    assert line.states() == {first.id: ("cancelled", "replaced"), second.id: ("waiting", "due")}
    assert [run.id for run in line.start()] == [second.id]


def test_the_newest_replaces_what_has_not_started(stock: Stock) -> None:
    line = Line(stock, "replace")
    (first,), _ = line.due()
    line.start()

    (second,), _ = line.due()
    (third, fourth), _ = line.due(2)

    assert line.states() == {
        first.id: ("running", None),
        second.id: ("cancelled", "replaced"),
        third.id: ("cancelled", "replaced"),
        fourth.id: ("held", "held"),
    }
    assert line.skipped() == []


def test_a_run_that_waits_again_is_replaced_at_once(stock: Stock) -> None:
    line = Line(stock, "replace")
    (first,), _ = line.due()
    (admitted,) = line.start()
    stock.finish(line.worker, stock.ended(admitted, "waiting", available_after=timedelta(hours=1)))

    (second,), _ = line.due()

    assert line.states() == {first.id: ("cancelled", "replaced"), second.id: ("waiting", "due")}


@pytest.mark.parametrize("overlap", ["queue_one", "replace"])
def test_no_run_is_stuck_when_a_run_ends_while_the_next_comes(postgres: Database, overlap: Overlap) -> None:
    """Whichever commits first, the next run waits to be admitted, never behind nothing."""
    stock = Stock(postgres)
    for _ in range(20):
        line = Line(stock, overlap)
        line.due()
        (admitted,) = line.start()
        with ThreadPoolExecutor(2) as pool:
            ends = pool.submit(line.end, admitted)
            comes = pool.submit(line.due)
            ends.result()
            (second,), _ = comes.result()

        (started,) = line.start()
        assert started.id == second.id
        line.end(started)


@pytest.mark.parametrize("overlap", ["queue_one", "replace"])
def test_definitions_that_overlap_at_once_do_not_deadlock_with_their_ends(
    postgres: Database, overlap: Overlap
) -> None:
    stock = Stock(postgres)
    lines = [Line(stock, overlap) for _ in range(20)]
    worker = lines[0].worker
    for _ in range(5):
        for line in lines:
            line.due()
        admitted = stock.admit(worker)
        assert len(admitted) == len(lines)
        ended = [stock.ended(run) for run in admitted]

        with ThreadPoolExecutor(2) as pool:
            ends = pool.submit(stock.finish, worker, *reversed(ended))
            comes = pool.submit(stock.put, *(line.run() for line in reversed(lines)))
            ends.result()
            comes.result()

        with postgres.transaction() as connection:
            statements(connection).promote(connection, None)
        stock.finish(worker, *(stock.ended(run) for run in stock.admit(worker)))
        assert stock.all(tables.live_runs) == []


def cancelled(stock: Stock, run: AdmittedRun) -> EndedAttempt:
    return stock.ended(run, "cancelled", reason="replaced", result=None)
