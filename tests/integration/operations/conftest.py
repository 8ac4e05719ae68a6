"""A migrated database with a catalogue, for the operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Insert, select, update

from tests.conftest import migrated_on
from tests.fakes.clock import ManualClock
from tests.fakes.rows import attempt_row, reading
from worker.handlers.catalogue import HandlerEntry
from worker.model.definitions.file import parse_file
from worker.operations.apply import apply as apply_file
from worker.operations.changes import Change
from worker.store import catalogue, tables
from worker.store.database import Database
from worker.tokens.sealing import KeyRing

CATALOGUE = (
    HandlerEntry(
        "acme.note",
        "acme-jobs",
        "1.0",
        "acme_jobs:note",
        scopes=("read:kb",),
        params_schema={
            "type": "object",
            "properties": {"text": {"type": "string"}, "times": {"type": "integer", "minimum": 1}},
            "required": ["text"],
            "additionalProperties": False,
        },
    ),
    HandlerEntry("acme.plain", "acme-jobs", "1.0", "acme_jobs:plain"),
    HandlerEntry(
        *("acme.lists", "acme-jobs", "1.0", "acme_jobs:lists"),
        egress=("api", "https://*.a.example"),
        audiences=("mcp", "kb"),
    ),
    HandlerEntry("acme.also", "acme-jobs", "1.0", "acme_jobs:also", egress=("https://c.example",)),
    HandlerEntry("acme.starts", "acme-jobs", "1.0", "acme_jobs:starts", children=("acme.plain", "acme.gone")),
    HandlerEntry("acme.exceeds", "acme-jobs", "1.0", "acme_jobs:exceeds", children=("acme.note",)),
    HandlerEntry("acme.keeps", "acme-jobs", "1.0", "acme_jobs:keeps", state=True),
    HandlerEntry("acme.confuses", "acme-jobs", "1.0", "acme_jobs:confuses", children=("acme.keeps",)),
    HandlerEntry("acme.inline", "acme-inline", "2.0", "acme_inline:go", isolation="inline"),
    HandlerEntry("acme.broken", "acme-broken", "0.1", "acme_broken:go", error="ImportError: no module"),
)


@pytest.fixture
def migrated_url(request: pytest.FixtureRequest) -> str:
    """On SQLite, but where a test asks for either: those execute every statement that operations have."""
    return migrated_on(getattr(request, "param", "sqlite"), request)


@pytest.fixture
def database(migrated_url: str, clock: ManualClock) -> Iterator[Database]:
    """A database with the schema of this release and handlers in its catalogue; its time is `clock`."""
    # Not on an instant of any schedule, as it would never be in life.
    clock.advance(123.456)
    with clock.moves(migrated_url):
        opened = Database.open(migrated_url, clock=clock)
        with opened.transaction() as connection:
            catalogue.put(connection, CATALOGUE, at=opened.now(connection))
        yield opened
        opened.close()


@pytest.fixture
def keyring(tmp_path: Path) -> KeyRing:
    return KeyRing.generate(tmp_path / "keyring")


Apply = Callable[..., list[Change]]


@pytest.fixture
def apply(database: Database) -> Apply:
    """Apply a TOML text to the database."""

    def apply_text(text: str, **options: Any) -> list[Change]:
        return apply_file(database, parse_file(text), **{"actor": "tester"} | options)

    return apply_text


class Tables:
    """Rows as they are, read and bent past the operations."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def __getattr__(self, name: str) -> list[dict[str, Any]]:
        table = tables.metadata.tables[name]
        with self._database.autocommit() as connection:
            # PostgreSQL puts new rows where deleted ones were.
            query = select(table).order_by(*table.primary_key)
            return [dict(row) for row in connection.execute(query).mappings()]

    def everything(self) -> dict[str, list[dict[str, Any]]]:
        """Every row of every table, but the audit."""
        return {name: getattr(self, name) for name in tables.metadata.tables if name != "audit"}

    def insert(self, row: Insert) -> None:
        with self._database.transaction() as connection:
            connection.execute(row)

    def add_attempt(self, run_id: str, *, at: datetime | None = None, **values: Any) -> None:
        """As if the run's first attempt had failed, now or at `at`, but for `values`."""
        org_id = next(row["org_id"] for row in self.runs if row["id"] == run_id)
        self.insert(attempt_row(run_id, org_id, at or self.now(), **values))

    def now(self) -> datetime:
        return reading(self._database, self._database.now)

    def make_due_since(self, since: datetime, spread: timedelta = timedelta(0)) -> None:
        """As if nobody had fired since: every scheduled definition's next instant lies there."""
        with self._database.transaction() as connection:
            connection.execute(
                update(tables.schedule)
                .where(tables.schedule.c.next_fire_at.is_not(None))
                .values(next_scheduled_for=since, next_fire_at=since + spread)
            )

    def set_running(self, run_id: str) -> None:
        """As if a worker had admitted the run."""
        worker = "01900000-0000-7000-8000-000000000001"
        with self._database.transaction() as connection:
            connection.execute(
                update(tables.live_runs)
                .where(tables.live_runs.c.id == run_id)
                .values(
                    state="running",
                    reason=None,
                    worker_id=worker,
                    started_at=self._database.now(connection),
                    attempt=1,
                    fencing_token=1,
                )
            )

    def set_ended(
        self,
        run_id: str,
        state: str = "failed",
        reason: str | None = "error",
        at: datetime | None = None,
        detail: str | None = None,
    ) -> None:
        """As if the run had ended, now or at `at`."""
        with self._database.transaction() as connection:
            live, runs = tables.live_runs, tables.runs
            connection.execute(live.delete().where(live.c.id == run_id))
            connection.execute(
                update(runs)
                .where(runs.c.id == run_id)
                .values(
                    state=state,
                    reason=reason,
                    detail=detail,
                    finished_at=at or self._database.now(connection),
                    attempt=1,
                )
            )


@pytest.fixture
def rows(database: Database) -> Tables:
    return Tables(database)


def whole_hour(instant: datetime, *, ago: int = 0) -> datetime:
    """The hour that `instant` is in, or one so many hours before."""
    return instant.replace(minute=0, second=0, microsecond=0) - timedelta(hours=ago)
