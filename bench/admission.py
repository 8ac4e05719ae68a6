"""Admits and finishes runs with the store's functions, without the worker.

    .venv/bin/python -m bench.admission [--database sqlite|postgresql] [--runs N] [--batch N]
        [--processes N] [--orgs N] [--ended N]
        [--flat]      instead: how long an admit takes, from a thousand rows to a million

Prints runs a second, and what one run costs: this side's processor time, the server's, and the
time of one call; then the same beside a thread that runs Python all the time, as the worker's loop
may, for the same interpreter lock. A third of the backlog is the first org's. Exact limits and
fairness are on; the attempts carry claims and flags as the worker's do.

With `--flat` a fifth of the rows wait, over all orgs; what is admitted is handed back at once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from bench.filling import HANDLER, Filled, filled
from worker.clock import SystemClock
from worker.ids import WorkerId
from worker.model.runs.outcome import EndedAttempt, Trail
from worker.model.runs.run import AdmittedRun, Isolation
from worker.store.database import Database
from worker.store.ring_walk import RingWalk
from worker.store.sql import statements
from worker.wiring.start import SWITCH

# The runs of a token share these texts.
CLAIMS = json.dumps(
    {
        "org_code": "org_1",
        "scopes": ["read:kb", "write:kb"],
        "properties": {"model_version": "gpt-4", "max_tokens": "1000"},
        "flags": {"agent-v2": True},
    }
)
FLAGS = json.dumps({"agent-v2": True})
# Warm-up batches: statements are prepared, pages are read.
WARM = 20
ROWS = (1_000, 10_000, 100_000, 1_000_000)
FLAT_CALLS = 400


@dataclass
class Figures:
    """The results of one process: seconds of each call, and processor seconds."""

    runs: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    admit: list[float] = field(default_factory=list)
    finish: list[float] = field(default_factory=list)


def carry(database: Database, worker_id: WorkerId, *, batch: int, runs: int, again: bool = False) -> Figures:
    """Admit and finish until no run waits, or `runs` have ended; `again` hands them back."""
    admission, figures = RingWalk(database, worker_id), Figures()
    free: dict[Isolation, int] = {"child": 0, "inline": batch}
    began, used = time.perf_counter(), processor()
    while figures.runs < runs:
        at = time.perf_counter()
        admitted = admission.admit({HANDLER: None}, free)
        admitted_at = time.perf_counter()
        if not admitted:
            break
        ended = [end(run, again=again) for run in admitted]
        before = time.perf_counter()
        with database.transaction() as connection:
            accepted = statements(connection).finish(connection, worker_id, ended)
        figures.finish.append(time.perf_counter() - before)
        figures.admit.append(admitted_at - at)
        figures.runs += len(admitted)
        if len(accepted) != len(admitted):
            raise SystemExit(f"{len(admitted) - len(accepted)} ends were refused")
    figures.seconds = time.perf_counter() - began
    figures.cpu = processor() - used
    return figures


def end(run: AdmittedRun, *, again: bool) -> EndedAttempt:
    """The end of a no-op attempt."""
    now = datetime.now(UTC)
    return EndedAttempt(
        run_id=run.id,
        org_id=run.org_id,
        definition_id=run.definition_id,
        fencing_token=run.fencing_token,
        attempt=run.attempt,
        started_at=run.started_at,
        ended_at=now,
        outcome="handed_back" if again else "succeeded",
        state="waiting" if again else "succeeded",
        reason="handed_back" if again else None,
        trail=Trail(
            run.handler,
            token_ready_at=now,
            handler_started_at=now,
            claims=CLAIMS,
            flags=FLAGS,
            jti="7b0c1d0a",
            claims_hash="f" * 64,
        ),
    )


def processor() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def spin(stop: threading.Event) -> None:
    while not stop.is_set():
        sum(n * n for n in range(100))


def in_a_process(
    url: str, worker_id: WorkerId, given: argparse.Namespace, busy: bool, start: Any, answer: Any
) -> None:
    sys.setswitchinterval(SWITCH)
    database = Database.open(url, clock=SystemClock(), role="worker")
    carry(database, worker_id, batch=given.batch, runs=WARM * given.batch)
    stop = threading.Event()
    start.wait()
    if busy:
        threading.Thread(target=spin, args=(stop,)).start()
    figures = carry(database, worker_id, batch=given.batch, runs=given.runs // given.processes)
    stop.set()
    database.close()
    answer.put(asdict(figures))


def measure(made: Filled, given: argparse.Namespace, *, busy: bool) -> None:
    """Share `runs` among processes, each warmed up before the clock starts."""
    context = multiprocessing.get_context("spawn")
    start, answer = context.Barrier(given.processes + 1, timeout=120), context.SimpleQueue()
    started = [
        context.Process(target=in_a_process, args=(made.url, made.add_worker(), given, busy, start, answer))
        for _ in range(given.processes)
    ]
    for process in started:
        process.start()
    start.wait()
    cpu = made.server_cpu()
    figures = [Figures(**answer.get()) for _ in started]
    for process in started:
        process.join()
    done = sum(each.runs for each in figures)
    rate = done / max(each.seconds for each in figures)
    ours = 1e6 * sum(each.cpu for each in figures) / done
    cost = f"{1e6 * (made.server_cpu() - cpu) / done:5.1f} us there" if made.server else ""
    cost = "processor shared with the thread" if busy else f"{ours:5.1f} us a run here {cost}"
    print(
        f"{'busy' if busy else 'idle'} {given.processes} x {given.batch}: {rate:7.0f} /s   {cost}   "
        f"admit {spread([s for each in figures for s in each.admit])}, "
        f"finish {spread([s for each in figures for s in each.finish])}; {load()}",
        flush=True,
    )


def flat(given: argparse.Namespace) -> None:
    """The time of an admission against the number of rows."""
    times = {}
    for rows in ROWS:
        with filled(given.database) as made:
            made.add_orgs(given.orgs)
            made.add_ended(rows - rows // 5)
            made.add_waiting(rows // 5)
            made.settle()
            database = Database.open(made.url, clock=SystemClock(), role="worker")
            worker_id = made.add_worker()
            try:
                carry(database, worker_id, batch=given.batch, runs=WARM * given.batch, again=True)
                cpu = made.server_cpu()
                figures = carry(
                    database, worker_id, batch=given.batch, runs=FLAT_CALLS * given.batch, again=True
                )
                cpu = 1e3 * (made.server_cpu() - cpu + figures.cpu) / len(figures.admit)
            finally:
                database.close()
        times[rows] = statistics.median(figures.admit)
        print(
            f"{rows:>9} rows, {rows // 5} of them wait: admit of {given.batch} {spread(figures.admit)}, "
            f"hand back {spread(figures.finish)}; processor time of both {cpu:.1f} ms; {load()}",
            flush=True,
        )
    print(f"p50 at {ROWS[-1]} rows / at {ROWS[0]}: {times[ROWS[-1]] / times[ROWS[0]]:.2f}")


def spread(seconds: Sequence[float]) -> str:
    cuts = statistics.quantiles(seconds, n=100)
    return f"p50 {1e3 * cuts[49]:.2f} p99 {1e3 * cuts[98]:.2f} ms"


def sync_time() -> str:
    """How long this disk takes to sync 4 KiB, which every admission and finish includes."""
    times = []
    with tempfile.NamedTemporaryFile(prefix="orgworker-bench-", buffering=0) as file:
        for _ in range(100):
            file.write(bytes(4096))
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - began)
    return f"fdatasync of 4 KiB {spread(times)}"


def load() -> str:
    return f"load {os.getloadavg()[0]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="postgresql")
    parser.add_argument("--runs", type=int, default=40_000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1, help="on PostgreSQL")
    parser.add_argument("--orgs", type=int, default=1000)
    parser.add_argument("--ended", type=int, default=0, help="runs that ended earlier")
    parser.add_argument("--flat", action="store_true")
    given = parser.parse_args()
    if given.database == "sqlite" and given.processes != 1:
        parser.error("a SQLite file has one worker: --processes 1")
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, {platform.platform()}; {sync_time()}")
    print(f"{given.database}, exact limits and fairness on, fsync and synchronous_commit on; WAL and FULL")
    if given.flat:
        flat(given)
        return
    with filled(given.database) as made:
        made.add_orgs(given.orgs)
        made.add_ended(given.ended)
        for busy in (False, True):
            made.add_waiting(given.runs + WARM * given.batch * given.processes)
            made.settle()
            measure(made, given, busy=busy)


if __name__ == "__main__":
    main()
