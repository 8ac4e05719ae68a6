"""Measures how many durable no-op runs per second the real worker does, compared with other queues.

    .venv/bin/python -m bench.throughput [--database sqlite|postgresql|both] [--runs N]
        [--peer VENV]       also PgQueuer and Procrastinate, installed in a virtual environment of their own
        [--scheduled]       the whole path from a schedule, 4 workers on PostgreSQL, instead
        [--profile FILE]    cProfile's output of the worker's main thread

Each run is admitted within exact limits, has its token looked up and enforced, is called
inline, and ends with its row, its attempt and the sums in one durable transaction. Rates are
counted over the last three quarters, by the database's clock; "CPU" is what the worker's
process used. All figures of one call come from the same machine minutes apart: only their
ratios travel to another.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
from datetime import timedelta
from pathlib import Path

from bench import ceiling
from bench.installation import installation

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


def backlog(dialect: str, runs: int, *, workers: int, slots: int, profile: Path | None = None) -> float:
    """Run a backlog and print the rate; returns runs per second."""
    with installation(dialect, orgs=ORGS) as made:
        made.configure(slots=slots)
        made.define("bench.inline", spec={})
        made.add_backlog(runs, "bench.inline", "inline")
        with made.workers(workers, profile=profile) as working:
            made.wait_for_end(runs // 4)
            cpu, server, began = working.cpu(), made.server_cpu(), made.ended()
            made.wait_for_end(runs)
            per_run = 1e6 / max(1, runs - began)
            note = f"worker CPU {per_run * (working.cpu() - cpu):.0f} us a run"
            if dialect == "postgresql":
                note += f", server {per_run * (made.server_cpu() - server):.0f} us"
        rate = made.rate()
    say(f"worker, {dialect}, {workers} x {slots} slots", rate, note)
    return rate


def scheduled(runs: int, *, workers: int, slots: int) -> float:
    """Fire and run definitions that are all due at once; runs per second from the first fire."""
    with installation("postgresql", orgs=ORGS) as made:
        made.configure(slots=slots)
        with made.database.autocommit() as connection:
            at = made.database.now(connection).replace(microsecond=0) + timedelta(seconds=10)
        spec: dict[str, object] = {"schedule": f"at {at:%Y-%m-%dT%H:%M:%SZ}", "overlap": "allow"}
        made.define("bench.inline", due_at=[at] * runs, spec=spec)
        with made.workers(workers):
            made.wait_for_end(runs)
        rate = made.rate(leave=0.25)
    say(f"scheduled path, postgresql, {workers} workers", rate, f"{runs} definitions due at one instant")
    return rate


def least(dialect: str, runs: int) -> float:
    """The raw driver's rate, on a database like the worker's."""
    with installation(dialect, orgs=1) as made:
        if dialect == "postgresql":
            rate = ceiling.postgresql(made.url, runs)
        else:
            rate = ceiling.sqlite(str(made.folder / "ceiling.db"), runs)
    say(f"raw driver's ceiling, {dialect}", rate, "no limits, no fairness, no handler")
    return rate


def peer(name: str, venv: Path, runs: int) -> float:
    """Another queue on a PostgreSQL like the worker's; jobs per second."""
    script, note = PEERS[name]
    with installation("postgresql", orgs=1) as made:
        command = [str(venv / "bin" / "python"), str(Path(__file__).with_name(script))]
        done = subprocess.run([*command, made.url, str(runs)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    rate = float(done.stdout.split()[-1])
    say(f"{name}, postgresql", rate, note)
    return rate


def say(what: str, rate: float, note: str) -> None:
    print(f"{what:<42} {rate:8.0f} /s   {note}; load {os.getloadavg()[0]:.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--database", choices=("sqlite", "postgresql", "both"), default="both")
    parser.add_argument("--runs", type=int, default=30_000)
    parser.add_argument("--workers", type=int, default=1, help="on PostgreSQL")
    parser.add_argument("--slots", type=int, default=1000, help="inline, of each worker")
    parser.add_argument("--peer", type=Path, metavar="VENV")
    parser.add_argument("--scheduled", action="store_true")
    parser.add_argument("--profile", type=Path, metavar="FILE")
    given = parser.parse_args()
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, {platform.platform()}")
    print("PostgreSQL: READ COMMITTED, fsync and synchronous_commit on; SQLite: WAL, synchronous FULL\n")
    if given.scheduled:
        scheduled(given.runs, workers=max(4, given.workers), slots=given.slots)
        return
    for dialect in ("sqlite", "postgresql") if given.database == "both" else (given.database,):
        workers = 1 if dialect == "sqlite" else given.workers
        ours = backlog(dialect, given.runs, workers=workers, slots=given.slots, profile=given.profile)
        print(f"{'':42} {ours / least(dialect, given.runs):8.2f} of the ceiling")
        if dialect == "postgresql" and given.peer is not None:
            for name in PEERS:
                # A slow one gets fewer jobs.
                jobs = min(given.runs, PEER_JOBS.get(name, given.runs))
                print(f"{'':42} {ours / peer(name, given.peer, jobs):8.2f} of {name}")


if __name__ == "__main__":
    main()
