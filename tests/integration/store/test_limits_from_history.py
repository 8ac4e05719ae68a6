"""Limits proven from what the database kept: the intervals of all attempts, afterwards."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timedelta
from typing import Any

from tests.fakes.stock import Stock
from worker.clock import SystemClock
from worker.ids import RunId
from worker.model.runs.outcome import EndedAttempt
from worker.model.runs.run import AdmittedRun
from worker.store import tables, workers
from worker.store.database import Database
from worker.store.ring_walk import RingWalk
from worker.store.sql.postgresql import admit

LIMIT = 3
WORKERS = 4
SLOTS = 60
ORGS = 50
HANDLERS = tuple(f"acme.h{number}" for number in range(10))
# Handlers with a limit of their own; the others would keep that of orgs and definitions from showing.
LIMITED = HANDLERS[:5]
# Orgs with room for any number of runs, and one definition with a limit.
WIDE = 10
# What a worker does, so that a busy machine takes longer and does not less; and its share of deaths.
ROUNDS = 80
DIES = 0.04

NO_LOCK = "SELECT %s"
LATE_COMMIT = "SELECT pg_sleep(0.005)"
ALWAYS = 1_000_000

Row = dict[str, Any]
Interval = tuple[datetime, datetime]


def test_no_limit_was_ever_exceeded_by_what_history_says(postgres: Database, migrated_postgres_url: str):
    most = crowd(postgres, migrated_postgres_url)

    assert most == {"org": LIMIT, "definition": LIMIT, "handler": LIMIT}


def test_the_same_history_shows_it_where_nobody_waits_for_the_admission_lock(
    postgres: Database, migrated_postgres_url: str
):
    most = crowd(postgres, migrated_postgres_url, locked=False)

    assert min(most.values()) >= LIMIT
    assert max(most.values()) > LIMIT


def crowd(database: Database, url: str, *, locked: bool = True) -> dict[str, int]:
    """Four worker processes on 50 orgs, and the most that ever ran of one org, definition and handler."""
    stock = Stock(database)
    narrow = [stock.org(limit=LIMIT) for _ in range(ORGS - WIDE)]
    stock.put(*(stock.run(org, handler=handler) for org in narrow for handler in HANDLERS))
    wide = [stock.org(limit=1000) for _ in range(WIDE)]
    free = [handler for handler in HANDLERS if handler not in LIMITED]
    for number, org in enumerate(wide):
        definition = stock.definition(org)
        keys = {"handler": free[number % len(free)], "max_concurrent": LIMIT}
        stock.put(*stock.runs([org] * 8, definition, **keys))
    offered = {handler: LIMIT if handler in LIMITED else None for handler in HANDLERS}

    carry(url, workers=WORKERS, slots=SLOTS, offered=offered, locked=locked)

    rows = stock.all(tables.attempts)
    outcomes = Counter(row["outcome"] for row in rows)
    assert set(outcomes) == {"retry", "handed_back", "lost"}
    assert min(outcomes.values()) > 20
    assert len({row["worker_id"] for row in rows}) >= WORKERS
    definition_of = {row["id"]: row["definition_id"] for row in stock.all(tables.runs)}
    return {
        "org": most_at_once((row for row in rows if row["org_id"] in narrow), lambda row: row["org_id"]),
        "definition": most_at_once(
            (row for row in rows if row["org_id"] in wide), lambda row: definition_of[row["run_id"]]
        ),
        "handler": most_at_once(
            (row for row in rows if row["handler"] in LIMITED), lambda row: row["handler"]
        ),
    }


def most_at_once(rows: Iterable[Row], of: Callable[[Row], str]) -> int:
    """The most attempts of one kind whose intervals share an instant."""
    intervals: dict[str, list[Interval]] = {}
    for row in rows:
        intervals.setdefault(of(row), []).append((row["started_at"], row["ended_at"]))
    return max(overlapping(of_one) for of_one in intervals.values())


def overlapping(intervals: Iterable[Interval]) -> int:
    steps = sorted(step for start, end in intervals for step in ((start, 1), (end, -1)))
    running = most = 0
    for _, change in steps:
        running += change
        most = max(most, running)
    return most


# ---- worker processes that admit and end runs at full speed, and sometimes die


def carry(
    url: str, *, workers: int, slots: int, offered: Mapping[str, int | None], locked: bool = True
) -> None:
    """Let `workers` processes run waiting runs for some rounds; `locked=False` disables the lock."""
    # Forks of a process that has imported this module.
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, forks) as pool:
        began = time.time() + 2.0
        some = [
            pool.submit(_work, url, number, slots, dict(offered), began, locked) for number in range(workers)
        ]
        for one in some:
            one.result()


def _work(
    url: str, number: int, slots: int, offered: dict[str, int | None], began: float, locked: bool
) -> None:
    if not locked:
        admit.LOCK, admit.COMMIT = NO_LOCK, LATE_COMMIT
    chance = random.Random(number)
    database = Database.open(url, clock=SystemClock())
    stock = Stock(database)
    time.sleep(max(0.0, began - time.time()))
    left = ROUNDS
    while left:
        left = _live(stock, chance, slots, offered, left)
    database.close()


def _live(
    stock: Stock, chance: random.Random, slots: int, offered: dict[str, int | None], rounds: int
) -> int:
    """One worker: admits and ends runs until it dies with those it holds; returns the rounds left."""
    worker = stock.worker(handlers=tuple(offered))
    admission, held = RingWalk(stock.database, worker), list[AdmittedRun]()
    for left in reversed(range(rounds)):
        held += admission.admit(offered, {"child": slots - len(held)})
        if chance.random() < DIES:
            stock.let_lease_pass(worker)
            recover(stock)
            return left
        chance.shuffle(held)
        some = chance.randrange(1, 20)
        ended, held = held[:some], held[some:]
        stock.finish(worker, *(end(stock, run, chance) for run in ended))
    stock.finish(worker, *(end(stock, run, chance) for run in held))
    return 0


def recover(stock: Stock) -> Sequence[RunId]:
    """Recover the runs of dead workers."""
    with stock.database.transaction() as connection:
        taken = workers.recover(connection, max_recoveries=ALWAYS, still=lambda: True)
    return [run.run_id for run in taken]


def end(stock: Stock, run: AdmittedRun, chance: random.Random) -> EndedAttempt:
    """A retry or a hand-back; the database sets its end time."""
    outcome = chance.choice(("retry", "handed_back"))
    later = run.started_at + timedelta(days=1)
    return stock.ended(run, "waiting", outcome=outcome, started_at=run.started_at, ended_at=later)
