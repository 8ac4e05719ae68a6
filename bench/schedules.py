"""Measures the cost of schedules, and of APScheduler's SQLAlchemyJobStore for comparison.

    .venv/bin/python -m bench.schedules [--database sqlite|postgresql] [--stored N] [--due N] [--seconds S]
        [--at-once]     instead: N due at one time each second, of ten times as many stored

With 1,000 and with N stored definitions: how soon a worker is ready, what it uses while nothing is
due, and what one firing costs. Then so many due each second, spread, inline no-ops: how late they
start. The peer's jobs are stored in bulk, by rows as its own code makes them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import insert, select, text, update

from bench.installation import Installation, installation
from worker.ids import new_id
from worker.model.definitions.triggers import parse_schedule
from worker.model.definitions.zones import parse_zone
from worker.model.runs.fire import decide, spread_of
from worker.model.runs.run import Declared
from worker.store import firing, tables

ORGS = 100
BATCH = 5_000
FIRED = 1_000
PERIOD = 20
SPEC = {"handler": "bench.inline", "isolation": "inline"}


def store(made: Installation, count: int, schedule: str, *, due: bool) -> None:
    """Bulk-insert definitions for the orgs in turn, due now or in a month."""
    with made.database.autocommit() as connection:
        orgs = connection.execute(select(tables.orgs.c.id, tables.orgs.c.code)).all()
        now = made.database.now(connection)
    rows = definition_rows(orgs, count, schedule, now, due=due)
    with made.database.transaction() as connection:
        while batch := list(islice(rows, BATCH)):
            for place, table in enumerate((tables.definitions, tables.definition_revisions, tables.schedule)):
                connection.execute(insert(table), [row[place] for row in batch])
    if made.database.dialect == "postgresql":
        with made.database.autocommit() as connection:
            # Without the tables of runs: analysed while empty, they would get plans for empty tables.
            connection.execute(text("VACUUM ANALYZE definitions, definition_revisions, schedule"))


def definition_rows(
    orgs: Sequence[Any], count: int, schedule: str, now: datetime, *, due: bool
) -> Iterator[tuple[dict[str, Any], ...]]:
    trigger = parse_schedule(schedule, parse_zone("UTC"))
    spec = SPEC | {"schedule": schedule}
    first = trigger.after(now + (timedelta(seconds=10) if due else timedelta(days=30)))
    if first is None:
        raise SystemExit(f"{schedule} is never due")
    for number in range(count):
        org_id, code = orgs[number % len(orgs)]
        id_, name = new_id(), f"{schedule}-{number}"
        fire_at = first + spread_of(code, name, schedule, trigger)
        yield (
            {"id": id_, "org_id": org_id, "name": name, "revision": 1, "enabled": True}
            | {"created_at": now, "updated_at": now},
            {"definition_id": id_, "revision": 1, "spec": spec, "at": now, "by": "bench"},
            {"definition_id": id_, "org_id": org_id, "next_scheduled_for": first, "next_fire_at": fire_at},
        )


def ready_and_idle(made: Installation, seconds: float) -> tuple[float, float]:
    """Seconds from start to ready, and the share of a core while idle."""
    log = made.folder / "worker.log"
    log.write_bytes(b"")
    began = time.monotonic()
    with made.workers() as working:
        while b"worker.ready" not in log.read_bytes():
            time.sleep(0.005)
        ready = time.monotonic() - began
        time.sleep(5)
        cpu = working.cpu()
        time.sleep(seconds)
        return ready, (working.cpu() - cpu) / seconds


def cost_of_a_fire(made: Installation, rounds: int = 7) -> float:
    """Microseconds per definition for 1,000 that fire in batches; the best of several rounds."""
    schedule = tables.schedule
    costs = []
    # A worker caches the specs that it has read.
    specs: dict[Any, Any] = {}
    for _ in range(rounds):
        with made.database.transaction() as connection:
            connection.execute(text("DELETE FROM live_runs"))
            ids = list(connection.execute(select(schedule.c.definition_id).limit(FIRED)).scalars())
            at = made.database.now(connection).replace(microsecond=0)
            for part in range(0, FIRED, 500):
                connection.execute(
                    update(schedule)
                    .where(schedule.c.definition_id.in_(ids[part : part + 500]))
                    .values(next_scheduled_for=at, next_fire_at=at)
                )
        fired, began = 0, time.perf_counter()
        while fired < FIRED:
            with made.database.transaction() as connection:
                report = firing.fire(
                    connection,
                    lambda due, now: decide(due, now, lambda _: Declared("inline")),
                    limit=100,
                    specs=specs,
                )
            fired += len(report.inserted) + len(report.overlapped)
            if not report.more:
                break
        costs.append((time.perf_counter() - began) / FIRED * 1e6)
        time.sleep(1.1)
    return min(costs)


def lateness(
    made: Installation, due: int, schedules: Sequence[str], *, seconds: float, period: int
) -> tuple[list[float], float]:
    """Milliseconds from available to started, of runs after the first period; and the share of a core.

    Each schedule is due once in `period` seconds, all together `due` times a second.
    """
    for schedule in schedules:
        store(made, due * period // len(schedules), schedule, due=True)
    with made.workers() as working:
        # Ten seconds ahead; the first period warms tokens, plans and caches.
        time.sleep(10 + period)
        since, cpu = datetime.now(UTC), working.cpu()
        time.sleep(seconds)
        core = (working.cpu() - cpu) / seconds
        time.sleep(2)
    query = select(tables.runs.c.available_at, tables.runs.c.started_at).where(
        tables.runs.c.available_at >= since, tables.runs.c.available_at < since + timedelta(seconds=seconds)
    )
    with made.database.autocommit() as connection:
        found = connection.execute(query).all()
    late = [started - available for available, started in found if started is not None]
    if len(late) < len(found):
        print(f"  {len(found) - len(late)} of {len(found)} had not ended two seconds later", flush=True)
    return sorted(each.total_seconds() * 1000 for each in late), core


def peer(made: Installation, what: str, stored: int, seconds: float) -> dict[str, Any]:
    url = f"{made.url}.peer" if made.url.startswith("sqlite") else made.url
    command = [sys.executable, "-m", "bench.apscheduler_peer", url, what]
    options = ["--stored", str(stored), "--seconds", str(seconds), "--period", str(PERIOD)]
    root = Path(__file__).parent.parent
    done = subprocess.run([*command, *options], cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def share_below(values: list[float], share: float) -> float:
    """A quantile of sorted values."""
    return values[min(len(values) - 1, int(len(values) * share))] if values else float("inf")


def stored_definitions(dialect: str, stored: int) -> None:
    costs = {}
    for count in (1_000, stored):
        with installation(dialect, orgs=ORGS) as made:
            store(made, count, "every 1h", due=False)
            costs[count] = cost = cost_of_a_fire(made)
            with made.database.transaction() as connection:
                connection.execute(text("DELETE FROM live_runs"))
            ready, idle = ready_and_idle(made, 20)
            theirs = peer(made, "idle", count, 10)
        print(
            f"{count:>9} stored: ready {ready:.2f} s (peer: start() {theirs['ready']:.2f} s), idle "
            f"{100 * idle:.2f} % of a core (peer {100 * theirs['core']:.2f} %), a fire {cost:.0f} us, "
            f"load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
    print(f"cost of a fire at {stored} / at 1000: {costs[stored] / costs[1_000]:.2f}", flush=True)


def due_each_second(dialect: str, due: int, seconds: float) -> None:
    with installation(dialect, orgs=ORGS) as made:
        late, core = lateness(made, due, [f"every {PERIOD}s"], seconds=seconds, period=PERIOD)
        theirs = peer(made, "busy", due * PERIOD, seconds)
    print(f"{due} due each second, spread:", flush=True)
    print(f"  orgworker    {line(late, seconds, core)}, load {os.getloadavg()[0]:.1f}", flush=True)
    print(f"  APScheduler  {line(theirs['late'], seconds, theirs['core'], theirs['runs'])}", flush=True)
    ratio = share_below(theirs["late"], 0.99) / share_below(late, 0.99)
    print(f"  p99 of APScheduler / of orgworker: {ratio:.0f}", flush=True)


def due_at_once(dialect: str, due: int, seconds: float) -> None:
    """Fire a thousand definitions each second by crontab, without spread."""
    schedules = [f"{second}-59/10 * * * * *" for second in range(10)]
    with installation(dialect, orgs=ORGS) as made:
        late, core = lateness(made, due, schedules, seconds=seconds, period=10)
    print(f"{due} of {due * 10} due at one time each second, {dialect}:", flush=True)
    print(f"  orgworker    {line(late, seconds, core)}, load {os.getloadavg()[0]:.1f}", flush=True)


def line(late: list[float], seconds: float, core: float, count: int | None = None) -> str:
    started = (len(late) if count is None else count) / seconds
    p50, p99 = share_below(late, 0.5), share_below(late, 0.99)
    return f"{started:5.0f} started/s, late p50 {p50:.1f} ms, p99 {p99:.1f} ms, {100 * core:.0f} % of a core"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="postgresql")
    parser.add_argument("--stored", type=int, default=1_000_000)
    parser.add_argument("--due", type=int, default=1_000)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--at-once", action="store_true")
    given = parser.parse_args()
    if given.at_once:
        os.environ["WORKER_LOG__LEVEL"] = "warning"
        due_at_once(given.database, given.due, given.seconds)
        return
    # The log line that says when a worker is ready.
    os.environ["WORKER_LOG__LEVEL"] = "info"
    if given.stored:
        stored_definitions(given.database, given.stored)
    if given.due:
        os.environ["WORKER_LOG__LEVEL"] = "warning"
        due_each_second(given.database, given.due, given.seconds)


if __name__ == "__main__":
    main()
