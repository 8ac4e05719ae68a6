"""Measures what it costs to know which definitions fail, while everything fails at once.

    .venv/bin/python -m bench.failures [--database sqlite|postgresql] [--runs N] [--definitions N]
        [--rounds N]

A backlog of inline runs that raise, once with the triggers that keep `failing_definitions` (migration
0007) and once without them, alternating. Prints the ratios of each pair: of the rates, and of the
processor time of worker and server together, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics

from sqlalchemy import text

from bench.installation import Installation, installation

ORGS = 100
SLOTS = 1000
migration = importlib.import_module("migrations.versions.0007_search")


def without_triggers(made: Installation) -> None:
    """Let the ends of runs do what they did before migration 0007."""
    with made.database.transaction() as connection:
        if made.database.dialect == "sqlite":
            for name in ("runs_failing", "runs_failing_put"):
                connection.execute(text(f"DROP TRIGGER {name}"))
        else:
            for statement in (migration.ENDED_BEFORE, migration.PUT_BEFORE):
                connection.exec_driver_sql(statement)


def fail(dialect: str, runs: int, definitions: int, *, triggers: bool) -> tuple[float, float]:
    """Let the runs fail; returns runs per second, and microseconds of processor time for each."""
    with installation(dialect, orgs=ORGS) as made:
        made.configure(slots=SLOTS)
        made.define("bench.fails", count=definitions, spec={"max_attempts": 1})
        made.add_backlog(runs, "bench.fails", "inline")
        if not triggers:
            without_triggers(made)
        since = made.now()
        with made.workers() as working:
            made.wait_for_end(runs // 4)
            cpu, server, began = working.cpu(), made.server_cpu(), made.ended()
            made.wait_for_end(runs)
            per_run = 1e6 / max(1, runs - began)
            worker, server = per_run * (working.cpu() - cpu), per_run * (made.server_cpu() - server)
        with made.database.autocommit() as connection:
            known = connection.execute(text("SELECT count(*) FROM failing_definitions")).scalar_one()
        if known != (definitions if triggers else 0):
            raise SystemExit(f"{known} definitions are known to fail")
        rate = made.rates(since).steady
    print(
        f"{dialect}, {'with' if triggers else 'without'} the triggers: {rate:.0f} runs/s, "
        f"worker {worker:.0f} us a run, server {server:.0f} us; load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    return rate, worker + server


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--definitions", type=int, default=ORGS)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    rates, times = [], []
    for turn in range(given.rounds):
        # Each is first once: a machine that slows down favours neither.
        order = (True, False) if turn % 2 else (False, True)
        found = {each: fail(given.database, given.runs, given.definitions, triggers=each) for each in order}
        rates.append(found[True][0] / found[False][0])
        times.append(found[True][1] / found[False][1])
    for what, ratios in (("rate", rates), ("processor time", times)):
        said = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{what} with the triggers to without: {said}; median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
