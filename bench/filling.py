"""A separate database, filled directly with the orgs and runs that a measurement needs."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

from sqlalchemy import text

from bench.history import put
from bench.server import own_server, processor_time
from tests.fakes.postgres import Server
from worker.clock import SystemClock, to_text
from worker.ids import WorkerId, new_id
from worker.store import schema, workers
from worker.store.database import Database
from worker.store.dialect import driver

HANDLER = "bench.inline"

_RUN = (
    *("id", "org_id", "definition_id", "revision", "handler", "origin", "scheduled_for", "created_at"),
    *("created_by", "idempotency_key"),
)
_ENDED = (
    *_RUN,
    *("state", "available_at", "started_at", "finished_at", "attempt", "result_fencing_token", "worker_id"),
)
_LIVE = (
    *("id", "org_id", "definition_id", "revision", "handler", "origin", "scheduled_for", "idempotency_key"),
    *("isolation", "serial", "state", "reason", "available_at"),
)
_ATTEMPT = (
    *("run_id", "attempt", "org_id", "worker_id", "fencing_token", "handler", "started_at", "ended_at"),
    "outcome",
)
# Rows created before insertion: two tables share one list.
PART = 20_000


@dataclass
class Filled:
    """The database, and on PostgreSQL its server. Each org's definition has the org's id."""

    url: str
    database: Database
    server: Server | None
    orgs: list[str] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def add_orgs(self, number: int, *, most: int = 10_000) -> None:
        now = to_text(datetime.now(UTC))
        self.orgs = [self._id(datetime.now(UTC)) for _ in range(number)]
        self.put(
            "orgs",
            ("id", "code", "name", "issuer", "max_concurrent_runs", "tags", "created_at", "updated_at"),
            [(id_, f"org_{n}", f"Org {n}", "main", most, "[]", now, now) for n, id_ in enumerate(self.orgs)],
        )

    def add_waiting(self, number: int) -> None:
        """Add waiting runs, inline and not serial, for the orgs in turn; every third is the first org's."""
        at = datetime.now(UTC) - timedelta(seconds=1)
        for part in range(0, number, PART):
            runs, live, stamp = [], [], to_text(at)
            for n in range(part, min(part + PART, number)):
                id_, org = self._id(at), self.orgs[0 if n % 3 == 0 else n % len(self.orgs)]
                run = (id_, org, org, 1, HANDLER, "manual", stamp)
                runs.append((*run, stamp, "bench", id_))
                live.append((*run, id_, "inline", False, "waiting", "due", stamp))
            self.put("runs", _RUN, runs)
            self.put("live_runs", _LIVE, live)

    def add_ended(self, number: int) -> None:
        """Add runs that succeeded in the last month, each with its attempt, for the orgs in turn."""
        end, days = datetime.now(UTC) - timedelta(hours=1), timedelta(days=30)
        for part in range(0, number, PART):
            runs, attempts = [], []
            for n in range(part, min(part + PART, number)):
                at = end - days * (1 - n / number)
                id_, org, stamp = self._id(at), self.orgs[n % len(self.orgs)], to_text(at)
                run = (id_, org, org, 1, HANDLER, "manual", stamp, stamp, "bench", id_)
                runs.append((*run, "succeeded", stamp, stamp, stamp, 1, 1, id_))
                attempts.append((id_, 1, org, id_, 1, HANDLER, stamp, stamp, "succeeded"))
            self.put("runs", _ENDED, runs)
            self.put("attempts", _ATTEMPT, attempts)

    def settle(self) -> None:
        """Vacuum and checkpoint, as autovacuum would."""
        with self.database.autocommit() as connection:
            if self.server is None:
                connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))
            else:
                connection.execute(text("VACUUM ANALYZE"))
                connection.execute(text("CHECKPOINT"))

    def add_worker(self) -> WorkerId:
        worker_id = WorkerId(new_id())
        with self.database.transaction() as connection:
            workers.register(
                connection,
                worker_id,
                host="bench",
                pid=1,
                version="1",
                lease=timedelta(hours=1),
                handlers=[HANDLER],
                capacity={"inline": 1000},
            )
        return worker_id

    def server_cpu(self) -> float:
        """Processor seconds of the server, including processes that ended; SQLite has none."""
        if self.server is None:
            return 0.0
        return 0.0 if self.server.pid is None else processor_time(self.server.pid)

    def put(self, table: str, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
        with self.database.transaction() as connection:
            put(driver(connection), self.database.dialect, table, columns, rows)

    def _id(self, at: datetime) -> str:
        """A UUIDv7 of this time."""
        head = f"{int(at.timestamp() * 1000):012x}"
        return f"{head[:8]}-{head[8:]}-7000-8000-{next(self._numbers):012x}"


@contextlib.contextmanager
def filled(dialect: str) -> Iterator[Filled]:
    """An empty schema: a SQLite file, or a database on a server of its own."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orgworker-bench-")))
        server = stack.enter_context(own_server()) if dialect == "postgresql" else None
        url = server.url() if server else f"sqlite:///{folder / 'worker.db'}"
        schema.upgrade(url)
        # Filling the tables has no deadline.
        database = Database.open(url, clock=SystemClock(), role="bench", threads=1, deadline=600)
        stack.callback(database.close)
        yield Filled(url, database, server)
