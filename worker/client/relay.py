"""The relay: starts what an outbox has, at least once each; the key makes that one run.

A round takes the first due row of some definitions for `LEASE` seconds, sends it and those behind it in
order, and marks what was answered. No transaction of the database is open while something is sent. Killed
anywhere, the rows are taken again after the lease; what was sent and not marked is sent again, and the API
answers with the run that it made. A row is sent only after the one before it was accepted or refused, so the
order holds however many relays there are.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import InitVar, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol, TypeVar
from uuid import uuid4

from . import statements
from .errors import ClientError, ConfigurationError, Conflict, InvalidRequest, Unavailable
from .outbox import Outbox
from .plans import SHOWN, StartRequest, start_request
from .results import Started

T = TypeVar("T")
# Called with the name of an event and its fields.
Report = Callable[..., object]
# Seconds that a claim holds, and in which a round sends; the rest is for the last answer and the marks.
LEASE = 90.0
ROUND = 3.0
# Definitions of a round, rows of each, and requests at once.
STREAMS = 50
ROWS = 100
AT_ONCE = 8
# Seconds between two looks at an empty outbox, and the pauses after failures.
POLL = 1.0
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0
# Sent rows are kept as long, for `Outbox.find`; those of a second are deleted at most.
KEEP = timedelta(days=7)
DELETED = 500
# Less than the API knows a key, which is as long as it retains the run: 7 days at least by default.
KEY_HOLDS = timedelta(days=6)
# Milliseconds by which a row that was not sent comes before one that was put off at the same time.
AHEAD = 86_400_000
# Tries of a row that the state of its definition does not allow: after a week it is refused.
MAX_TRIES = 10_000


def log(event: str, /, **fields: Any) -> None:
    """Log an event under the package's name; problems are warnings."""
    level = logging.INFO if event in ("relay.started", "relay.stopped", "relay.back") else logging.WARNING
    shown = " ".join(f"{name}={value}" for name, value in fields.items())
    logging.getLogger(__package__).log(level, "%s %s", event, shown)


class Starter(Protocol):
    """What a relay needs of a client."""

    async def send_start(self, request: StartRequest, *, retry_for: float | None = None) -> Started:
        """Send a start. Raises ClientError."""


@dataclass(slots=True)
class RelayCounts:
    """What a relay has done: rows sent, of which the key had a run already, refused, and put off."""

    sent: int = 0
    replayed: int = 0
    refused: int = 0
    later: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """A claimed row; `sent_ago` are the seconds since it was sent first, None if it never was."""

    id: int
    org: str
    definition: str
    params: str
    key: str
    not_before: int
    tries: int
    sent_ago: float | None

    def request(self) -> StartRequest:
        """What is sent; raises InvalidRequest for a row that another program wrote wrongly."""
        try:
            at = datetime.fromtimestamp(self.not_before / 1000, UTC) if self.not_before > 0 else None
        except (TypeError, ValueError, OverflowError, OSError):
            raise InvalidRequest("not_before is not a time", fix="insert milliseconds since 1970") from None
        try:
            params = json.loads(self.params)
        except (TypeError, ValueError, RecursionError):
            raise InvalidRequest("params is not JSON", fix="insert the text of a JSON object") from None
        return start_request(self.org, self.definition, params, self.key, at)


# Rows of one definition, in order.
Stream = Sequence[Row]


@dataclass(frozen=True, slots=True)
class Mark:
    """What becomes of a row: a statement, and its values."""

    row: Row
    statement: str
    values: Mapping[str, Any]


@dataclass(slots=True)
class Relay:
    """One relay of an outbox. `poll`, `lease` and `round` are seconds."""

    client: Starter
    outbox: Outbox
    report: InitVar[Report] = log
    poll: float = POLL
    lease: float = LEASE
    round: float = ROUND
    keep: timedelta = KEEP
    key_holds: timedelta = KEY_HOLDS
    counts: RelayCounts = field(default_factory=RelayCounts)
    _failures: int = 0
    # No request before this time, monotonic.
    _paused_until: float = 0.0
    _pruned_at: float = 0.0
    _report: Report = field(init=False)

    def __post_init__(self, report: Report) -> None:
        self._report = report

    async def run(self, *, once: bool = False, stop: asyncio.Event | None = None) -> RelayCounts:
        """Relay until it is cancelled or `stop` is set; with `once`, until a round has nothing to send.

        Raises:
            ConfigurationError: the outbox has no `connect`.
            ClientError: only with `once`: the API or its limits do not let it go on.
            Exception: only with `once`: the database driver's own.
        """
        stop = stop or asyncio.Event()
        database = _Database(self.outbox)
        self._report("relay.started", table=self.outbox.table)
        try:
            while not stop.is_set():
                fault: ClientError | None = None
                try:
                    done, fault = await self._round(database)
                except Exception as error:
                    if once:
                        raise
                    done = 0
                    self._report("relay.database_failed", error=type(error).__name__)
                    self._pause(None)
                if once and fault is not None:
                    raise fault
                if once and not done:
                    break
                pause = self._paused_until - time.monotonic()
                await _sleep(stop, pause if pause > 0 or done else self.poll)
        finally:
            await database.close()
            self._report("relay.stopped", sent=self.counts.sent, refused=self.counts.refused)
        return self.counts

    async def _round(self, database: _Database) -> tuple[int, ClientError | None]:
        """Rows that a round has dealt with, and what keeps the relay from going on."""
        claim = str(uuid4())
        streams = await database.run(self._claim, claim)
        if not streams:
            await self._prune(database)
            return 0, None
        until, slots = time.monotonic() + self.round, asyncio.Semaphore(AT_ONCE)
        faults: list[ClientError] = []
        sent = await asyncio.gather(*(self._send(one, until, slots, faults) for one in streams))
        marks = sorted((mark for some in sent for mark in some), key=lambda mark: mark.row.id)
        await database.run(self._mark, claim, marks)
        if not faults:
            if self._failures:
                self._report("relay.back", failures=self._failures)
            self._failures = 0
            return len(marks), None
        self._report("relay.waiting", error=faults[0].code, message=faults[0].message, fix=faults[0].fix)
        self._pause(faults[0].retry_after)
        return len(marks), faults[0]

    def _pause(self, seconds: float | None) -> None:
        """Send nothing for these seconds, or for longer after each failure."""
        if seconds is None:
            most = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self._failures, 10))
            seconds = most * (0.5 + random.random() / 2)  # noqa: S311 - not a secret
        self._failures += 1
        self._paused_until = time.monotonic() + seconds

    async def _send(
        self, stream: Stream, until: float, slots: asyncio.Semaphore, faults: list[ClientError]
    ) -> list[Mark]:
        """Send the rows of a stream in order, until one has to wait; the marks of those dealt with."""
        marks: list[Mark] = []
        async with slots:
            for number, row in enumerate(stream):
                if faults or time.monotonic() >= until:
                    return marks + _untouched(stream[number:], first=not marks)
                if row.sent_ago is not None and row.sent_ago > self.key_holds.total_seconds():
                    days = f"{row.sent_ago / 86400:.0f} days"
                    marks.append(self._refuse(row, f"sent {days} ago, without an answer: it may have run"))
                    continue
                try:
                    started = await self.client.send_start(row.request(), retry_for=0)
                except ClientError as error:
                    own = _is_of_row(error)
                    if error.is_final or (own and row.tries >= MAX_TRIES):
                        marks.append(self._refuse(row, f"{error.code}: {error.message}", fix=error.fix))
                        continue
                    if not own:
                        faults.append(error)
                    marks += self._put_off(row, error, own=own)
                    return marks + _untouched(stream[number + 1 :], first=False)
                except Exception as error:
                    # The rows of other definitions keep their marks.
                    marks += self._put_off(row, ClientError(type(error).__name__), own=True)
                    return marks + _untouched(stream[number + 1 :], first=False)
                self.counts.sent += 1
                self.counts.replayed += started.replayed is not None
                note = "the key had made this run with other params" if started.replayed == "other" else None
                if note:
                    self._report("relay.other_params", row=row.id, **_names(row))
                marks.append(Mark(row, statements.SENT, {"run": started.run.id, "error": note}))
        return marks

    def _refuse(self, row: Row, error: str, *, fix: str = "") -> Mark:
        self.counts.refused += 1
        self._report("relay.refused", row=row.id, **_names(row), error=error, fix=fix)
        return Mark(row, statements.REFUSED, {"error": f"{error} ({fix})"[: 2 * SHOWN] if fix else error})

    def _put_off(self, row: Row, error: ClientError, *, own: bool) -> list[Mark]:
        """Try the row later; only a fault of its own counts as a try."""
        self.counts.later += 1
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(row.tries, 10)) if own else 0.0
        text = f"{error.code}: {error.message}"[:SHOWN]
        later = Mark(row, statements.LATER, {"pause": int(pause * 1000), "error": text, "tried": int(own)})
        is_sent = row.sent_ago is not None or (isinstance(error, Unavailable) and error.was_sent)
        # The first of the two, since LATER gives the claim back.
        return [later] if is_sent else [Mark(row, statements.NOT_SENT, {}), later]

    def _claim(self, execute: Execute, claim: str) -> list[Stream]:
        """Take the first due rows of definitions, and read those behind them."""
        in_turn = heads = [id_ for (id_,) in execute(statements.HEADS, {"most": STREAMS})]
        if heads and self.outbox.skip_locked:
            heads = [id_ for (id_,) in execute(statements.FREE, _ids(heads), ids=len(heads))]
        lease = int(self.lease * 1000)
        # In the order of ids: relays that lock rows in different orders would wait for each other.
        for id_ in sorted(heads):
            execute(statements.CLAIM, {"id": id_, "claim": claim, "lease": lease})
        if not heads:
            return []
        found = execute(statements.CLAIMED, {**_ids(heads), "claim": claim}, ids=len(heads))
        streams: list[Stream] = []
        for head, org, definition in sorted(found, key=lambda one: in_turn.index(one[0])):
            where = {"org": org, "definition": definition, "head": head, "most": ROWS}
            rows = [
                Row(id_, org, definition, params, key, at, tries, None if ago is None else float(ago) / 1000)
                for id_, params, key, at, tries, ago in execute(statements.ROWS, where)
            ]
            streams.append(rows)
        for row in sorted((row for one in streams for row in one), key=lambda row: row.id):
            execute(statements.SENDING, {"id": row.id, "claim": claim})
        return streams

    def _mark(self, execute: Execute, claim: str, marks: Iterable[Mark]) -> None:
        for mark in marks:
            execute(mark.statement, {**mark.values, "id": mark.row.id, "claim": claim})

    async def _prune(self, database: _Database) -> None:
        """Delete sent rows that were kept long enough, a few at a time."""
        if time.monotonic() < self._pruned_at + POLL and self._pruned_at:
            return
        self._pruned_at = time.monotonic()

        def work(execute: Execute) -> None:
            keep = int(self.keep.total_seconds() * 1000)
            for (id_,) in execute(statements.OLD, {"keep": keep, "most": DELETED}):
                execute(statements.DELETE, {"id": id_})

        await database.run(work)


def _names(row: Row) -> dict[str, str]:
    return {"org": row.org, "definition": row.definition, "key": row.key}


def _is_of_row(error: ClientError) -> bool:
    """Whether it is a fault of this row alone: the state of its definition, or what makes the API fail."""
    return isinstance(error, Conflict) or (isinstance(error, Unavailable) and error.code == "unexpected")


def _untouched(rows: Sequence[Row], *, first: bool) -> list[Mark]:
    """Rows that were claimed and not sent: they are due again at once, before those that were put off."""
    marks = [Mark(row, statements.NOT_SENT, {}) for row in rows if row.sent_ago is None]
    if first and rows:
        marks.append(Mark(rows[0], statements.LATER, {"pause": -AHEAD, "error": None, "tried": 0}))
    return marks


def _ids(ids: Sequence[int]) -> dict[str, int]:
    return {f"id{number}": id_ for number, id_ in enumerate(ids)}


async def _sleep(stop: asyncio.Event, seconds: float) -> None:
    if seconds > 0:
        try:
            await asyncio.wait_for(stop.wait(), seconds)
        except TimeoutError:
            return


# Executes a statement of the outbox with its values, and returns its rows.
Execute = Callable[..., Sequence[Sequence[Any]]]


class _Database:
    """The outbox's database, in a thread of its own: a connection is used by one thread only."""

    def __init__(self, outbox: Outbox) -> None:
        if outbox.connect is None:
            raise ConfigurationError(
                "the outbox has no connect: a relay opens a connection of its own",
                fix="Outbox(…, connect=lambda: psycopg.connect(…)), or engine.raw_connection of SQLAlchemy",
            )
        self._outbox = outbox
        self._connect = outbox.connect
        self._connection: Any = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="orgworker-relay")

    async def run(self, work: Callable[..., T], *args: Any) -> T:
        """Do the work in one transaction; any failure rolls it back, and the next one connects again."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, work, args)

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._discard)
        self._thread.shutdown(wait=False)

    def _run(self, work: Callable[..., T], args: Sequence[Any]) -> T:
        try:
            if self._connection is None:
                self._connection = self._connect()
            begin = statements.BEGIN[self._outbox.dialect]
            # With autocommit=False, sqlite3 has begun already.
            if begin and not getattr(self._connection, "in_transaction", False):
                self._execute(begin)
            result = work(self._execute, *args)
            self._connection.commit()
        except BaseException:
            self._discard()
            raise
        return result

    def _execute(
        self, statement: str, values: Mapping[str, Any] | None = None, *, ids: int = 0
    ) -> Sequence[Sequence[Any]]:
        style = self._outbox.style_of(self._connection)
        sql, names = statements.compiled(self._outbox.written(statement, ids), style)
        cursor = self._connection.cursor()
        try:
            cursor.execute(sql, statements.arguments(names, values or {}))
            return cursor.fetchall() if cursor.description else ()
        finally:
            cursor.close()

    def _discard(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        for end in (connection.rollback, connection.close):
            try:
                end()
            except Exception as error:
                log("relay.database_failed", error=type(error).__name__)
