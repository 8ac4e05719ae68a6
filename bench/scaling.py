"""Measures what grows with the number of orgs: rows, firing, admission, ends, WAL and vacuum on PostgreSQL.

    .venv/bin/python -m bench.scaling [--orgs 1000 10000 100000] [--runs N]

Each number of orgs gets a database of its own: an org with a credential, a stored token and one definition.
Then N runs (20,000, one of each of as many definitions) are fired, admitted, ended and deleted in batches
as a worker does, by the store's functions. "here" is this side's processor time, "there" the server's;
WAL includes full pages, since a checkpoint precedes. Sizes are of tables with their indexes.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import text

from bench.admission import carry, processor
from bench.filling import HANDLER, PART, Filled, filled
from worker.clock import SystemClock, to_text
from worker.engine.loops import maintenance
from worker.model.runs.fire import decide
from worker.model.runs.run import Declared
from worker.store import firing, sweeps
from worker.store.database import Database

OF_ORGS = ("orgs", "credentials", "access_tokens", "definitions", "definition_revisions", "schedule")
OF_RUNS = ("runs", "run_ends", "attempts")
SPEC = (
    '{{"handler": "{handler}", "schedule": "{minute} {hour} * * *", "isolation": "inline", '
    '"scopes": ["read:kb"]}}'
)
FIRED = 100
ADMITTED = 500
# Bytes of a sealed secret, and of a sealed token with some properties.
SECRET = 72
TOKEN = 1_000


def fill(made: Filled, orgs: int, due: int) -> None:
    """Give each org a credential, a token and a definition, the first `due` of them due now."""
    made.add_orgs(orgs)
    now = datetime.now(UTC)
    stamp, later = to_text(now), to_text(now + timedelta(hours=1))
    at = now.replace(second=0, microsecond=0)
    past, far = to_text(at), to_text(at + timedelta(days=1))
    spec = SPEC.format(handler=HANDLER, minute=at.minute, hour=at.hour)
    for start in range(0, orgs, PART):
        ids = list(enumerate(made.orgs))[start : start + PART]
        made.put(
            "credentials",
            ("id", "org_id", "generation", "client_id", "sealed", "key_id", "created_at", "created_by"),
            [(id_, id_, 1, f"m2m-{n:08x}", bytes(SECRET), "k1", stamp, "bench") for n, id_ in ids],
        )
        made.put(
            "access_tokens",
            (
                *("id", "org_id", "issuer", "version", "credential_id", "sealed", "key_id"),
                *("received_at", "expires_at"),
            ),
            [(f"{n:064x}", id_, "main", 1, id_, os.urandom(TOKEN), "k1", stamp, later) for n, id_ in ids],
        )
        made.put(
            "definitions",
            ("id", "org_id", "name", "revision", "enabled", "created_at", "updated_at"),
            [(id_, id_, "nightly-report", 1, True, stamp, stamp) for _, id_ in ids],
        )
        made.put(
            "definition_revisions",
            ("definition_id", "revision", "spec", "at", "by"),
            [(id_, 1, spec, stamp, "bench") for _, id_ in ids],
        )
        made.put(
            "schedule",
            ("definition_id", "org_id", "next_scheduled_for", "next_fire_at"),
            [(id_, id_, *([past, past] if n < due else [far, far])) for n, id_ in ids],
        )


def ask(database: Database, query: str) -> Any:
    with database.autocommit() as connection:
        return connection.execute(text(query)).scalar_one()


def sizes(database: Database, tables: tuple[str, ...]) -> dict[str, int]:
    """Bytes of tables with their indexes."""
    return {name: ask(database, f"SELECT pg_total_relation_size('{name}')") for name in tables}


def cost(made: Filled, work: Callable[[], int]) -> str:
    """What each unit of this work costs."""
    wal = "SELECT pg_current_wal_insert_lsn() - '0/0'"
    before, here, there, began = ask(made.database, wal), processor(), made.server_cpu(), time.perf_counter()
    done = work()
    seconds = time.perf_counter() - began
    here, there = processor() - here, made.server_cpu() - there
    written = float(ask(made.database, wal) - before)
    return (
        f"{1e6 * here / done:5.0f} us here {1e6 * there / done:5.0f} us there  {written / done:6.0f} B WAL"
        f"  ({done / seconds:6.0f}/s)"
    )


def fire(database: Database) -> int:
    """Fire all that is due."""
    fired, specs = 0, {}  # type: ignore[var-annotated]
    while True:
        with database.transaction() as connection:
            report = firing.fire(
                connection,
                lambda due, now: decide(due, now, lambda _: Declared("inline")),
                limit=FIRED,
                specs=specs,
            )
        fired += len(report.inserted)
        if not report.more:
            return fired


def forget(database: Database) -> int:
    """Delete runs that ended, as retention does, without its pauses."""
    runs = 0
    while True:
        with database.transaction() as connection:
            parts = sweeps.forget_parts(
                connection, "succeeded", timedelta(0), runs=maintenance.BATCH, limit=maintenance.PARTS
            )
        if parts == maintenance.PARTS:
            continue
        with database.transaction() as connection:
            some = sweeps.forget_runs(connection, "succeeded", timedelta(0), limit=maintenance.BATCH)
        runs += some
        if some < maintenance.BATCH:
            return runs


def vacuumed(database: Database, table: str) -> float:
    began = time.perf_counter()
    with database.autocommit() as connection:
        connection.execute(text(f"VACUUM {table}"))
    return time.perf_counter() - began


def measure(orgs: int, runs: int) -> Iterator[str]:
    """The lines about this number of orgs."""
    due = min(orgs, runs)
    with filled("postgresql") as made:
        began = time.perf_counter()
        fill(made, orgs, due)
        made.settle()
        yield f"{orgs} orgs, filled in {time.perf_counter() - began:.0f} s, load {os.getloadavg()[0]:.1f}"
        of_orgs = sizes(made.database, OF_ORGS)
        parts = ", ".join(f"{name} {size / orgs:.0f}" for name, size in of_orgs.items())
        yield f"  bytes an org: {sum(of_orgs.values()) / orgs:.0f} ({parts})"
        before = sizes(made.database, OF_RUNS)
        database = Database.open(made.url, clock=SystemClock(), role="worker")
        try:
            yield f"  fire:           {cost(made, lambda: fire(database))}"
            made.settle()
            worker = made.add_worker()

            def admit_and_end() -> int:
                return carry(database, worker, batch=ADMITTED, runs=due).runs

            yield f"  admit and end:  {cost(made, admit_and_end)}"
            after = sizes(made.database, OF_RUNS)
            seconds = {name: vacuumed(made.database, name) for name in ("live_runs", "runs", "schedule")}
            yield f"  delete:         {cost(made, lambda: forget(database))}"
        finally:
            database.close()
        parts = ", ".join(f"{name} {1000 * each:.0f} ms" for name, each in seconds.items())
        yield f"  vacuum after {due} runs: {parts}"
        grown = {name: (after[name] - before[name]) / due for name in OF_RUNS}
        parts = ", ".join(f"{name} {size:.0f}" for name, size in grown.items())
        yield f"  bytes a run that ended: {sum(grown.values()):.0f} ({parts})"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--orgs", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    options.add_argument("--runs", type=int, default=20_000)
    given = options.parse_args()
    for orgs in given.orgs:
        for line in measure(orgs, given.runs):
            print(line, flush=True)


if __name__ == "__main__":
    main()
