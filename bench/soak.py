"""Checks that tables do not grow beyond their content while runs come and go for hours.

    .venv/bin/python -m bench.soak [--seconds 300] [--rate 100] [--workers 2] [--database postgresql|sqlite]
        [--keep 20s]        how long history is kept
        [--hold-snapshot]   as a forgotten transaction would: nothing dead may go, and this has to fail

Definitions are due each second; their inline runs write a line and a checkpoint, and one in ten is
tried a second time. History is deleted after `--keep`, once a minute as always, and PostgreSQL's
autovacuum is left to its own. Each ten seconds it prints every table's size with its indexes and its
dead rows. The first third of the time fills the tables. Exit 1 when one of them is larger in the last
third than it ever was in the second: it keeps growing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from sqlalchemy import text

from bench.installation import Installation, installation
from tests.fakes.plugins import make_plugin
from worker.store.dialect import is_postgresql

HANDLERS = """\
import random

from worker import Retry, job


@job("soak.work", isolation="inline", max_attempts=3)
async def work(ctx):
    ctx.log.info("attempt %d", ctx.run.attempt)
    await ctx.save({"attempt": ctx.run.attempt})
    if ctx.run.attempt == 1 and random.random() < 0.1:
        return Retry("1s")
    return {"attempt": ctx.run.attempt}
"""
# Each run inserts and deletes rows of these.
HOT = ("live_runs", "schedule", "runs", "attempts", "run_logs", "checkpoints", "workers")
SUMS = ("rollup_days", "rollup_hours")
EVERY = 10.0
# Growth that is tolerated, because vacuums come a little earlier or later.
SLACK_SHARE = 0.15
SLACK_BYTES = 2**20
# Due but unfinished runs, as a multiple of a second's runs, above which the workers do not keep up.
BEHIND = 30

SIZES = """
SELECT relname, pg_total_relation_size(relid), n_dead_tup
FROM pg_stat_user_tables WHERE relname = ANY(:tables) ORDER BY array_position(:tables, relname::text)
"""
FILE_SIZES = "SELECT 'file', page_count * page_size, freelist_count FROM {pages}"
PAGES = "pragma_page_count, pragma_page_size, pragma_freelist_count"
ENDED = "SELECT COALESCE(sum(runs), 0) FROM rollup_days"
WAITING = "SELECT count(*) FROM live_runs"


@dataclass(frozen=True)
class Sample:
    """Bytes and dead rows of each table at one time; on SQLite of the file, with its free pages."""

    at: float
    sizes: Mapping[str, int]
    dead: Mapping[str, int]
    ended: int
    unfinished: int


def sample(made: Installation, began: float) -> Sample:
    with made.database.autocommit() as connection:
        if is_postgresql(connection):
            rows = connection.execute(text(SIZES), {"tables": list(HOT + SUMS)}).all()
        else:
            rows = connection.execute(text(FILE_SIZES.format(pages=PAGES))).all()
        ended, unfinished = (int(connection.execute(text(q)).scalar_one()) for q in (ENDED, WAITING))
    return Sample(
        time.monotonic() - began,
        {name: int(size) for name, size, _ in rows},
        {name: int(dead) for name, _, dead in rows},
        ended,
        unfinished,
    )


def growing(samples: Sequence[Sample], seconds: float) -> dict[str, tuple[int, int]]:
    """Tables that were larger in the last third than in the second: the maximum of each, in bytes."""
    second = [one for one in samples if seconds / 3 <= one.at < 2 * seconds / 3]
    last = [one for one in samples if one.at >= 2 * seconds / 3]
    found = {}
    for name in samples[-1].sizes:
        before, after = (max(one.sizes.get(name, 0) for one in third) for third in (second, last))
        if after > before * (1 + SLACK_SHARE) + SLACK_BYTES:
            found[name] = (before, after)
    return found


def header(names: Sequence[str]) -> None:
    print("MiB with indexes / dead rows (SQLite: free pages)")
    print(f"{'s':>5} {'runs/s':>6} {'unfinished':>10} " + " ".join(f"{name:>16}" for name in names))


def show(one: Sample, rate: float) -> None:
    cells = (f"{size / 2**20:.1f} / {one.dead[name]}" for name, size in one.sizes.items())
    print(
        f"{one.at:5.0f} {rate:6.0f} {one.unfinished:10d} " + " ".join(f"{cell:>16}" for cell in cells),
        flush=True,
    )


@contextlib.contextmanager
def snapshot(made: Installation, held: bool) -> Iterator[None]:
    """Hold a forgotten transaction that has read once, if requested."""
    if not held:
        yield
        return
    with made.database.transaction() as connection:
        connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
        connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
        connection.execute(text("SELECT count(*) FROM orgs"))
        yield


def soak(made: Installation, given: argparse.Namespace) -> list[Sample]:
    make_plugin(
        made.folder / "plugins",
        dist="orgworker-bench",
        modules={"bench_jobs": HANDLERS},
        entry_points={"soak.work": "bench_jobs:work"},
    )
    ages = "\n".join(f'{what} = "{given.keep}"' for what in ("succeeded", "failed", "skipped", "logs"))
    made.configure(slots=1000, extra=f"[retention]\n{ages}")
    with made.database.autocommit() as connection:
        at = made.database.now(connection).replace(microsecond=0) + timedelta(seconds=5)
    spec: dict[str, object] = {"schedule": "every 1s", "overlap": "allow", "spread": "off", "max_attempts": 3}
    made.define("soak.work", due_at=[at] * given.rate, spec=spec)
    samples: list[Sample] = []
    with made.workers(given.workers), snapshot(made, given.hold_snapshot):
        began = time.monotonic()
        while not samples or samples[-1].at < given.seconds:
            time.sleep(EVERY)
            now = sample(made, began)
            before = samples[-1] if samples else None
            if before is None:
                header(list(now.sizes))
            show(now, (now.ended - before.ended) / (now.at - before.at) if before else 0.0)
            samples.append(now)
    return samples


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="postgresql")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--rate", type=int, default=100, help="runs that are due each second")
    parser.add_argument("--workers", type=int, default=2, help="on PostgreSQL")
    parser.add_argument("--keep", default="20s")
    parser.add_argument("--hold-snapshot", action="store_true")
    given = parser.parse_args()
    if given.database == "sqlite":
        given.workers = 1
    print(f"{given.database}, {given.rate} runs due a second, {given.workers} worker(s), {given.keep} kept")
    with installation(given.database, orgs=50) as made:
        samples = soak(made, given)
        said = Path(made.folder / "worker.log").read_text(errors="replace")
    per_second = (samples[-1].ended - samples[0].ended) / (samples[-1].at - samples[0].at)
    print(f"{per_second:.0f} runs ended a second; load {os.getloadavg()[0]:.1f}, {datetime.now():%Y-%m-%d}")
    if samples[-1].unfinished > BEHIND * given.rate:
        print(
            f"the workers did not keep up, so growth was not measured; use a smaller --rate\n{said[-2000:]}"
        )
        return 2
    found = growing(samples, given.seconds)
    for name, (before, after) in found.items():
        print(f"{name} keeps growing: {before / 2**20:.1f} MiB at most before, then {after / 2**20:.1f}")
    if not found:
        print("no table keeps growing")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
