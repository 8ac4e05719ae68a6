"""A database with a month of history for many orgs, filled directly in bulk."""

from __future__ import annotations

import contextlib
import json
import signal
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import text

from tests.fakes.postgres import Server
from worker.clock import SystemClock, to_text
from worker.ids import DefinitionId, OrgId, RunId
from worker.model.runs.outcome import EndedAttempt, Error, Trail
from worker.model.search import words_of
from worker.store import schema
from worker.store.database import Database
from worker.store.dialect import driver
from worker.store.sql import run_words

ORGS = 1_000
NAMES = 10  # definitions of each org, of the same names in each; one org has a rare one more
# Of each org's name: two words and its number.
FIRST = ("Acme", "Globex", "Initech", "Umbrella", "Hooli", "Stark", "Wayne", "Wonka", "Cyberdyne", "Tyrell")
SECOND = ("Logistics", "Foods", "Energy", "Labs", "Media", "Health", "Travel")
LINES = 5_000  # of the log of one failed run
DAYS = 30
LIVE = 1_000  # the newest runs have not ended, a tenth of them run
SKIPS = 100_000
AUDIT = 100_000
HANDLER = "http.request"
WORKER = "01900000-0000-7000-8000-00000000000f"
RARE = "rare"
FAILED = 500  # a run that failed, by its number; its log is long

_SUM = """INSERT INTO rollup_hours
SELECT {}, org_id, state, count(*) FROM runs WHERE state IS NOT NULL GROUP BY 1, 2, 3"""
_HOURS = {
    "sqlite": _SUM.format("substr(finished_at, 1, 14) || '00:00.000000Z'"),
    "postgresql": _SUM.format("date_trunc('hour', finished_at)"),
}

Values = tuple[Any, ...]


@contextlib.contextmanager
def history(dialect: str, runs: int, orgs: int = ORGS) -> Iterator[str]:
    """The URL of a temporary database with this many runs and orgs."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orgworker-bench-")))
        if dialect == "postgresql":
            folder.chmod(0o755)
            server = Server(folder / "pg")
            server.start()
            stack.callback(server.stop, signal.SIGQUIT)
            url = server.url()
        else:
            url = f"sqlite:///{folder / 'worker.db'}"
        schema.upgrade(url)
        fill(url, runs, orgs)
        yield url


def fill(url: str, runs: int, orgs: int = ORGS) -> None:
    """Insert orgs, definitions and the history of DAYS days into an empty database."""
    database = Database.open(url, clock=SystemClock(), role="bench", deadline=600.0)
    made = _History(runs, datetime.now(UTC), orgs)
    try:
        with database.transaction() as connection:
            for table, columns, rows in made.tables():
                put(driver(connection), database.dialect, table, columns, rows)
            connection.execute(text(_HOURS[database.dialect]))
        with database.autocommit() as connection:
            if database.dialect == "postgresql":
                connection.execute(text("VACUUM ANALYZE"))
            else:
                connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))
    finally:
        database.close()


def put(raw: Any, dialect: str, table: str, columns: Sequence[str], rows: Iterable[Values]) -> None:
    names = ", ".join(f'"{name}"' for name in columns)
    if dialect == "postgresql":
        with raw.cursor() as cursor, cursor.copy(f"COPY {table} ({names}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
    else:
        marks = ", ".join("?" * len(columns))
        raw.executemany(f"INSERT INTO {table} ({names}) VALUES ({marks})", rows)  # noqa: S608


class _History:
    """The rows, oldest first, derived from the number of each run."""

    def __init__(self, runs: int, now: datetime, orgs: int) -> None:
        self._runs = runs
        self._live = min(LIVE, runs // 10)
        self._now = now
        self._begin = now - timedelta(days=DAYS)
        self._orgs = [self._id(number, self._begin, 0xA) for number in range(orgs)]
        self._definitions = [
            (self._id(number, self._begin, 0xD), number // NAMES, f"d{number % NAMES}")
            for number in range(orgs * NAMES)
        ] + [(self._id(orgs * NAMES, self._begin, 0xD), 0, RARE)]
        self._names = {id_: name for id_, _, name in self._definitions}

    def tables(self) -> Iterator[tuple[str, Sequence[str], Iterable[Values]]]:
        begin = to_text(self._begin)
        paused, unpaused = (to_text(self._now), "bench", "waits for a ticket"), (None, None, None)
        yield (
            "orgs",
            ("id", "code", "name", "issuer", "tags", "created_at", "updated_at"),
            ((id_, f"org_{n}", _name(n), "main", "[]", begin, begin) for n, id_ in enumerate(self._orgs)),
        )
        yield (
            "org_words",
            ("word", "org_id"),
            (
                (word, id_)
                for number, id_ in enumerate(self._orgs)
                for word in sorted(words_of(f"org_{number}", _name(number)))
            ),
        )
        yield (
            "definitions",
            ("id", "org_id", "name", "revision", "enabled", "created_at", "updated_at", *_PAUSED),
            (
                (
                    id_,
                    self._orgs[org],
                    name,
                    1,
                    True,
                    begin,
                    begin,
                    *(paused if number % 300 == 7 else unpaused),
                )
                for number, (id_, org, name) in enumerate(self._definitions)
            ),
        )
        yield (
            "credentials",
            _CREDENTIAL,
            (
                (
                    self._id(2 * n + g, self._begin, 0xC),
                    id_,
                    g + 1,
                    f"client-{n}",
                    f"file:{n}",
                    begin,
                    "bench",
                    "invalid_client" if g == 1 and n % 200 == 3 else None,
                )
                for n, id_ in enumerate(self._orgs)
                for g in range(2)
            ),
        )
        spec = json.dumps({"handler": HANDLER, "schedule": "*/15 * * * *"})
        yield (
            "definition_revisions",
            ("definition_id", "revision", "spec", "at", "by"),
            ((id_, 1, spec, begin, "bench") for id_, _, _ in self._definitions),
        )
        due = to_text(self._now + timedelta(minutes=15))
        yield (
            "schedule",
            ("definition_id", "org_id", "next_scheduled_for", "next_fire_at"),
            ((id_, self._orgs[org], due, due) for id_, org, _ in self._definitions),
        )
        yield "runs", _RUN, map(self._run, range(self._runs))
        yield "attempts", _ATTEMPT, map(self._attempt, range(self._runs - self._live))
        yield (
            "run_words",
            ("word", "run_id", "org_id", "shown"),
            (row for n in range(self._runs - self._live) if _fails(n) for row in self._words(n)),
        )
        yield (
            "checkpoints",
            ("run_id", "org_id", "attempt", "fencing_token", "saved_at", "data"),
            (self._checkpoint(n) for n in range(self._runs - self._live) if _fails(n)),
        )
        yield "run_logs", _LINE, map(self._line, range(min(LINES, self._runs)))
        yield "workers", _WORKER_COLUMNS, [self._worker()]
        yield "catalogue", _HANDLER, map(self._handler, range(40))
        yield "live_runs", _LIVE, map(self._unended, range(self._runs - self._live, self._runs))
        yield "skips", _SKIP, map(self._skip, range(SKIPS))
        yield "audit", _AUDIT, map(self._audited, range(AUDIT))

    def _run(self, number: int) -> Values:
        at = self._at(number, self._runs)
        state, reason = self._end(number)
        end = to_text(at + timedelta(seconds=2 + number % 30)) if state else None
        definition, org = self._of(number)
        id_ = self._id(number, at, 0)
        started = to_text(at + timedelta(seconds=1)) if state else None
        attempt = 1 if state else None
        stamp = to_text(at)
        return (
            id_,
            org,
            definition,
            1,
            HANDLER,
            "manual",
            stamp,
            stamp,
            id_,
            state,
            reason,
            started,
            end,
            attempt,
        )

    def _attempt(self, number: int) -> Values:
        at = self._at(number, self._runs)
        start, end = to_text(at + timedelta(seconds=1)), to_text(at + timedelta(seconds=2 + number % 30))
        run_id, (_, org) = self._id(number, at, 0), self._of(number)
        own = (run_id, 1, org, WORKER, number, HANDLER, start, start, end)
        if not _fails(number):
            return *own, self._end(number)[0], None, None
        error = json.dumps({"type": "OSError", "message": f"disk {number} is full"})
        return *own, "failed", error, f"OSError: disk <n> is full {number % 7}"

    def _words(self, number: int) -> Iterable[Values]:
        """As the end of the attempt leaves them."""
        run_id, (definition, org) = self._id(number, self._at(number, self._runs), 0), self._of(number)
        error = Error("OSError", f"disk {number} is full")
        attempt = EndedAttempt(
            *(RunId(run_id), OrgId(org), DefinitionId(definition), number, 1, self._begin, self._begin),
            *("failed", "failed", "error", Trail(HANDLER)),
            error=error.as_json(),
        )
        for word in run_words.words_of([attempt], {attempt.definition_id: self._names[definition]}):
            yield word[:4]

    def _checkpoint(self, number: int) -> Values:
        at = self._at(number, self._runs)
        data = json.dumps({"next": number})
        return self._id(number, at, 0), self._of(number)[1], 1, number, to_text(at), data

    def _line(self, number: int) -> Values:
        at = self._at(FAILED, self._runs)
        run_id, (_, org) = self._id(FAILED, at, 0), self._of(FAILED)
        stamp = to_text(at + timedelta(milliseconds=number))
        return run_id, 1, number + 1, org, stamp, "info", "log", f"row {number} of the import was read"

    def _worker(self) -> Values:
        now, until = to_text(self._now), to_text(self._now + timedelta(hours=1))
        handlers, capacity = json.dumps([HANDLER]), json.dumps({"children": 8, "inline": 0})
        return WORKER, "bench", 1, "0.1.0", to_text(self._begin), now, until, handlers, capacity

    def _handler(self, number: int) -> Values:
        name = f"acme.job_{number}" if number else HANDLER
        error = "ImportError: No module named 'acme'" if number in (7, 8) else None
        schema = json.dumps({"type": "object", "properties": {"url": {"type": "string"}}})
        return name, "acme-jobs", "1.2.0", "acme_jobs:job", "[]", schema, error, to_text(self._now)

    def _unended(self, number: int) -> Values:
        at = self._at(number, self._runs)
        definition, org = self._of(number)
        id_, stamp = self._id(number, at, 0), to_text(at)
        runs = number % 10 == 0
        state, reason, worker = ("running", None, WORKER) if runs else ("waiting", "due", None)
        started = stamp if runs else None
        return (
            id_,
            org,
            definition,
            1,
            HANDLER,
            "child",
            "manual",
            stamp,
            id_,
            False,
            state,
            reason,
            stamp,
            worker,
            started,
        )

    def _skip(self, number: int) -> Values:
        at = self._at(number, SKIPS)
        definition, org = self._of(number)
        return self._id(number, at, 1), org, definition, 1, to_text(at), to_text(at), 1, "missed"

    def _audited(self, number: int) -> Values:
        at = self._at(number, AUDIT)
        org = self._orgs[number % len(self._orgs)]
        return self._id(number, at, 2), to_text(at), "bench", "run.cancel", org, f"{number}", "{}"

    def _end(self, number: int) -> tuple[str | None, str | None]:
        """The state for a run's number; refused ones are few and old."""
        if number >= self._runs - self._live:
            return None, None
        if number < 20:
            return "refused", "scope_missing"
        if _fails(number):
            return "failed", "error"
        return ("cancelled", "requested") if number % 1000 == 1 else ("succeeded", None)

    def _of(self, number: int) -> tuple[str, str]:
        """Definition and org of a run, spread by a prime; only three are of the rare one."""
        place = (
            len(self._definitions) - 1
            if number in (30, 31, 32)
            else number * 7919 % (len(self._definitions) - 1)
        )
        id_, org, _ = self._definitions[place]
        return id_, self._orgs[org]

    def _at(self, number: int, of: int) -> datetime:
        return self._begin + (self._now - self._begin) * ((number + 1) / (of + 1))

    @staticmethod
    def _id(number: int, at: datetime, kind: int) -> str:
        head = f"{int(at.timestamp() * 1000):012x}"
        return f"{head[:8]}-{head[8:]}-7000-8{kind:03x}-{number:012x}"


def _name(number: int) -> str:
    return f"{FIRST[number % len(FIRST)]} {SECOND[number // len(FIRST) % len(SECOND)]} {number}"


def _fails(number: int) -> bool:
    return number // 10 % 50 == 0


_RUN = (
    *("id", "org_id", "definition_id", "revision", "handler", "origin", "scheduled_for", "created_at"),
    *("idempotency_key", "state", "reason", "started_at", "finished_at", "attempt"),
)
_ATTEMPT = (
    *("run_id", "attempt", "org_id", "worker_id", "fencing_token", "handler", "started_at"),
    *("handler_started_at", "ended_at", "outcome", "error", "error_cause"),
)
_LIVE = (
    *("id", "org_id", "definition_id", "revision", "handler", "isolation", "origin", "scheduled_for"),
    *("idempotency_key", "serial", "state", "reason", "available_at", "worker_id", "started_at"),
)
_PAUSED = ("paused_at", "paused_by", "pause_note")
_CREDENTIAL = (
    *("id", "org_id", "generation", "client_id", "reference", "created_at", "created_by", "last_error"),
)
_HANDLER = ("name", "distribution", "version", "entry_point", "scopes", "params_schema", "error", "seen_at")
_LINE = ("run_id", "attempt", "seq", "org_id", "at", "level", "source", "text")
_WORKER_COLUMNS = (
    *("id", "host", "pid", "version", "started_at", "renewed_at", "lease_until", "handlers", "capacity"),
)
_SKIP = ("id", "org_id", "definition_id", "revision", "skipped_from", "skipped_until", "count", "reason")
_AUDIT = ("id", "at", "actor", "action", "org_id", "subject", "detail")
