"""Sweeps: waiting runs that nothing else would touch."""

from __future__ import annotations

from datetime import timedelta

import pytest

from tests.fakes.stock import HANDLER, Stock
from worker.model.runs.run import NewRun
from worker.store import sweeps, tables, workers


def reason(stock: Stock, run: NewRun) -> str:
    live = stock.unended(run.id)
    text: str = live["reason"]
    return text


def mark(stock: Stock) -> int:
    return stock.within(sweeps.mark_no_handler)[0]


def test_a_run_whose_handler_nobody_offers_says_so_until_somebody_does(stock: Stock) -> None:
    org, worker = stock.org(), stock.worker()
    fine, foreign = stock.run(org), stock.run(org, handler="acme.foreign")
    variants = stock.run(org, variant_handlers=(HANDLER, "acme.v2"))
    later = stock.run(org, handler="acme.foreign", available_at=stock.now() + timedelta(hours=1))
    stock.put(fine, foreign, variants, later)

    assert mark(stock) == 2
    assert [reason(stock, run) for run in (fine, foreign, variants, later)] == [
        "due",
        "no_handler",
        "no_handler",
        "due",
    ]
    assert mark(stock) == 0

    stock.within(workers.update_handlers, worker, [HANDLER, "acme.v2", "acme.foreign"])
    assert mark(stock) == 2
    assert [reason(stock, run) for run in (foreign, variants)] == ["due", "due"]


def test_a_run_whose_pool_nobody_serves_says_so_and_one_whose_pool_lacks_its_handler_too(
    stock: Stock,
) -> None:
    org, elsewhere = stock.org(), stock.worker(handlers=[HANDLER, "acme.gpu"])
    unserved = stock.run(org, pool="eu")
    without_handler = stock.run(org, pool="gpu", handler="acme.gpu")
    stock.put(unserved, without_handler)
    host = stock.worker(pools=["gpu"])

    assert mark(stock) == 2

    shown = [stock.live(run.id) or {} for run in (unserved, without_handler)]
    assert [(row["reason"], row["detail"]) for row in shown] == [("no_pool", "eu"), ("no_handler", None)]
    assert mark(stock) == 0

    stock.within(workers.update_handlers, host, ["acme.gpu"])
    stock.change(tables.workers, elsewhere, pools=["eu"])
    assert mark(stock) == 2
    shown = [stock.live(run.id) or {} for run in (unserved, without_handler)]
    assert [(row["reason"], row["detail"]) for row in shown] == [("due", None), ("due", None)]


def test_a_long_backlog_is_looked_at_in_parts(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "CHECKED", 2)
    org = stock.org()
    runs = sorted((stock.run(org) for _ in range(5)), key=lambda run: run.id)
    stock.put(*runs)

    after, marked = None, []
    for _ in range(3):
        changed, after = stock.within(sweeps.mark_no_handler, after)
        marked.append((changed, after))

    assert marked == [(2, runs[1].id), (2, runs[3].id), (1, None)]
    assert {reason(stock, run) for run in runs} == {"no_pool"}


def test_the_offer_of_a_worker_that_is_gone_counts_for_nothing(stock: Stock) -> None:
    run, worker = stock.run(stock.org()), stock.worker()
    stock.put(run)
    stock.let_lease_pass(worker)

    mark(stock)

    assert reason(stock, run) == "no_pool"


def test_a_run_that_never_started_in_time_is_skipped(stock: Stock) -> None:
    org, worker, now = stock.org(), stock.worker(), stock.now()
    late = stock.run(org, start_by=now - timedelta(seconds=1))
    patient = stock.run(org, start_by=now + timedelta(hours=1))
    started = stock.run(org, start_by=now - timedelta(seconds=1), priority=1)
    stock.put(late, patient, started)
    stock.admit(worker, 1)

    expired = stock.within(sweeps.expire_overdue)

    assert [(run.run_id, run.state, run.reason) for run in expired] == [(late.id, "skipped", "expired")]
    row = stock.stored(late.id)
    assert (row["state"], row["reason"], row["attempt"]) == ("skipped", "expired", 0)
    assert row["finished_at"] is not None
    assert stock.live(late.id) is None
    assert stock.live(started.id) is not None
    (hour,) = stock.all(tables.rollup_hours)
    assert (hour["state"], hour["runs"]) == ("skipped", 1)
    (day,) = stock.all(tables.rollup_days)
    assert (day["runs"], day["attempts"]) == (1, 0)


def test_runs_that_wait_are_ended_by_name_and_running_ones_are_not(stock: Stock) -> None:
    org, worker = stock.org(), stock.worker()
    running, waiting = stock.run(org, priority=1), stock.run(org)
    definition = stock.definition(org)
    ahead, held = stock.run(org, definition, serial=True), stock.run(org, definition)
    stock.put(running, waiting, ahead)
    stock.admit(worker, 1)
    stock.hold(held)

    ended = stock.within(
        sweeps.end_waiting, org, [running.id, waiting.id, ahead.id], state="cancelled", reason="requested"
    )

    assert {run.run_id for run in ended} == {waiting.id, ahead.id}
    assert stock.stored(waiting.id)["state"] == "cancelled"
    # What was held behind it is let through.
    assert reason(stock, held) == "due"


def test_a_held_run_whose_definition_has_nothing_on_is_promoted(stock: Stock) -> None:
    org = stock.org()
    free, behind = stock.run(org, stock.definition(org)), stock.run(org, stock.definition(org))
    stock.hold(free)
    stock.put(stock.run(org, behind.definition_id, serial=True))
    stock.hold(behind)

    assert stock.within(sweeps.promote_held) == 1

    assert (reason(stock, free), reason(stock, behind)) == ("due", "held")
