"""Measures how many durable no-op runs per second the real worker does, compared with other queues.

    .venv/bin/python -m bench.throughput [--database sqlite|postgresql|both] [--runs N]
        [--python FILE …]   interpreters of the workers, in turn: of virtual environments with orgworker
        [--repeat N]        all of it so many times, in turn; the medians of the ratios come last
        [--peer VENV]       also PgQueuer and Procrastinate, installed in a virtual environment of their own
        [--peers NAME …]    only these of them
        [--warm]            an earlier worker has requested the tokens, which the database keeps
        [--scheduled]       the whole path from a schedule, 4 workers on PostgreSQL, instead
        [--profile FILE]    cProfile's output of the worker's main thread

Each run is admitted within exact limits, has its token looked up and enforced, is called
inline, and ends with its row, its attempt and the sums in one durable transaction. Rates are
by the database's clock: "steady" is counted over the last three quarters, "whole" from the first
start to the last end, with the requests for the tokens of 100 orgs. All figures of one call come
from the same machine minutes apart: only their ratios travel to another.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

from bench import ceiling
from bench.installation import Rates, installation

ORGS = 100
# Each one's script, and what it does and omits.
PEERS = {
    "PgQueuer": ("peer_pgqueuer.py", "one process, batch 100, log rows, no fencing"),
    "Procrastinate": (
        "peer_procrastinate.py",
        "one process, each job by itself, event rows, no fencing",
    ),
}
PEER_JOBS = {"Procrastinate": 5_000}


def backlog(
    dialect: str,
    runs: int,
    *,
    workers: int,
    slots: int,
    python: str,
    warm: bool = False,
    profile: Path | None = None,
) -> Rates:
    """Run a backlog and print the rates."""
    with installation(dialect, orgs=ORGS) as made:
        made.configure(slots=slots)
        made.define("bench.inline", spec={})
        if warm:
            made.add_backlog(ORGS, "bench.inline", "inline")
            with made.workers(python=python):
                made.wait_for_end(ORGS)
        earlier = made.ended()
        made.add_backlog(runs, "bench.inline", "inline")
        since = made.now()
        with made.workers(workers, python=python, profile=profile) as working:
            made.wait_for_end(earlier + runs // 4)
            loop, cpu, server, began = working.loop_cpu(), working.cpu(), made.server_cpu(), made.ended()
            made.wait_for_end(earlier + runs)
            per_run = 1e6 / max(1, earlier + runs - began)
            note = f"CPU of a run: worker {per_run * (working.cpu() - cpu):.0f} us"
            note += f", of them the event loop {per_run * (working.loop_cpu() - loop):.0f}"
            if dialect == "postgresql":
                note += f", server {per_run * (made.server_cpu() - server):.0f} us"
        rates = made.rates(since)
    say(f"Python {version_of(python)}, {dialect}, {workers} x {slots} slots", rates, note)
    return rates


def scheduled(runs: int, *, workers: int, slots: int, python: str) -> Rates:
    """Fire and run definitions that are all due at once."""
    with installation("postgresql", orgs=ORGS) as made:
        made.configure(slots=slots)
        since = made.now()
        at = since.replace(microsecond=0) + timedelta(seconds=10)
        spec: dict[str, object] = {"schedule": f"at {at:%Y-%m-%dT%H:%M:%SZ}", "overlap": "allow"}
        made.define("bench.inline", due_at=[at] * runs, spec=spec)
        with made.workers(workers, python=python):
            made.wait_for_end(runs)
        rates = made.rates(since)
    say(f"scheduled path, postgresql, {workers} workers", rates, f"{runs} definitions due at one instant")
    return rates


def least(dialect: str, runs: int) -> float:
    """The raw driver's rate, on a database like the worker's."""
    with installation(dialect, orgs=1) as made:
        if dialect == "postgresql":
            rate = ceiling.postgresql(made.url, runs)
        else:
            rate = ceiling.sqlite(str(made.folder / "ceiling.db"), runs)
    say(f"raw driver's ceiling, {dialect}", Rates(rate, rate), "no limits, no fairness, no handler")
    return rate


def peer(name: str, venv: Path, runs: int) -> float:
    """Another queue on a PostgreSQL like the worker's; jobs per second from its start to its last end."""
    script, note = PEERS[name]
    with installation("postgresql", orgs=1) as made:
        command = [str(venv / "bin" / "python"), str(Path(__file__).with_name(script))]
        done = subprocess.run([*command, made.url, str(runs)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    rate = float(done.stdout.split()[-1])
    say(f"{name}, postgresql", Rates(rate, rate), note)
    return rate


def say(what: str, rates: Rates, note: str) -> None:
    load = os.getloadavg()[0]
    print(f"{what:<42} {rates.steady:8.0f} {rates.whole:8.0f} /s   {note}; load {load:.1f}", flush=True)


def version_of(python: str) -> str:
    command = [python, "-c", "import platform; print(platform.python_version())"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


class Ratios:
    """Our rates divided by those of others, of each call."""

    def __init__(self) -> None:
        self._found: dict[str, list[Rates]] = defaultdict(list)

    def add(self, ours: Rates, other: float, name: str, python: str) -> None:
        ratio = Rates(ours.steady / other, ours.whole / other)
        self._found[f"of {name}, Python {version_of(python)} ({python})"].append(ratio)
        print(f"{'':42} {ratio.steady:8.2f} {ratio.whole:8.2f} of {name}", flush=True)

    def print_medians(self) -> None:
        for name, ratios in self._found.items():
            steady, whole = (statistics.median(column) for column in zip(*ratios, strict=True))
            print(f"{f'median of {len(ratios)}':<42} {steady:8.2f} {whole:8.2f} {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--database", choices=("sqlite", "postgresql", "both"), default="both")
    parser.add_argument("--runs", type=int, default=30_000)
    parser.add_argument("--workers", type=int, default=1, help="on PostgreSQL")
    parser.add_argument("--slots", type=int, default=1000, help="inline, of each worker")
    parser.add_argument("--python", nargs="+", default=[sys.executable], metavar="FILE")
    parser.add_argument("--repeat", type=int, default=1, metavar="N")
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--peer", type=Path, metavar="VENV")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--scheduled", action="store_true")
    parser.add_argument("--profile", type=Path, metavar="FILE")
    given = parser.parse_args()
    given.python = [str(Path(python).absolute()) for python in given.python]
    print(f"{os.cpu_count()} cores, {platform.platform()}")
    print("PostgreSQL: READ COMMITTED, fsync and synchronous_commit on; SQLite: WAL, synchronous FULL\n")
    print(f"{'':42} {'steady':>8} {'whole':>8}")
    ratios = Ratios()
    for _ in range(given.repeat):
        if given.scheduled:
            for python in given.python:
                workers = max(4, given.workers)
                scheduled(given.runs, workers=workers, slots=given.slots, python=python)
            continue
        for dialect in ("sqlite", "postgresql") if given.database == "both" else (given.database,):
            measure(dialect, given, ratios)
    if given.repeat > 1:
        ratios.print_medians()


def measure(dialect: str, given: argparse.Namespace, ratios: Ratios) -> None:
    """The worker under each interpreter, then what it is compared with."""
    workers = 1 if dialect == "sqlite" else given.workers
    ours = {
        python: backlog(
            dialect,
            given.runs,
            workers=workers,
            slots=given.slots,
            python=python,
            warm=given.warm,
            profile=given.profile,
        )
        for python in given.python
    }
    others = {"the ceiling": least(dialect, given.runs)}
    if dialect == "postgresql" and given.peer is not None:
        for name in given.peers:
            # A slow one gets fewer jobs.
            others[name] = peer(name, given.peer, min(given.runs, PEER_JOBS.get(name, given.runs)))
    for name, rate in others.items():
        for python, rates in ours.items():
            ratios.add(rates, rate, name, python)


if __name__ == "__main__":
    main()
