"""Sent: what a host sends of a running attempt: its calls, its progress and log, and how it ended.

What a call may contain is declared in `handlers/calls.py`; here is only what the attempt API adds to it: the
run and, if needed, the handler. A log becomes as long as a local one at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Annotated, Any, Protocol, cast

from worker.engine.runners.child import messages
from worker.engine.runners.child.messages import MALFORMED, Message
from worker.engine.runners.contract import handler_exited
from worker.engine.runners.output import CAP, LINE_COST, LINE_LIMIT
from worker.features.hosts.wire import FENCE, Fence, Label, ShownProgress, reading, reason_of, rows_of
from worker.handlers.calls import CALLS, MAX_BYTES, Call, message_of, read
from worker.handlers.json_text import check_json_text, clean
from worker.handlers.parts import CallPart, Count, Maybe, Number, OneOf, Text, TextCheck, Truth, When, row_of
from worker.ids import RunId
from worker.model.runs.egress import MAX_ORIGINS, EgressRow, merge
from worker.model.runs.egress import row_of as row_of_egress
from worker.model.runs.outcome import Error, Outcome, TimedOut
from worker.model.runs.run import AdmittedRun
from worker.model.runs.waits import MAX_WAITS
from worker.model.runs.worker_ends import LOST_LINE


class _ReportedOutcome(CallPart[Outcome]):
    """An outcome as a host reports it: that of a run's process, or that it has timed out.

    An invalid one ends its attempt, as that of a process does: it must not keep the other ends of the call.
    """

    def write(self, value: Outcome) -> Message:
        return messages.outcome_message(value)

    def read(self, value: Any, check: TextCheck) -> Outcome:
        try:
            if value["kind"] != TimedOut.__name__:
                return messages.outcome_of_message(value, check)
            failed = messages.outcome_of_message({**value, "kind": "Failed"}, check)
            return TimedOut(cast(Error, getattr(failed, "error")))  # noqa: B009 - of Failed
        except MALFORMED:
            return handler_exited("its host sent an invalid outcome")

    def json_paths(self) -> Iterator[tuple[str, ...]]:
        yield from (("result",), ("state",))


class _Asks(CallPart[tuple[str, ...]]):
    """The waits that ask. A host of the previous release names each as often as its handler opened it."""

    def write(self, value: tuple[str, ...]) -> list[str]:
        return list(value)

    def read(self, value: Any, check: TextCheck) -> tuple[str, ...]:
        if not isinstance(value, list):
            raise ValueError("not a list")
        return tuple(Label().read(name, check) for name in value[:MAX_WAITS])


class _Egress(CallPart[tuple[EgressRow, ...]]):
    """What was sent, by origin."""

    def write(self, value: tuple[EgressRow, ...]) -> list[Message]:
        return [asdict(row) for row in value]

    def read(self, value: Any, check: TextCheck) -> tuple[EgressRow, ...]:
        if not isinstance(value, list) or len(value) > MAX_ORIGINS + 1:
            raise ValueError(f"not a list of at most {MAX_ORIGINS + 1}")
        return merge(map(row_of_egress, value))


@dataclass(frozen=True, slots=True)
class End(Fence):
    """How a host's attempt ended. `handler_seconds` is the time since its handler was called, or None."""

    outcome: Annotated[Outcome, _ReportedOutcome()]
    sealed: Annotated[str, Text(MAX_BYTES)] = field(repr=False)
    handler_seconds: Annotated[float | None, Maybe(Number())] = None
    peak_memory: Annotated[int | None, Maybe(Count(2**63 - 1))] = None
    progress: Annotated[Mapping[str, Any] | None, Maybe(ShownProgress())] = None
    moved: Annotated[bool, Truth()] = False
    asks: Annotated[tuple[str, ...], _Asks()] = ()
    egress: Annotated[tuple[EgressRow, ...], _Egress()] = ()


REPORTED = row_of(End, lean=("egress",))


class _Ends(CallPart[End]):
    """An end as a host reports it. An invalid one fails its attempt, so that the host need not repeat it."""

    def write(self, value: End) -> Message:
        return REPORTED.write(value)

    def read(self, value: Any, check: TextCheck) -> End:
        try:
            return REPORTED.read(value, check)
        except MALFORMED as error:
            fence = FENCE.read(value, check)
            outcome = handler_exited(clean(f"its host sent an invalid end: {reason_of(error)}", 300))
            sealed = value.get("sealed")
            return End(*fence.key, outcome, sealed if isinstance(sealed, str) else "")

    def json_paths(self) -> Iterator[tuple[str, ...]]:
        return REPORTED.json_paths()


END = _Ends()


@dataclass(frozen=True, slots=True)
class Sent(Fence):
    """A call of one of a host's runs. `handler` is empty if the call does not need it."""

    handler: str
    call: Call[Any]


@dataclass(frozen=True)
class SentCall(CallPart[Sent]):
    """A call under its name in the attempt API."""

    name: str

    def write(self, value: Sent) -> Message:
        handler = {"handler": value.handler} if value.call.way.with_handler else {}
        return FENCE.write(value) | handler | message_of(value.call)

    def read(self, value: Any, check: TextCheck) -> Sent:
        fence, call = FENCE.read(value, check), read(self.name, value, check)
        handler = Label().read(value["handler"], check) if call.way.with_handler else ""
        return Sent(*fence.key, handler, call)

    def json_paths(self) -> Iterator[tuple[str, ...]]:
        return CALLS[self.name].row.json_paths()


SENT = {name: SentCall(name) for name in CALLS}


def calls_of(name: str, message: Mapping[str, Any]) -> list[Sent]:
    """The calls of a message: several if they are sent at once. Raises Malformed."""
    part, batch = SENT[name], CALLS[name].way.batch
    if batch:
        return rows_of(message, batch, part)
    with reading(name):
        return [part.read(message, check_json_text)]


def sent_message(sent: Sent) -> Message:
    return SENT[sent.call.way.name].write(sent)


# The number of the last line of a log, which is the worker's own. Those of hosts are lower, also than that of
# the line that says why an attempt was lost.
LAST_LINE = 2**31 - 1
LEVELS = ("debug", "info", "warning", "error", "critical")
SOURCES = ("log", "stdout", "stderr")

# Bytes of a log. The host has cut it to `CAP` already, beside a line that says so and that of an error.
MAX_LOG = CAP + LINE_LIMIT
# Bytes that a worker counts by itself before it asks the database, where other workers append as well.
TRUSTED = 32 * 1024
TOO_MUCH = f"the host sent more than {CAP // 1024} KiB of log: the rest was dropped"


@dataclass(frozen=True, slots=True)
class ProgressRow(Fence):
    """The progress of one of a host's runs."""

    progress: Annotated[Mapping[str, Any], ShownProgress()]


@dataclass(frozen=True, slots=True)
class LineRow(Fence):
    """A line of the log of one of a host's runs; `at` is by the host's clock."""

    seq: Annotated[int, Count(LOST_LINE - 1)]
    at: Annotated[datetime, When()]
    level: Annotated[str, OneOf(LEVELS)]
    source: Annotated[str, OneOf(SOURCES)]
    text: Annotated[str, Text(LINE_LIMIT)]


PROGRESS = row_of(ProgressRow)
LINE = row_of(LineRow)


class LogSizes(Protocol):
    async def log_size(self, run_id: RunId, attempt: int, seqs: Sequence[int]) -> tuple[int, int, set[int]]:
        """The lines of an attempt's stored log, their bytes, and which of these are stored."""


@dataclass(slots=True)
class AttemptLog:
    """What this worker knows of one log: its bytes, and those that it has counted since it last asked."""

    used: int = 0
    unread: int = 0
    is_full: bool = False

    async def accept(
        self, run: AdmittedRun, rows: Sequence[LineRow], sizes: LogSizes, now: datetime
    ) -> list[LineRow]:
        """Those of the rows that fit; after the first that does not, a line that says so."""
        if self.is_full:
            return []
        size = sum(map(cost, rows))
        if self.used + size > MAX_LOG or self.unread + size > TRUSTED:
            # Lines that are sent again count once.
            lines, size, stored = await sizes.log_size(run.id, run.attempt, [row.seq for row in rows])
            self.used, self.unread = size + LINE_COST * lines, 0
            rows = [row for row in rows if row.seq not in stored]
        return list(self._fitting(rows, now))

    def _fitting(self, rows: Sequence[LineRow], now: datetime) -> Iterator[LineRow]:
        for row in rows:
            size = cost(row)
            if self.used + size > MAX_LOG:
                self.is_full = True
                yield LineRow(*row.key, LAST_LINE, now, level="warning", source="log", text=TOO_MUCH)
                return
            self.used += size
            self.unread += size
            yield row


def cost(row: LineRow) -> int:
    """The bytes that a line counts for; a byte that was not UTF-8 has become a character of three."""
    return len(row.text.encode()) - 2 * row.text.count("\ufffd") + LINE_COST
