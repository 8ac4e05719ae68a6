"""Wire: the attempt API as JSON, for the worker that answers and the host that asks.

Here are incarnations, attempts and errors; `wire_calls.py` has what a running attempt asks for.

`X_message` writes what `X_of` reads. A reader ignores keys that it does not know, and takes the default of an
optional one that is missing, so that either side may be one version ahead. A worker does not trust a
host: what it reads from one is checked as if a run's process had sent it, and raises `Malformed`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

from worker.clock import from_text, to_text
from worker.definitions.pools import parse_pool
from worker.definitions.units import parse_duration, parse_memory
from worker.errors import (
    AccessDenied,
    AnswerTooLarge,
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
from worker.execution.runners.child.frames import MALFORMED
from worker.execution.runners.child.messages import Message
from worker.execution.runners.contract import Work, handler_exited
from worker.guard.claims import Claims
from worker.handlers.catalogue import ERROR_LIMIT, HandlerEntry, check_secrets
from worker.handlers.json_text import LIMIT, clean
from worker.handlers.schema import check_schema
from worker.handlers.steps import StepError
from worker.ids import RunId
from worker.runs.hosts import MOST_HANDLERS
from worker.runs.outcome import Error, Outcome, TimedOut
from worker.runs.placing import Ticket
from worker.runs.run import AdmittedRun, Isolation, OwnedRun
from worker.runs.waits import MOST_WAITS
from worker.secret import AccessToken

VERSIONS = ("v1",)
PREFIX = "/attempts/v1"
# The header that names the incarnation of a host, beside `Authorization: Bearer TOKEN`.
INCARNATION = "orgworker-incarnation"
# Bytes of a response, and of a request with results or steps; of one with a checkpoint, which may double
# when it is quoted; of other batches and handlers; and of any that a worker parses itself.
MOST_BYTES = 16 * 1024 * 1024
CHECKPOINT_BYTES = 2 * LIMIT + 64 * 1024
BATCH_BYTES = 1024 * 1024
OWN_BYTES = 32 * 1024
# Seconds that a take may wait.
LONGEST_WAIT = 20.0
# Rows of one call: ends, steps, lines or values of progress. Slots of one host.
MOST_ROWS = 2000
MOST_SLOTS = 100_000
# Characters of a name or id.
NAME_LIMIT = 200
# The form of all ids; the database takes no other.
ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

# The bytes of a call's body; what is not here has no large one.
BODY_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("finish", "store"), MOST_BYTES),
    "save": CHECKPOINT_BYTES,
    **dict.fromkeys(("handlers", "hand_back", "wait", "choose", "logs", "progress"), BATCH_BYTES),
}

P = ParamSpec("P")
T = TypeVar("T")
ISOLATIONS: tuple[Isolation, ...] = ("child", "inline")


class Malformed(WorkerError):
    """A call is not what the attempt API takes; the message names the key."""

    code = "invalid"
    usual_fix = "the documentation's page The attempt API lists each call; is the host's version supported?"


def reader(read: Callable[P, T]) -> Callable[P, T]:
    """Let a reader raise `Malformed` for whatever is wrong with a message."""

    @wraps(read)
    def read_message(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return read(*args, **kwargs)
        except MALFORMED as error:
            what = read.__name__.removesuffix("_of")
            reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
            raise Malformed(clean(f"not a valid {what}: {reason}", 300)) from error

    return read_message


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


@reader
def registration_of(message: Mapping[str, Any]) -> Registration:
    return Registration(
        host=text_in(message, "host"),
        pid=count_in(message["pid"], "pid", 2**31 - 1),
        version=text_in(message, "version"),
        slots=slots_of(message["slots"]),
        handlers=entries_of(message.get("handlers", [])),
    )


def registered_message(registered: Registered) -> Message:
    return asdict(registered)


def registered_of(message: Mapping[str, Any]) -> Registered:
    given = known_in(Registered, message)
    if (place := given.get("temporal")) is not None:
        given["temporal"] = TemporalPlace(**known_in(TemporalPlace, place))
    return Registered(**given)


@reader
def slots_of(message: Mapping[str, Any]) -> dict[Isolation, int]:
    """Slots by isolation; one that is missing has none."""
    return {isolation: count_in(message.get(isolation, 0), isolation, MOST_SLOTS) for isolation in ISOLATIONS}


@reader
def take_of(message: Mapping[str, Any]) -> tuple[dict[Isolation, int], float]:
    """The free slots of a host, and the seconds that it waits for attempts."""
    wait = float(message.get("wait", 0.0))
    if not wait >= 0.0:
        raise ValueError("wait is not a number of seconds")
    return slots_of(message.get("free", {})), min(wait, LONGEST_WAIT)


@reader
def ticket_of(message: Mapping[str, Any]) -> Ticket | None:
    """The ticket with which a host takes one run; None if it asks for any runs."""
    if message.get("ticket") is None:
        return None
    ticket = Ticket.parse(text_in(message, "ticket"))
    if ticket is None:
        raise ValueError("ticket is not RUN.FENCING_TOKEN.SECRET")
    return ticket


def entry_message(entry: HandlerEntry) -> Message:
    return asdict(entry) | {"scopes": sorted(entry.scopes)}


@reader
def entries_of(rows: Sequence[Mapping[str, Any]]) -> list[HandlerEntry]:
    if not isinstance(rows, list) or len(rows) > MOST_HANDLERS:
        raise ValueError(f"handlers is not a list: one host may declare {MOST_HANDLERS} handlers")
    return [_entry(row) for row in rows]


def _entry(row: Mapping[str, Any]) -> HandlerEntry:
    given = known_in(HandlerEntry, row)
    for name in ("name", "distribution", "version", "entry_point"):
        text_in(given, name)
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
            cast(Callable[[str], object], parse)(text_in(given, name))
    if given.get("pool") is not None:
        parse_pool(given["pool"])
    for name in ("max_attempts", "max_concurrent"):
        if given.get(name) is not None:
            count_in(given[name], name, 2**31 - 1)
    scopes = given.get("scopes", [])
    if given.get("isolation", "child") not in ISOLATIONS or not isinstance(scopes, list):
        raise ValueError(f"isolation or scopes of {given['name']}")
    given["scopes"] = tuple(text_in({"scopes": scope}, "scopes") for scope in scopes)
    secrets = given.get("secrets", [])
    if not isinstance(secrets, list):
        raise ValueError(f"secrets of {given['name']}")
    check_secrets(secrets)
    given["secrets"] = tuple(secrets)
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
    run = known_in(AdmittedRun, message["run"])
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


@reader
def ends_of(message: Mapping[str, Any]) -> list[End]:
    return [_end(row) for row in rows_in(message, "ends")]


def _end(row: Mapping[str, Any]) -> End:
    """An end as a host reports it. An invalid one fails its attempt, so that the host need not repeat it."""
    run_id, fencing_token = fence_of(row)
    try:
        return _reported(run_id, fencing_token, row)
    except MALFORMED as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        outcome = handler_exited(clean(f"its host sent an invalid end: {reason}", 300))
        sealed = row.get("sealed")
        return End(run_id, fencing_token, outcome, sealed if isinstance(sealed, str) else "")


def _reported(run_id: RunId, fencing_token: int, row: Mapping[str, Any]) -> End:
    seconds, memory, progress = (row.get(name) for name in ("handler_seconds", "peak_memory", "progress"))
    asks = row.get("asks", [])
    if not isinstance(asks, list):
        raise ValueError("asks is not a list")
    return End(
        run_id=run_id,
        fencing_token=fencing_token,
        outcome=_outcome(row["outcome"]),
        sealed=str(row["sealed"]),
        handler_seconds=None if seconds is None else max(0.0, float(seconds)),
        peak_memory=None if memory is None else count_in(memory, "peak_memory", 2**63 - 1),
        progress=None if progress is None else progress_in(progress),
        moved=row.get("moved") is True,
        # A host of the previous release reports a wait as often as its handler opened it.
        asks=tuple(text_in({"asks": name}, "asks") for name in asks[:MOST_WAITS]),
    )


def _outcome(message: Mapping[str, Any]) -> Outcome:
    """An outcome as a host reports it: that of a run's process, or that it has timed out.

    An invalid one ends its attempt, as that of a process does: it must not keep the other ends of the call.
    """
    try:
        if message["kind"] != TimedOut.__name__:
            return messages.outcome_of_message(message)
        failed = messages.outcome_of_message({**message, "kind": "Failed"})
        return TimedOut(cast(Error, getattr(failed, "error")))  # noqa: B009 - of Failed
    except MALFORMED:
        return handler_exited("its host sent an invalid outcome")


def fence_message(run: AdmittedRun) -> Message:
    """The keys by which every call names a run."""
    return {"run": run.id, "fencing_token": run.fencing_token}


@reader
def fence_of(message: Mapping[str, Any]) -> tuple[RunId, int]:
    return RunId(text_in(message, "run")), count_in(message["fencing_token"], "fencing_token", 2**63 - 1)


@reader
def owned_of(message: Mapping[str, Any]) -> list[OwnedRun]:
    """The runs that a host hands back."""
    return [OwnedRun(*fence_of(row), None) for row in rows_in(message, "runs")]


# the parts of messages


def granted_message(token: AccessToken, claims: Claims) -> Message:
    return {"granted": messages.granted_message(token, claims)}


def granted_of(message: Mapping[str, Any]) -> tuple[AccessToken, Claims]:
    return messages.granted_of(_granted(message["granted"]))


def _granted(given: Mapping[str, Any]) -> Message:
    return {**given, "claims": known_in(Claims, given["claims"])}


def progress_in(message: Mapping[str, Any]) -> Mapping[str, Any]:
    done, total, note = messages.progress_of(message)
    return {"done": done, "total": total, "note": note}


# errors

_ERRORS: Mapping[str, type[WorkerError]] = {
    kind.code: kind
    for kind in (
        *(LeaseLost, StoreUnavailable, IssuerUnavailable, Busy, Unavailable),
        *(TokenError, CredentialsRejected, RequestRejected, AnswerTooLarge, Throttled, TooManyRequests),
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


def rows_in(message: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    rows = message[name]
    if not isinstance(rows, list) or len(rows) > MOST_ROWS:
        raise ValueError(f"{name} is not a list of at most {MOST_ROWS}")
    return rows


def known_in(kind: type[Any], message: Mapping[str, Any]) -> dict[str, Any]:
    """What a message has of a class's fields."""
    return {key.name: message[key.name] for key in fields(kind) if key.name in message}


def text_in(message: Mapping[str, Any], name: str) -> str:
    value = message[name]
    if not isinstance(value, str) or not 0 < len(value) <= NAME_LIMIT or not value.isprintable():
        raise ValueError(f"{name} is not a text of 1 to {NAME_LIMIT} characters")
    return value


def count_in(value: Any, name: str, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{name} is not a number from 0 to {most}")
    return value
