"""An installation on SQLite with a manual clock: applies, fires, starts and ends runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from typing import Any

from tests.fakes.clock import ManualClock
from tests.fakes.stock import HANDLER, Stock
from worker.handlers.catalogue import HandlerEntry
from worker.ids import RunId
from worker.model.definitions.file import parse_file
from worker.model.runs.fire import decide
from worker.model.runs.run import AdmittedRun, Declared
from worker.operations.apply import apply
from worker.store import catalogue, firing, tables
from worker.store.database import Database

NAME = "digest"
ORG = "org_acme"


class Timeline:
    """One org with one definition; everything happens only when a test says so."""

    def __init__(self, url: str, clock: ManualClock) -> None:
        self.clock = clock
        self.database = Database.open(url, clock=clock)
        self.stock = Stock(self.database)
        self.worker = self.stock.worker(handlers=(HANDLER,))
        self.running: dict[RunId, AdmittedRun] = {}
        with self.database.transaction() as connection:
            entry = HandlerEntry(HANDLER, "acme-jobs", "1.0", "acme_jobs:note")
            catalogue.put(connection, [entry], at=clock.now())

    def close(self) -> None:
        self.database.close()

    def define(self, *, timezone: str | None = None, **keys: Any) -> None:
        """Apply the definition with these keys, in an org of this time zone."""
        zone = f'timezone = "{timezone}"\n' if timezone else ""
        lines = [f"{key} = {_toml(value)}" for key, value in keys.items()]
        text = (
            f'[[org]]\ncode = "{ORG}"\nissuer = "main"\nmax_concurrent_runs = 1000\n{zone}\n[[definition]]\n'
            f'org = "{ORG}"\nname = "{NAME}"\nhandler = "{HANDLER}"\n' + "\n".join(lines)
        )
        apply(self.database, parse_file(text), actor="tester")

    def fire(self) -> None:
        """Fire everything that is due, as a running worker does."""
        while True:
            with self.database.transaction() as connection:
                report = firing.fire(
                    connection, lambda due, now: decide(due, now, lambda _: Declared()), limit=100, specs={}
                )
            now = self.clock.now()
            if not report.more and (report.next_fire_at is None or report.next_fire_at > now):
                return

    def fire_until(self, end: datetime) -> None:
        """Let time pass until `end` with a running worker that wakes for each scheduled time."""
        while True:
            self.fire()
            following = self.next_fire_at
            if following is None or following > end:
                self.clock.set(end)
                return
            self.clock.set(following)

    @property
    def next_fire_at(self) -> datetime | None:
        (row,) = self.stock.all(tables.schedule)
        found: datetime | None = row["next_fire_at"]
        return found

    def start(self) -> list[AdmittedRun]:
        """Start the waiting runs."""
        admitted = self.stock.admit(self.worker, offered={HANDLER: None})
        self.running |= {run.id: run for run in admitted}
        return admitted

    def end(self, run_id: RunId, state: str = "succeeded", **values: Any) -> None:
        """End a running run."""
        self.stock.finish(self.worker, self.stock.ended(self.running.pop(run_id), state, **values))

    def runs(self) -> list[dict[str, Any]]:
        """The scheduled runs, by scheduled time."""
        rows = self.stock.all(tables.runs, tables.runs.c.origin == "schedule")
        return sorted(rows, key=lambda row: row["scheduled_for"])

    def instants(self) -> list[datetime]:
        return [run["scheduled_for"] for run in self.runs()]

    def skips(self) -> list[dict[str, Any]]:
        return sorted(self.stock.all(tables.skips), key=lambda row: row["skipped_from"])

    def skipped(self) -> dict[str, int]:
        """The number of skipped scheduled times, by reason."""
        counts: Counter[str] = Counter()
        for row in self.skips():
            counts[row["reason"]] += row["count"]
        return dict(counts)

    def accounted(self) -> dict[date, int]:
        """Scheduled runs and skip counts by UTC day."""
        counts = days(self.instants())
        for row in self.skips():
            first, last = row["skipped_from"].astimezone(UTC), row["skipped_until"].astimezone(UTC)
            assert first.date() == last.date(), f"a skip over midnight: {row}"
            counts[first.date()] += row["count"]
        return dict(counts)


def days(instants: Iterable[datetime]) -> Counter[date]:
    """The number of times in each UTC day."""
    return Counter(instant.astimezone(UTC).date() for instant in instants)


def _toml(value: Any) -> str:
    if isinstance(value, timedelta):
        value = f"{value // timedelta(milliseconds=1)}ms"
    return json.dumps(value, default=datetime.isoformat)
