"""Measures starts in a product's transaction: their cost, beside a plain INSERT and Procrastinate's deferral.

    .venv/bin/python -m bench.starts [--starts N] [--backlog N] [--peer VENV]

On one PostgreSQL that syncs to disk: a start within an open transaction; starts a second in batches, each
batch committed; how long firing 200 definitions takes while N starts wait and a worker makes their runs,
against none; and runs that a worker makes of starts. `--peer` is a virtual environment with
`procrastinate psycopg[binary,pool]`, whose deferral runs in the same transaction by its own function.

Prints milliseconds, rates and ratios. Exits with 1 if a start takes more than 0.3 ms, if batches make fewer
than 5,000 a second, or if waiting starts make firing more than 1.5 times as slow.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
from psycopg.types.json import Jsonb
from sqlalchemy import text

from bench.server import own_server
from tests.fakes.site import definition, one_definition
from worker.clock import SystemClock
from worker.ids import new_id
from worker.model.definitions.file import parse_file
from worker.model.runs.fire import decide
from worker.model.runs.run import Decision, Declared, DueDefinition
from worker.operations.apply import apply
from worker.operations.product import allow
from worker.operations.starts import make_runs
from worker.store import firing, schema
from worker.store.database import Database
from worker.store.start_functions import PRODUCT

BATCH = 500
FIRED = 200
TURNS = 15
PARAMS = {"order": "o-1234567", "amount": 1200, "lines": [1, 2, 3]}
MOST_MS, LEAST_RATE, MOST_SLOWER = 0.3, 5_000, 1.5


def each_ms(connection: psycopg.Connection[Any], call: Callable[[int], object], count: int) -> float:
    """The median time of one call within an open transaction, which is rolled back."""
    times = []
    for number in range(count):
        began = time.perf_counter()
        call(number)
        times.append(time.perf_counter() - began)
    connection.rollback()
    return statistics.median(times[count // 10 :]) * 1000


def in_transaction(url: str, count: int) -> tuple[float, float]:
    """Milliseconds of a start, and of a plain INSERT of the same values."""
    with psycopg.connect(url) as connection:
        started = "SELECT orgworker_start('org_acme', 'digest', %s, %s)"
        given = Jsonb(PARAMS)
        start = each_ms(connection, lambda n: connection.execute(started, (given, f"one {n}")), count)
        connection.execute("CREATE TEMP TABLE plain (id uuid PRIMARY KEY, key text UNIQUE, params jsonb)")
        connection.commit()
        insert = "INSERT INTO plain VALUES (gen_random_uuid(), %s, %s) RETURNING id"
        plain = each_ms(connection, lambda n: connection.execute(insert, (f"one {n}", given)), count)
    return start, plain


def in_batches(url: str, count: int, name: str) -> float:
    """Starts a second, in batches of `BATCH` that are committed."""
    with psycopg.connect(url) as connection:
        began = time.perf_counter()
        for part in range(count // BATCH):
            entries = [
                {"org": "org_acme", "definition": "digest", "key": f"{name} {part} {n}", "params": PARAMS}
                for n in range(BATCH)
            ]
            connection.execute("SELECT orgworker_start_many(%s)", (Jsonb(entries),))
            connection.commit()
        return count / (time.perf_counter() - began)


def decided(due: DueDefinition, now: datetime) -> Decision:
    return decide(due, now, lambda handler: Declared())


def firing_ms(database: Database) -> float:
    """The median time of a transaction that fires `FIRED` definitions."""
    times = []
    due = text(
        "UPDATE schedule SET next_scheduled_for = :at, next_fire_at = :at WHERE next_fire_at IS NOT NULL"
    )
    for turn in range(TURNS):
        with database.transaction() as connection:
            at = database.now(connection).replace(second=0, microsecond=0) - timedelta(minutes=TURNS - turn)
            connection.execute(due, {"at": at})
        began = time.perf_counter()
        with database.transaction() as connection:
            firing.fire(connection, decided, limit=FIRED, specs={})
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


def made_rate(url: str, ended: threading.Event, found: list[float]) -> None:
    """Make runs as a worker does, with its share of the time, and append how many a second of work."""
    database, busy, made, after = Database.open(url, clock=SystemClock()), 0.0, 0, None
    while not ended.is_set():
        began = time.perf_counter()
        step = make_runs(database, after)
        took = time.perf_counter() - began
        after = step.passed
        if step.made:
            busy, made = busy + took, made + step.made
        time.sleep(took * 2 / 3 if step.made else 0.1)
    found.append(made / busy if busy else 0.0)
    database.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--starts", type=int, default=3_000)
    parser.add_argument("--backlog", type=int, default=100_000)
    parser.add_argument("--peer", type=Path)
    given = parser.parse_args()
    with own_server() as server, server.new_database() as url:
        schema.upgrade(url)
        database, login = Database.open(url, clock=SystemClock(), threads=4), f"shop_{new_id()[-12:]}"
        server.execute(f"CREATE ROLE {login} LOGIN IN ROLE {PRODUCT}")
        file = one_definition(overlap="allow") + "".join(
            definition("org_acme", f"often-{n}", "acme.plain", "* * * * *", overlap="allow")
            for n in range(FIRED)
        )
        apply(database, parse_file(file), actor="bench", allow_unknown_handlers=True)
        allow(database, login, ["org_acme"], actor="bench")
        product = url.replace("postgres@", f"{login}@")

        start, plain = in_transaction(product, given.starts)
        print(f"a start in an open transaction: {start:.3f} ms; a plain INSERT: {plain:.3f} ms")
        if given.peer is not None:
            script = Path(__file__).with_name("peer_procrastinate_defer.py")
            command = [str(given.peer / "bin" / "python"), str(script), url, str(given.starts)]
            peer = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(f"Procrastinate's deferral: {peer:.3f} ms; a start takes {start / peer:.2f} times as long")
        rate = in_batches(product, max(BATCH, given.starts), "batch")
        print(f"in batches of {BATCH}, each committed: {rate:,.0f} starts a second")

        while make_runs(database).made:
            pass
        alone = firing_ms(database)
        in_batches(product, given.backlog, "backlog")
        waiting = firing_ms(database)
        ended, found = threading.Event(), list[float]()
        maker = threading.Thread(target=made_rate, args=(url, ended, found))
        maker.start()
        beside = firing_ms(database)
        ended.set()
        maker.join()
        print(
            f"firing {FIRED} definitions: {alone:.1f} ms; while {given.backlog:,} starts wait: "
            f"{waiting:.1f} ms, {waiting / alone:.2f} times; and a worker makes their runs: {beside:.1f} ms"
        )
        print(f"runs made of starts: {found[0]:,.0f} a second of work")
        database.close()
    return int(start > MOST_MS or rate < LEAST_RATE or waiting > MOST_SLOWER * alone)


if __name__ == "__main__":
    sys.exit(main())
