"""Worker processes that admit and end runs through the real store at full speed, and sometimes die."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta

from tests.fakes.stock import Stock
from worker.clock import SystemClock
from worker.ids import RunId
from worker.runs.outcome import EndedAttempt
from worker.runs.run import AdmittedRun
from worker.store import worker_store
from worker.store.database import Database
from worker.store.sql.postgresql import admit
from worker.store.worker_store import RingWalk

NO_LOCK, LATE_COMMIT = "SELECT %s", "SELECT pg_sleep(0.005)"
ALWAYS = 1_000_000


def carry(
    url: str,
    *,
    workers: int,
    slots: int,
    offered: Mapping[str, int | None],
    seconds: float,
    locked: bool = True,
) -> None:
    """Let `workers` processes run waiting runs for `seconds`; `locked=False` disables the lock."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        began = time.time() + 2.0
        some = [
            pool.submit(_work, url, number, slots, dict(offered), began, seconds, locked)
            for number in range(workers)
        ]
        for one in some:
            one.result()


def _work(
    url: str,
    number: int,
    slots: int,
    offered: dict[str, int | None],
    began: float,
    seconds: float,
    locked: bool,
) -> None:
    if not locked:
        admit.LOCK, admit.COMMIT = NO_LOCK, LATE_COMMIT
    chance = random.Random(number)
    database = Database.open(url, clock=SystemClock())
    stock = Stock(database)
    time.sleep(max(0.0, began - time.time()))
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        _live(stock, chance, slots, offered, until)
    database.close()


def _live(
    stock: Stock, chance: random.Random, slots: int, offered: dict[str, int | None], until: float
) -> None:
    """One worker: admits and ends runs until it dies with those it holds, or time is up."""
    worker = stock.worker(handlers=tuple(offered))
    admission, held = RingWalk(stock.database, worker), list[AdmittedRun]()
    while time.monotonic() < until:
        held += admission.admit(offered, {"child": slots - len(held)})
        if chance.random() < 0.02:
            stock.let_lease_pass(worker)
            recover(stock)
            return
        chance.shuffle(held)
        some = chance.randrange(1, 20)
        ended, held = held[:some], held[some:]
        stock.finish(worker, *(end(stock, run, chance) for run in ended))
    stock.finish(worker, *(end(stock, run, chance) for run in held))


def recover(stock: Stock) -> Sequence[RunId]:
    """Recover the runs of dead workers."""
    with stock.database.transaction() as connection:
        taken = worker_store.recover(connection, max_recoveries=ALWAYS, still=lambda: True)
    return [run.run_id for run in taken]


def end(stock: Stock, run: AdmittedRun, chance: random.Random) -> EndedAttempt:
    """A retry or a hand-back; the database sets its end time."""
    outcome = chance.choice(("retry", "handed_back"))
    later = run.started_at + timedelta(days=1)
    return stock.ended(run, "waiting", outcome=outcome, started_at=run.started_at, ended_at=later)
