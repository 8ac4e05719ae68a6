"""Measures calendars: a fire with and without one, and a change that all definitions of a calendar follow.

    .venv/bin/python -m bench.calendars [--database sqlite|postgresql|both] [--orgs N] [--dates N]

Each of the orgs (10,000) has a definition with params of its own that names a calendar of N dates (100).
Prints processor time of this process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from bench.server import own_server
from worker.clock import SystemClock
from worker.ids import DefinitionId, OrgId
from worker.model.definitions.file import parse_file
from worker.model.runs import fire
from worker.model.runs.run import Declared, DueDefinition
from worker.operations.apply import apply
from worker.store import schema
from worker.store.database import Database

ROUNDS = 5
FIRES = 3_000
DUE_AT = datetime(2030, 1, 1, 9, tzinfo=UTC)


def dates(count: int) -> list[str]:
    # None of them is the day that is fired.
    return [(date(2030, 1, 2) + timedelta(days=3 * number)).isoformat() for number in range(count)]


def fire_cost(count: int) -> float:
    """Processor seconds to decide what one definition does, the least of the rounds."""
    spec: dict[str, Any] = {"handler": "acme.note", "schedule": "0 9 * * *"}
    if count:
        spec |= {"calendar": "holidays", "calendar_dates": dates(count)}
    text = json.dumps(spec)
    due = [
        DueDefinition(
            DefinitionId(f"d{number}"),
            OrgId(f"o{number}"),
            f"org_{number}",
            "UTC",
            "digest",
            1,
            DUE_AT,
            json.loads(text),
        )
        for number in range(FIRES)
    ]

    def round_(number: int) -> float:
        now = DUE_AT + timedelta(milliseconds=200, microseconds=number)
        began = time.process_time()
        for each in due:
            fire.decide(each, now, lambda handler: Declared())
        return (time.process_time() - began) / FIRES

    return min(round_(number) for number in range(ROUNDS))


@contextlib.contextmanager
def empty(dialect: str) -> Iterator[Database]:
    """An empty schema: a SQLite file, or a database on a server of its own."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(own_server()) if dialect == "postgresql" else None
        url = f"sqlite:///{folder / 'worker.db'}" if server is None else server.url()
        schema.upgrade(url)
        database = Database.open(url, clock=SystemClock())
        stack.callback(database.close)
        yield database


def change_cost(database: Database, orgs: int, count: int) -> tuple[float, float]:
    """Processor seconds to apply the file, and then one more date."""
    entries = "".join(
        f'[[org]]\ncode = "org_{number}"\nissuer = "main"\n[[definition]]\norg = "org_{number}"\n'
        f'name = "digest"\nhandler = "acme.note"\nschedule = "0 9 * * *"\ncalendar = "holidays"\n'
        f"params = {{ number = {number} }}\n"
        for number in range(orgs)
    )

    def calendar(count: int) -> str:
        return f'[[calendar]]\nname = "holidays"\ndates = {json.dumps(dates(count))}\n'

    def applied(text: str) -> float:
        began = time.process_time()
        apply(database, parse_file(text), actor="bench", allow_unknown_handlers=True)
        return time.process_time() - began

    return applied(calendar(count) + entries), applied(calendar(count + 1))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--database", choices=["sqlite", "postgresql", "both"], default="both")
    options.add_argument("--orgs", type=int, default=10_000)
    options.add_argument("--dates", type=int, default=100)
    given = options.parse_args()
    print(
        f"a fire: {1e6 * fire_cost(0):.1f} us, with {given.dates} dates {1e6 * fire_cost(given.dates):.1f} us"
    )
    for dialect in ("sqlite", "postgresql") if given.database == "both" else (given.database,):
        with empty(dialect) as database:
            first, again = change_cost(database, given.orgs, given.dates)
        print(f"{dialect}: {given.orgs} definitions applied in {first:.1f} s, one more date in {again:.1f} s")
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
