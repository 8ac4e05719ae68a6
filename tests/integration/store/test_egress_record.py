"""What runs sent: written with the end of an attempt by whoever owns the run, added to earlier attempts."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text

from tests.fakes.stock import Stock
from worker.model.definitions.budgets import MAX_SUM
from worker.model.runs.egress import MAX_ORIGINS, MAX_TOTAL, MAX_WAITED, OTHERS, EgressRow
from worker.model.runs.outcome import EndedAttempt
from worker.store import sweeps, tables

API = EgressRow("https://api.example.com", 3, 300, 9_000, {"200": 2, "429": 1}, 0, 1.5)
DENIED = EgressRow("https://evil.example", denied=4)


def sent(end: EndedAttempt, *rows: EgressRow) -> EndedAttempt:
    return replace(end, trail=replace(end.trail, egress=rows))


def record_of(stock: Stock, run_id: str) -> dict[str, dict[str, Any]]:
    rows = [row for row in stock.all(tables.run_egress) if row["run_id"] == run_id]
    return {row.pop("origin"): row for row in rows}


def row_of(run: Any, attempt: int, row: EgressRow) -> dict[str, Any]:
    # The reason of a denial is reported, not stored.
    stored = EgressRow.__slots__[1:-1]
    numbers = {name: getattr(row, name) for name in stored}
    return {"run_id": run.id, "org_id": run.org_id, "attempt": attempt, **numbers}


@pytest.mark.parametrize("state", ["succeeded", "failed", "waiting", "parked"])
def test_what_an_attempt_sent_is_written_with_its_end(stock: Stock, state: str) -> None:
    worker = stock.worker()
    run, quiet = stock.running(worker), stock.running(worker)
    outcome = {"waiting": "retry"}.get(state, state)

    stock.finish(worker, sent(stock.ended(run, state, outcome=outcome), API, DENIED), stock.ended(quiet))

    assert record_of(stock, run.id) == {
        API.origin: row_of(run, 1, API),
        DENIED.origin: row_of(run, 1, DENIED),
    }
    assert record_of(stock, quiet.id) == {}


def test_two_attempts_add_up(stock: Stock) -> None:
    worker = stock.worker()
    run = stock.running(worker)
    stock.finish(worker, sent(stock.ended(run, "waiting"), API, DENIED))
    stock.make_available(run.id)
    (again,) = stock.admit(worker)
    more = EgressRow(API.origin, 2, 1, MAX_TOTAL, {"200": 1, "503": 1}, 1, 0.25)
    new = EgressRow("https://new.example", 1)

    stock.finish(worker, sent(stock.ended(again), more, new))

    total = EgressRow(API.origin, 5, 301, MAX_TOTAL, {"200": 3, "429": 1, "503": 1}, 1, 1.75)
    assert record_of(stock, run.id) == {
        API.origin: row_of(run, 2, total),
        DENIED.origin: row_of(run, 1, DENIED),
        new.origin: row_of(run, 2, new),
    }


def test_an_end_of_a_lost_attempt_writes_nothing(stock: Stock) -> None:
    worker, other = stock.worker(), stock.worker()
    run, kept = stock.running(worker), stock.running(worker)
    late = sent(replace(stock.ended(run), fencing_token=7), API)

    assert stock.finish(worker, late, sent(stock.ended(kept), API)) == {kept.id}
    assert stock.finish(other, sent(stock.ended(run), API)) == set()

    assert record_of(stock, run.id) == {}
    assert record_of(stock, kept.id) == {API.origin: row_of(kept, 1, API)}


def test_a_late_end_adds_nothing_to_what_a_later_attempt_sent(stock: Stock) -> None:
    worker = stock.worker()
    run = stock.running(worker)
    first = sent(stock.ended(run, "waiting"), API)
    stock.finish(worker, first)
    stock.make_available(run.id)
    (again,) = stock.admit(worker)
    stock.finish(worker, sent(stock.ended(again), DENIED))

    late = sent(first, replace(API, requests=1_000), EgressRow("https://late.example", 1))
    stock.finish(worker, replace(late, fencing_token=again.fencing_token), late)

    found = record_of(stock, run.id)
    assert found[API.origin] == row_of(run, 1, API)
    assert found[DENIED.origin] == row_of(run, 2, DENIED)


def test_an_end_that_is_written_again_adds_nothing(stock: Stock) -> None:
    """The answer to COMMIT was cut, and the worker writes the same end again."""
    worker = stock.worker()
    run, other = stock.running(worker), stock.running(worker)
    retry = sent(stock.ended(run, "waiting"), API)

    for _ in range(2):
        assert stock.finish(worker, retry) == {run.id}
    stock.make_available(run.id)
    (again,) = stock.admit(worker)
    last = sent(stock.ended(again), API)
    for end in (last, last, retry):
        stock.finish(worker, end, sent(stock.ended(other), API))

    assert record_of(stock, run.id)[API.origin]["requests"] == 2 * API.requests
    assert record_of(stock, other.id)[API.origin]["requests"] == API.requests


def test_a_run_has_a_bounded_number_of_rows_over_all_attempts(stock: Stock) -> None:
    worker = stock.worker()
    run = stock.running(worker)
    for attempt in range(3):
        rows = [EgressRow(f"https://{attempt}-{n}.example", 1) for n in range(60)]
        stock.finish(worker, sent(stock.ended(run, "waiting"), *rows))
        stock.make_available(run.id)
        (run,) = stock.admit(worker)

    found = record_of(stock, run.id)
    assert len(found) == MAX_ORIGINS + 1
    assert found[OTHERS]["requests"] == 80
    assert sum(row["requests"] for row in found.values()) == 180


def used(stock: Stock) -> dict[tuple[str, str, str], int]:
    """What is used of each meter, by org and definition."""
    rows = stock.all(tables.meter_days)
    assert {row["day"] for row in rows} <= {stock.now().date()}
    return {(row["org_id"], row["definition_id"], row["meter"]): row["used"] for row in rows}


def test_requests_and_waits_add_up_in_the_usage_of_their_org(stock: Stock) -> None:
    worker, org = stock.worker(), stock.org()
    runs = [stock.running(worker, org), stock.running(worker, org), stock.running(worker)]
    slow = replace(API, requests=0, waited_seconds=2.2)
    stock.finish(worker, *(sent(stock.ended(run, "waiting"), API, slow) for run in runs))
    for run in runs:
        stock.make_available(run.id)
    again = stock.admit(worker)

    stock.finish(worker, *(sent(stock.ended(run), API, DENIED) for run in again))

    assert used(stock) == {
        (run.org_id, run.definition_id, meter): amount
        for run in runs
        # 1.5 + 2.2 s, then 1.5 s, each rounded.
        for meter, amount in (("egress_requests", 6), ("egress_wait_seconds", 6))
    }


def test_a_lost_or_repeated_end_adds_nothing_to_the_usage(stock: Stock) -> None:
    worker, other = stock.worker(), stock.worker()
    run, lost = stock.running(worker), stock.running(worker)
    first = sent(stock.ended(run, "waiting"), API)
    stock.finish(worker, first, sent(replace(stock.ended(lost), fencing_token=7), API))
    stock.finish(other, sent(stock.ended(lost), API))
    stock.finish(worker, first)
    stock.make_available(run.id)
    (again,) = stock.admit(worker)
    last = sent(stock.ended(again), API)
    for end in (last, last, first):
        stock.finish(worker, end)

    assert used(stock) == {
        (run.org_id, run.definition_id, "egress_requests"): 6,
        (run.org_id, run.definition_id, "egress_wait_seconds"): 4,
    }


def test_no_claim_of_a_host_makes_a_sum_too_large_to_store(stock: Stock) -> None:
    """Else the ends of its org would fail from then on, and with them those of others in their batches."""
    worker = stock.worker()
    run = stock.running(worker)
    stock.finish(worker, sent(stock.ended(run), API))
    with stock.database.transaction() as connection:
        connection.execute(tables.meter_days.update().values(used=MAX_SUM - 1))
    more = stock.running(worker, run.org_id, run.definition_id)

    stock.finish(worker, sent(stock.ended(more), replace(API, requests=MAX_TOTAL, waited_seconds=MAX_WAITED)))

    assert set(used(stock).values()) == {MAX_SUM}


def test_ends_without_requests_do_not_touch_the_table(stock: Stock) -> None:
    worker = stock.worker()
    run, other = stock.running(worker), stock.running(worker)
    with stock.database.transaction() as connection:
        connection.execute(text("ALTER TABLE run_egress RENAME TO hidden"))

    assert stock.finish(worker, stock.ended(run)) == {run.id}
    with pytest.raises(Exception, match="run_egress"):
        stock.finish(worker, sent(stock.ended(other), API))


def test_the_record_is_deleted_with_its_run(stock: Stock) -> None:
    worker = stock.worker()
    run, kept = stock.running(worker), stock.running(worker)
    stock.finish(worker, sent(stock.ended(run), API), sent(stock.ended(kept, "failed", reason="error"), API))

    assert stock.within(sweeps.forget_parts, "succeeded", timedelta(seconds=-60), runs=5, limit=1) == 1
    stock.within(sweeps.forget_runs, "succeeded", timedelta(seconds=-60), limit=5)

    assert record_of(stock, run.id) == {}
    assert record_of(stock, kept.id) == {API.origin: row_of(kept, 1, API)}
