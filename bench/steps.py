"""Measures durable steps: how many a second, how long one takes, and a long `ctx.map`.

    .venv/bin/python -m bench.steps [--database sqlite|postgresql|both] [--steps N] [--peer VENV]

64 runs at once make N steps each, one after another; the function of a step does nothing. Inline
runs share the worker's process, children have one each. The rate counts from the first step to the
last; "one" is the time of a single `await ctx.step(...)`. With `--peer`, DBOS makes as many steps in
as many workflows on a PostgreSQL like the worker's: VENV has `pip install dbos 'psycopg[binary]'`.
The map makes 1,000 calls of 100 ms, eight at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import select

from bench.installation import Installation, installation
from worker.store import tables

RUNS = 64
CALLS = 1_000
SECONDS = 0.1
CONCURRENCY = 8


def ours(dialect: str, handler: str, isolation: str, steps: int) -> float:
    """Run the steps in a worker and print the rate; returns steps per second."""
    with installation(dialect, orgs=RUNS) as made:
        results = measured(made, handler, isolation, runs=RUNS, params={"steps": steps})
    seconds = max(each["ended"] for each in results) - min(each["began"] for each in results)
    rate = RUNS * steps / seconds
    say(f"{isolation} runs, {dialect}", rate, [took for each in results for took in each["took"]])
    return rate


def measured(
    made: Installation, handler: str, isolation: str, *, runs: int, params: dict[str, Any]
) -> list[dict[str, Any]]:
    """The results of so many runs of a handler, which run at once."""
    made.configure(slots=runs, children=runs)
    made.define(handler, spec={"params": params, "isolation": isolation})
    made.add_backlog(runs, handler, isolation)
    with made.workers():
        made.wait_for_end(runs)
    with made.database.autocommit() as connection:
        rows = connection.execute(select(tables.runs.c.result, tables.runs.c.error)).all()
    if failed := [row.error for row in rows if row.result is None]:
        raise SystemExit(f"a run failed: {failed[0]}")
    return [row.result for row in rows]


def dbos(venv: Path, steps: int) -> float:
    """The same in DBOS; returns steps per second."""
    python = venv / "bin" / "python"
    if subprocess.run([python, "-c", "import dbos"], capture_output=True).returncode:
        raise SystemExit(f"{venv} has no DBOS: {venv}/bin/pip install dbos 'psycopg[binary]'")
    with installation("postgresql", orgs=1) as made:
        script = Path(__file__).with_name("peer_dbos.py")
        command = [str(python), str(script), made.url, str(RUNS), str(steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"DBOS: {done.stderr}")
    result = json.loads(done.stdout.splitlines()[-1])
    say("DBOS workflows, postgresql", result["rate"], result["took"])
    return float(result["rate"])


def mapped(dialect: str) -> None:
    """One run whose map makes many calls; prints the time beside that of the calls alone."""
    least = CALLS * SECONDS / CONCURRENCY
    with installation(dialect, orgs=1) as made:
        params = {"steps": CALLS, "seconds": SECONDS}
        [result] = measured(made, "bench.map", "child", runs=1, params=params)
    seconds = result["ended"] - result["began"]
    print(
        f"map of {CALLS:,} calls, {dialect:<14} {seconds:.1f} s, {seconds / least:.2f} x their time",
        flush=True,
    )


def say(what: str, rate: float, took: Sequence[float]) -> None:
    cuts = statistics.quantiles(took, n=100)
    one = f"one: p50 {1000 * cuts[49]:.1f} ms, p99 {1000 * cuts[98]:.1f} ms"
    print(f"{what:<30} {rate:8.0f} steps/s   {one}; load {os.getloadavg()[0]:.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--database", choices=("sqlite", "postgresql", "both"), default="both")
    parser.add_argument("--steps", type=int, default=200, help="of each run")
    parser.add_argument("--peer", type=Path, metavar="VENV")
    given = parser.parse_args()
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, {platform.platform()}\n")
    for dialect in ("sqlite", "postgresql") if given.database == "both" else (given.database,):
        rate = ours(dialect, "bench.steps_inline", "inline", given.steps)
        if dialect == "postgresql" and given.peer is not None:
            print(f"{'':30} {rate / dbos(given.peer, given.steps):8.1f} x DBOS")
        ours(dialect, "bench.steps", "child", given.steps)
        mapped(dialect)
    if given.peer is None:
        print("\nTo compare with DBOS: python -m venv VENV; VENV/bin/pip install dbos 'psycopg[binary]';")
        print("then call this again with --peer VENV")


if __name__ == "__main__":
    main()
