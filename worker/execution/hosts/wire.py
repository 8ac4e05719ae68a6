"""Wire: the calls of the attempt API as JSON, for the worker that answers and the host that asks.

`X_message` writes what `X_of` reads. A reader ignores keys that it does not know, and takes the default of an
optional one that is missing, so that either side may be one version ahead. A worker does not trust a
host: what it reads from one is checked as if a run's process had sent it, and raises `Malformed`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timedelta
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

from worker.claims.claims import AccessToken, Claims
from worker.clock import from_text, to_text
from worker.definitions.pools import parse_pool
from worker.definitions.units import parse_duration, parse_memory
from worker.errors import (
    AccessDenied,
    Busy,
    CredentialsRejected,
    IssuerUnavailable,
    LeaseLost,
    RequestRejected,
    StoreUnavailable,
    Throttled,
    TokenError,
    TooManyRequests,
    Unavailable,
    WorkerError,
)
from worker.execution.runners.child import messages
from worker.execution.runners.child.messages import Message
from worker.execution.runners.contract import Work
from worker.handlers.catalogue import ERROR_LIMIT, HandlerEntry
from worker.handlers.json_text import check_json_text, clean
from worker.handlers.schema import check_schema
from worker.handlers.steps import StepError
from worker.ids import RunId
from worker.runs.outcome import Error, Outcome, TimedOut
from worker.runs.placing import Ticket
from worker.runs.run import AdmittedRun, Isolation, LogLine, NewStep, OwnedRun
from worker.runs.waits import MOST_WAITS, NewWait

VERSIONS = ("v1",)
PREFIX = "/attempts/v1"
# The header that names the incarnation of a host, beside `Authorization: Bearer TOKEN`.
INCARNATION = "orgworker-incarnation"
# Bytes of a request or response, and the seconds that a take may wait.
MOST_BYTES = 16 * 1024 * 1024
LONGEST_WAIT = 20.0
# Rows of one call: ends, steps, lines or values of progress. Slots of one host, and handlers of one.
MOST_ROWS = 2000
MOST_SLOTS = 100_000
MOST_HANDLERS = 10_000
# Characters of a name or id, and of a line of a log.
NAME_LIMIT = 200
LINE_LIMIT = 64 * 1024
LEVELS = ("debug", "info", "warning", "error", "critical")
SOURCES = ("log", "stdout", "stderr")

# The form of all ids; the database takes no other.
ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

P = ParamSpec("P")
T = TypeVar("T")
ISOLATIONS: tuple[Isolation, ...] = ("child", "inline")


class Malformed(WorkerError):
    """A call is not what the attempt API takes; the message names the key."""

    code = "invalid"
    usual_fix = "docs/reference/attempts.md lists what each call takes; is the host's version supported?"


def _reader(read: Callable[P, T]) -> Callable[P, T]:
    """Let a reader raise `Malformed` for whatever is wrong with a message."""

    @wraps(read)
    def reader(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return read(*args, **kwargs)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            what = read.__name__.removesuffix("_of")
            reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
            raise Malformed(clean(f"not a valid {what}: {reason}", 300)) from error

    return reader


# incarnations


@dataclass(frozen=True, slots=True)
class Registration:
    """A host that starts: its machine, its process, its slots and what it offers so far."""

    host: str
    pid: int
    version: str
    slots: Mapping[Isolation, int]
    handlers: Sequence[HandlerEntry] = ()


@dataclass(frozen=True, slots=True)
class TemporalPlace:
    """Where the Temporal is from which a host of the pool gets its tickets."""

    address: str
    namespace: str
    tls: bool = False


@dataclass(frozen=True, slots=True)
class Registered:
    """The answer: the incarnation's id, the pool of the host's token, and durations in seconds.

    With `temporal` the host takes runs by tickets that it gets there, and not by free slots.
    """

    worker: str
    pool: str
    lease: float
    renew: float
    poll: float
    temporal: TemporalPlace | None = None


def registration_message(registration: Registration) -> Message:
    return {
        "host": registration.host,
        "pid": registration.pid,
        "version": registration.version,
        "slots": dict(registration.slots),
        "handlers": [entry_message(entry) for entry in registration.handlers],
    }


@_reader
def registration_of(message: Mapping[str, Any]) -> Registration:
    return Registration(
        host=_text(message, "host"),
        pid=_count(message["pid"], "pid", 2**31 - 1),
        version=_text(message, "version"),
        slots=slots_of(message["slots"]),
        handlers=entries_of(message.get("handlers", [])),
    )


def registered_message(registered: Registered) -> Message:
    return asdict(registered)


def registered_of(message: Mapping[str, Any]) -> Registered:
    given = _known(Registered, message)
    if (place := given.get("temporal")) is not None:
        given["temporal"] = TemporalPlace(**_known(TemporalPlace, place))
    return Registered(**given)


@_reader
def slots_of(message: Mapping[str, Any]) -> dict[Isolation, int]:
    """Slots by isolation; one that is missing has none."""
    return {isolation: _count(message.get(isolation, 0), isolation, MOST_SLOTS) for isolation in ISOLATIONS}


@_reader
def take_of(message: Mapping[str, Any]) -> tuple[dict[Isolation, int], float]:
    """The free slots of a host, and the seconds that it waits for attempts."""
    wait = float(message.get("wait", 0.0))
    if not wait >= 0.0:
        raise ValueError("wait is not a number of seconds")
    return slots_of(message.get("free", {})), min(wait, LONGEST_WAIT)


@_reader
def ticket_of(message: Mapping[str, Any]) -> Ticket | None:
    """The ticket with which a host takes one run; None if it asks for any runs."""
    if message.get("ticket") is None:
        return None
    ticket = Ticket.parse(_text(message, "ticket"))
    if ticket is None:
        raise ValueError("ticket is not RUN.FENCING_TOKEN.SECRET")
    return ticket


def entry_message(entry: HandlerEntry) -> Message:
    return asdict(entry) | {"scopes": sorted(entry.scopes)}


@_reader
def entries_of(rows: Sequence[Mapping[str, Any]]) -> list[HandlerEntry]:
    if not isinstance(rows, list) or len(rows) > MOST_HANDLERS:
        raise ValueError(f"handlers is not a list of at most {MOST_HANDLERS}")
    return [_entry(row) for row in rows]


def _entry(row: Mapping[str, Any]) -> HandlerEntry:
    given = _known(HandlerEntry, row)
    for name in ("name", "distribution", "version", "entry_point"):
        _text(given, name)
    if given.get("error") is not None:
        keys = ("name", "distribution", "version", "entry_point")
        return HandlerEntry(**{key: given[key] for key in keys}, error=clean(given["error"], ERROR_LIMIT))
    for name in ("params_schema", "settings_schema"):
        if given.get(name) is not None:
            if not isinstance(given[name], dict):
                raise ValueError(f"{name} of {given['name']} is not a JSON Schema")
            check_schema(given[name], name)
    for name, parse in (("timeout", parse_duration), ("memory", parse_memory)):
        if given.get(name) is not None:
            cast(Callable[[str], object], parse)(_text(given, name))
    if given.get("pool") is not None:
        parse_pool(given["pool"])
    for name in ("max_attempts", "max_concurrent"):
        if given.get(name) is not None:
            _count(given[name], name, 2**31 - 1)
    scopes = given.get("scopes", [])
    if given.get("isolation", "child") not in ISOLATIONS or not isinstance(scopes, list):
        raise ValueError(f"isolation or scopes of {given['name']}")
    given["scopes"] = tuple(_text({"scopes": scope}, "scopes") for scope in scopes)
    given["state"] = given.get("state") is True
    return HandlerEntry(**given)


def renewed_message(registered: bool, owned: Iterable[OwnedRun]) -> Message:
    rows = [(run.id, run.fencing_token, run.cancel_reason) for run in owned]
    return {"registered": registered, "owned": rows}


def renewed_of(message: Mapping[str, Any]) -> tuple[bool, list[OwnedRun]]:
    owned = [OwnedRun(RunId(id_), fencing_token, reason) for id_, fencing_token, reason in message["owned"]]
    return message["registered"], owned


# attempts


@dataclass(frozen=True, slots=True)
class Taken:
    """An attempt that a host runs: its handler is called with `work`, and stopped after `timeout`.

    `org` and `definition` are names. `sealed` goes back unread with the attempt's end.
    """

    run: AdmittedRun
    org: str
    definition: str
    cancel_grace: timedelta
    timeout: timedelta
    work: Work
    sealed: str = field(repr=False)


_RUN_TIMES = ("scheduled_for", "available_at", "start_by", "started_at")


def taken_message(taken: Taken) -> Message:
    run = {key.name: getattr(taken.run, key.name) for key in fields(AdmittedRun)}
    for name in _RUN_TIMES:
        run[name] = None if run[name] is None else to_text(run[name])
    return {
        "run": run,
        "org": taken.org,
        "definition": taken.definition,
        "cancel_grace": taken.cancel_grace.total_seconds(),
        "timeout": taken.timeout.total_seconds(),
        "work": messages.work_message(taken.work, taken.timeout.total_seconds()),
        "sealed": taken.sealed,
    }


def taken_of(message: Mapping[str, Any]) -> Taken:
    run = _known(AdmittedRun, message["run"])
    for name in _RUN_TIMES:
        run[name] = None if run[name] is None else from_text(run[name])
    names = {key.name for key in fields(Work)} | {"seconds", "granted"}
    work = {name: value for name, value in message["work"].items() if name in names}
    work["granted"] = _granted(work["granted"])
    return Taken(
        run=AdmittedRun(**run),
        org=message["org"],
        definition=message["definition"],
        cancel_grace=timedelta(seconds=message["cancel_grace"]),
        timeout=timedelta(seconds=message["timeout"]),
        work=messages.work_of(work),
        sealed=message["sealed"],
    )


@dataclass(frozen=True, slots=True)
class End:
    """How a host's attempt ended. `handler_seconds` is the time since its handler was called, or None."""

    run_id: RunId
    fencing_token: int
    outcome: Outcome
    sealed: str = field(repr=False)
    handler_seconds: float | None = None
    peak_memory: int | None = None
    progress: Mapping[str, Any] | None = None
    moved: bool = False
    asks: tuple[str, ...] = ()


def end_message(end: End) -> Message:
    return {
        "run": end.run_id,
        "fencing_token": end.fencing_token,
        "outcome": messages.outcome_message(end.outcome),
        "sealed": end.sealed,
        "handler_seconds": end.handler_seconds,
        "peak_memory": end.peak_memory,
        "progress": end.progress,
        "moved": end.moved,
        "asks": list(end.asks),
    }


@_reader
def ends_of(message: Mapping[str, Any]) -> list[End]:
    return [_end(row) for row in _rows(message, "ends")]


def _end(row: Mapping[str, Any]) -> End:
    run_id, fencing_token = fence_of(row)
    seconds, memory, progress = (row.get(name) for name in ("handler_seconds", "peak_memory", "progress"))
    asks = row.get("asks", [])
    if not isinstance(asks, list) or len(asks) > MOST_WAITS:
        raise ValueError("asks is not a list")
    return End(
        run_id=run_id,
        fencing_token=fencing_token,
        outcome=_outcome(row["outcome"]),
        sealed=str(row["sealed"]),
        handler_seconds=None if seconds is None else max(0.0, float(seconds)),
        peak_memory=None if memory is None else _count(memory, "peak_memory", 2**63 - 1),
        progress=None if progress is None else _progress(progress),
        moved=row.get("moved") is True,
        asks=tuple(_text({"asks": name}, "asks") for name in asks),
    )


def _outcome(message: Mapping[str, Any]) -> Outcome:
    """An outcome that a host may report: that of a run's process, or that it has timed out."""
    if message["kind"] != TimedOut.__name__:
        return messages.outcome_of_message(message)
    failed = messages.outcome_of_message({**message, "kind": "Failed"})
    return TimedOut(cast(Error, getattr(failed, "error")))  # noqa: B009 - of Failed


def fence_message(run: AdmittedRun) -> Message:
    """The keys by which every call names a run."""
    return {"run": run.id, "fencing_token": run.fencing_token}


@_reader
def fence_of(message: Mapping[str, Any]) -> tuple[RunId, int]:
    return RunId(_text(message, "run")), _count(message["fencing_token"], "fencing_token", 2**63 - 1)


@_reader
def owned_of(message: Mapping[str, Any]) -> list[OwnedRun]:
    """The runs that a host hands back."""
    return [OwnedRun(*fence_of(row), None) for row in _rows(message, "runs")]


# what a running attempt asks for


def granted_message(token: AccessToken, claims: Claims) -> Message:
    return {"granted": messages.granted_message(token, claims)}


def granted_of(message: Mapping[str, Any]) -> tuple[AccessToken, Claims]:
    return messages.granted_of(_granted(message["granted"]))


def _granted(given: Mapping[str, Any]) -> Message:
    return {**given, "claims": _known(Claims, given["claims"])}


@_reader
def checkpoint_of(message: Mapping[str, Any]) -> str:
    data = message["data"]
    if not isinstance(data, str):
        raise ValueError("data is not JSON text")
    check_json_text(data, "checkpoint")
    return data


@_reader
def handler_of(message: Mapping[str, Any]) -> str:
    return _text(message, "handler")


@dataclass(frozen=True, slots=True)
class StepRow:
    """A step of one of a host's runs."""

    run_id: RunId
    fencing_token: int
    handler: str
    step: NewStep


def step_message(run: AdmittedRun, handler: str, step: NewStep) -> Message:
    return fence_message(run) | {"handler": handler, "step": messages.step_message(step)}


@_reader
def steps_of(message: Mapping[str, Any]) -> list[StepRow]:
    try:
        return [
            StepRow(*fence_of(row), handler_of(row), messages.step_of(row["step"]))
            for row in _rows(message, "steps")
        ]
    except StepError as error:
        raise ValueError(str(error)) from error


def wait_message(wait: NewWait) -> Message:
    return {"wait": asdict(wait)}


@_reader
def wait_of(message: Mapping[str, Any]) -> NewWait:
    try:
        return messages.wait_of(message["wait"])
    except StepError as error:
        raise ValueError(str(error)) from error


@_reader
def spend_of(message: Mapping[str, Any]) -> tuple[str, int, str]:
    """A meter, an amount, and the key of the spend: `attempt:number`."""
    key = _text(message, "key")
    attempt, _, number = key.partition(":")
    if not attempt.isdecimal() or not number.isdecimal():
        raise ValueError("key is not attempt:number")
    try:
        meter, amount, _ = messages.spend_of({**message, "number": int(number)})
    except StepError as error:
        raise ValueError(str(error)) from error
    return meter, amount, key


def line_message(line: LogLine, fencing_token: int) -> Message:
    return {
        "run": line.run_id,
        "fencing_token": fencing_token,
        "seq": line.seq,
        "at": to_text(line.at),
        "level": line.level,
        "source": line.source,
        "text": line.text,
    }


@dataclass(frozen=True, slots=True)
class LineRow:
    """A line of the log of one of a host's runs; `at` is by the host's clock."""

    run_id: RunId
    fencing_token: int
    seq: int
    at: datetime
    level: str
    source: str
    text: str


@_reader
def lines_of(message: Mapping[str, Any]) -> list[LineRow]:
    return [_line(row) for row in _rows(message, "lines")]


def _line(row: Mapping[str, Any]) -> LineRow:
    level, source = row["level"], row["source"]
    if level not in LEVELS or source not in SOURCES:
        raise ValueError(f"level or source of line {row['seq']}")
    return LineRow(
        *fence_of(row),
        seq=_count(row["seq"], "seq", 2**31 - 1),
        at=from_text(row["at"]),
        level=level,
        source=source,
        text=clean(row["text"], LINE_LIMIT),
    )


def progress_message(run_id: RunId, fencing_token: int, progress: Mapping[str, Any]) -> Message:
    return {"run": run_id, "fencing_token": fencing_token, "progress": dict(progress)}


@_reader
def progress_of(message: Mapping[str, Any]) -> list[tuple[RunId, int, Mapping[str, Any]]]:
    return [(*fence_of(row), _progress(row["progress"])) for row in _rows(message, "rows")]


def _progress(message: Mapping[str, Any]) -> Mapping[str, Any]:
    done, total, note = messages.progress_of(message)
    return {"done": done, "total": total, "note": note}


# errors

_ERRORS: Mapping[str, type[WorkerError]] = {
    kind.code: kind
    for kind in (
        *(LeaseLost, StoreUnavailable, IssuerUnavailable, Busy, Unavailable),
        *(TokenError, CredentialsRejected, RequestRejected, Throttled, TooManyRequests),
        *(AccessDenied, Malformed),
    )
}
# The code of a StepError, which is the handler's author's.
STEP = "step"


def error_of(body: Mapping[str, Any], retry_after: float | None = None) -> WorkerError | StepError:
    """The error of a problem that a worker answered, to be raised at the host."""
    given = body.get("error")
    error = given if isinstance(given, Mapping) else {}
    code, message = str(error.get("code", "")), str(error.get("message", "the worker refused the call"))
    if code == STEP:
        return StepError(message)
    kind = _ERRORS.get(code, Unavailable)
    return kind(message, fix=str(error.get("fix", "")), retry_after=retry_after)


def _rows(message: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    rows = message[name]
    if not isinstance(rows, list) or len(rows) > MOST_ROWS:
        raise ValueError(f"{name} is not a list of at most {MOST_ROWS}")
    return rows


def _known(kind: type[Any], message: Mapping[str, Any]) -> dict[str, Any]:
    """What a message has of a class's fields."""
    return {key.name: message[key.name] for key in fields(kind) if key.name in message}


def _text(message: Mapping[str, Any], name: str) -> str:
    value = message[name]
    if not isinstance(value, str) or not 0 < len(value) <= NAME_LIMIT or not value.isprintable():
        raise ValueError(f"{name} is not a text of 1 to {NAME_LIMIT} characters")
    return value


def _count(value: Any, name: str, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{name} is not a number from 0 to {most}")
    return value
