"""Limits and fairness proven from what the database kept: the intervals of all attempts, afterwards."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

import pytest

from tests.fakes.stock import Stock
from worker.ids import OrgId, WorkerId
from worker.runs.run import AdmittedRun
from worker.store import tables
from worker.store.admission import Admission
from worker.store.database import Database

LIMIT, WORKERS, ORGS = 3, 4, 50
HANDLERS = tuple(f"acme.h{number}" for number in range(10))
SECONDS = 5.0

Interval = tuple[datetime, datetime]


def test_no_limit_was_ever_exceeded_by_what_history_says(postgres: Database):
    most = crowd(postgres)

    assert most == {"org": LIMIT, "handler": LIMIT}


def test_the_same_history_shows_it_where_nobody_waits_for_the_admission_lock(
    postgres: Database, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("worker.store.sql.postgresql.admit.LOCK", "SELECT %s")

    assert any(max(crowd(postgres).values()) > LIMIT for _ in range(4))


def test_five_runs_behind_ten_thousand_start_within_one_turn_of_the_slots(stock: Stock):
    slots, worker = 20, stock.worker()
    flood, few = stock.org(limit=1000), stock.org(limit=1000)
    for _ in range(20):
        stock.put(*(stock.run(flood) for _ in range(500)))
    held = stock.admit(worker, slots)
    stock.put(*(stock.run(few) for _ in range(5)))

    admissions = 0
    while not any(run.org_id == few for run in held):
        stock.finish(worker, stock.ended(held.pop(0)))
        held += stock.admit(worker, 1)
        admissions += 1

    assert admissions <= slots + 1


def test_slots_settle_at_the_weights_behind_an_org_that_held_them_all(stock: Stock):
    slots, worker, chance = 40, stock.worker(), random.Random(1)
    hog, light, heavy = stock.org(limit=1000), stock.org(limit=1000), stock.org(limit=1000, weight=3)
    stock.put(*(stock.run(hog) for _ in range(slots)))
    held = stock.admit(worker, slots)
    stock.put(*(stock.run(org) for org in (light, heavy) for _ in range(300)))

    shares: Counter[OrgId] = Counter()
    for turn in range(300):
        ended = held.pop(chance.randrange(len(held)))
        stock.finish(worker, stock.ended(ended))
        held += stock.admit(worker, 1)
        if turn >= 200:
            shares.update(run.org_id for run in held)

    assert shares[heavy] / shares[light] == pytest.approx(3, rel=0.1)


def crowd(database: Database) -> dict[str, int]:
    """Workers that admit and end runs at once, again and again; the most that ran of one org and handler."""
    stock = Stock(database)
    orgs = [stock.org(limit=LIMIT) for _ in range(ORGS)]
    stock.put(*(stock.run(org, handler=handler) for org in orgs for handler in HANDLERS))
    over, failures = threading.Event(), list[BaseException]()

    def work(worker: WorkerId, chance: random.Random) -> None:
        try:
            admission, held = Admission(database, worker), list[AdmittedRun]()
            while not over.is_set():
                free = 12 - len(held)
                held += admission.admit(dict.fromkeys(HANDLERS, LIMIT), {"child": free})
                chance.shuffle(held)
                some = chance.randrange(1, 6)
                ended, held = held[:some], held[some:]
                stock.finish(worker, *(end(stock, run, chance) for run in ended))
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=(stock.worker(handlers=HANDLERS), random.Random(number)))
        for number in range(WORKERS)
    ]
    for thread in threads:
        thread.start()
    time.sleep(SECONDS)
    over.set()
    for thread in threads:
        thread.join()
    assert not failures
    rows = stock.all(tables.attempts)
    assert len(rows) > 100
    assert {"retry", "handed_back"} <= {row["outcome"] for row in rows}
    return {
        "org": most_at_once(rows, "org_id"),
        "handler": most_at_once(rows, "handler"),
    }


def end(stock: Stock, run: AdmittedRun, chance: random.Random) -> Any:
    """A retry or a hand-back, which ended when the database locked its row."""
    outcome = chance.choice(("retry", "handed_back"))
    later = run.started_at + timedelta(days=1)
    return stock.ended(run, "waiting", outcome=outcome, started_at=run.started_at, ended_at=later)


def most_at_once(rows: Iterable[dict[str, Any]], by: str) -> int:
    """The most attempts with one value of a column whose intervals share an instant."""
    intervals: dict[str, list[Interval]] = {}
    for row in rows:
        intervals.setdefault(row[by], []).append((row["started_at"], row["ended_at"]))
    return max(overlapping(of_one) for of_one in intervals.values())


def overlapping(intervals: Iterable[Interval]) -> int:
    steps = sorted(step for start, end in intervals for step in ((start, 1), (end, -1)))
    running = most = 0
    for _, change in steps:
        running += change
        most = max(most, running)
    return most
