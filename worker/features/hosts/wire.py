"""Wire: the attempt API as JSON, for the worker that answers and the host that asks.

Here are incarnations, attempts and errors; `sent.py` has what a running attempt asks for,
what it tells, and how it ended.

`X_message` writes what `X_of` reads. A reader ignores keys that it does not know, and takes the default of an
optional one that is missing, so that either side may be one version ahead. A worker does not trust a
host: what it reads from one is checked as if a run's process had sent it, and raises `Malformed`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Annotated, Any, TypeVar, cast

from worker.engine.runners.child import messages
from worker.engine.runners.child.messages import MALFORMED, Message
from worker.engine.runners.contract import Work
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
from worker.handlers.calls import BATCH_BYTES, CALLS, MAX_BYTES, NotACall, Progress
from worker.handlers.calls import OWN_BYTES as OWN_BYTES
from worker.handlers.calls import known_in as known_in
from worker.handlers.catalogue import ERROR_LIMIT, HandlerEntry, check_children, check_secrets, checked_egress
from worker.handlers.job import one_line
from worker.handlers.json_text import check_json_text, clean
from worker.handlers.parts import CallPart, Count, TextCheck, Those, row_of, trusted
from worker.handlers.schema import check_schema
from worker.handlers.steps import StepError
from worker.ids import RunId
from worker.model.definitions.pools import parse_pool
from worker.model.definitions.units import parse_duration, parse_memory
from worker.model.egress import BoundSecret
from worker.model.runs.hosts import MAX_HANDLERS, Ticket
from worker.model.runs.run import AdmittedRun, Isolation, OwnedRun

VERSIONS = ("v1",)
PREFIX = "/attempts/v1"
# The header that names the incarnation of a host, beside `Authorization: Bearer TOKEN`.
INCARNATION = "orgworker-incarnation"
# Seconds that a take may wait.
LONGEST_WAIT = 20.0
# Rows of one call: ends, steps, lines or values of progress. Slots of one host.
MAX_ROWS = 2000
MAX_SLOTS = 100_000
# Characters of a name or id.
NAME_LIMIT = 200
# The form of all ids; the database takes no other.
ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

# The bytes of a call's body; what is not here has no large one. A worker parses up to `OWN_BYTES` itself.
BODY_BYTES: Mapping[str, int] = {
    "finish": MAX_BYTES,
    **dict.fromkeys(("handlers", "hand_back", "logs", "progress"), BATCH_BYTES),
    **{name: call.way.body for name, call in CALLS.items() if call.way.body > OWN_BYTES},
}
# How a worker refuses a call that it does not know; its host may be newer.
NO_CALL = "there is no call"

V = TypeVar("V")
ISOLATIONS: tuple[Isolation, ...] = ("child", "inline")


class Malformed(WorkerError):
    """A call is not what the attempt API takes; the message names the key."""

    code = "invalid"
    usual_fix = "the documentation's page The attempt API lists each call; is the host's version supported?"


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Raise `Malformed` for whatever is wrong with a message; a block, or a decorator of its reader."""
    try:
        yield
    except NotACall as error:
        raise Malformed(str(error)) from error
    except MALFORMED as error:
        raise Malformed(clean(f"not a valid {what}: {reason_of(error)}", 300)) from error


def reason_of(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)


# rows


class Label(CallPart[Any]):
    """A name or id."""

    def read(self, value: Any, check: TextCheck) -> Any:
        if not isinstance(value, str) or not 0 < len(value) <= NAME_LIMIT or not value.isprintable():
            raise ValueError(f"not a text of 1 to {NAME_LIMIT} printable characters")
        return value


@dataclass(frozen=True, slots=True)
class Fence:
    """How every call names a run: by its id and the fencing token of its attempt."""

    run: Annotated[RunId, Label()]
    fencing_token: Annotated[int, Count(2**63 - 1)]

    @property
    def key(self) -> tuple[RunId, int]:
        return self.run, self.fencing_token


FENCE = row_of(Fence)


class ShownProgress(CallPart[Mapping[str, Any]]):
    """Progress as it is stored."""

    def read(self, value: Any, check: TextCheck) -> Mapping[str, Any]:
        return asdict(Progress.row.read(value, check))


def rows_of(message: Mapping[str, Any], name: str, part: CallPart[V]) -> list[V]:
    """The rows of a message under this name. Raises Malformed."""
    with reading(name):
        rows = message[name]
        if not isinstance(rows, list) or len(rows) > MAX_ROWS:
            raise ValueError(f"{name} is not a list of at most {MAX_ROWS}")
        return [part.read(row, check_json_text) for row in rows]


# incarnations


# What handlers declare since a later version, and what stands for nothing. An empty egress is a declaration.
_LATER: Mapping[str, object] = {"description": None, "egress": None, "audiences": (), "children": ()}


class _Entry(CallPart[HandlerEntry]):
    """A handler that a host offers, or why it does not load."""

    def write(self, value: HandlerEntry) -> Message:
        entry = asdict(value) | {"scopes": sorted(value.scopes)}
        # A handler without one of these is written as before there were such.
        return {name: part for name, part in entry.items() if name not in _LATER or part != _LATER[name]}

    def read(self, value: Any, check: TextCheck) -> HandlerEntry:
        given = known_in(HandlerEntry, value)
        for name in ("name", "distribution", "version", "entry_point"):
            text_in(given, name)
        broken = {key: given[key] for key in ("name", "distribution", "version", "entry_point")}
        if given.get("error") is not None:
            return HandlerEntry(**broken, error=clean(given["error"], ERROR_LIMIT))
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
        if not isinstance(children := given.get("children", []), list):
            raise ValueError(f"children of {given['name']} is not a list")
        check_children(children)
        given["children"] = tuple(children)
        if not isinstance(description := given.get("description"), str | None):
            raise ValueError(f"description of {given['name']} is not a text")
        given["description"] = one_line(description)
        given["state"] = given.get("state") is True
        for name in ("egress", "audiences"):
            if not isinstance(given.get(name), list | None):
                raise ValueError(f"{name} of {given['name']} is not a list")
        try:
            given |= checked_egress(given)
        except ValueError as error:
            # It may be of a newer release, or of a newer list of public suffixes; other handlers go on.
            return HandlerEntry(**broken, error=clean(str(error), ERROR_LIMIT))
        return HandlerEntry(**given)


ENTRY = _Entry()


def entries_of(message: Mapping[str, Any], name: str = "entries") -> list[HandlerEntry]:
    """The handlers of a message; none if there is no such key. Raises Malformed."""
    entries = rows_of({name: message.get(name, [])}, name, ENTRY)
    if len(entries) > MAX_HANDLERS:
        raise Malformed(f"{name}: one host may declare {MAX_HANDLERS} handlers")
    return entries


class _Entries(CallPart[Sequence[HandlerEntry]]):
    def write(self, value: Sequence[HandlerEntry]) -> list[Message]:
        return [ENTRY.write(entry) for entry in value]

    def read(self, value: Any, check: TextCheck) -> list[HandlerEntry]:
        return entries_of({"handlers": value}, "handlers")


@reading("slots")
def slots_of(message: Mapping[str, Any]) -> dict[Isolation, int]:
    """Slots by isolation; one that is missing has none."""
    return {isolation: count_in(message.get(isolation, 0), isolation, MAX_SLOTS) for isolation in ISOLATIONS}


class _Slots(CallPart[Mapping[Isolation, int]]):
    def write(self, value: Mapping[Isolation, int]) -> Message:
        return {isolation: count for isolation, count in value.items()}

    def read(self, value: Any, check: TextCheck) -> dict[Isolation, int]:
        return slots_of(value)


@dataclass(frozen=True, slots=True)
class Registration:
    """A host that starts: its machine, its process, its slots and what it offers so far."""

    host: Annotated[str, Label()]
    pid: Annotated[int, Count(2**31 - 1)]
    version: Annotated[str, Label()]
    slots: Annotated[Mapping[Isolation, int], _Slots()]
    handlers: Annotated[Sequence[HandlerEntry], _Entries()] = ()


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


REGISTRATION = row_of(Registration)
REGISTERED = trusted(Registered)


@reading("take")
def take_of(message: Mapping[str, Any]) -> tuple[dict[Isolation, int], float]:
    """The free slots of a host, and the seconds that it waits for attempts."""
    wait = float(message.get("wait", 0.0))
    if not wait >= 0.0:
        raise ValueError("wait is not a number of seconds")
    return slots_of(message.get("free", {})), min(wait, LONGEST_WAIT)


@reading("ticket")
def ticket_of(message: Mapping[str, Any]) -> Ticket | None:
    """The ticket with which a host takes one run; None if it asks for any runs."""
    if message.get("ticket") is None:
        return None
    ticket = Ticket.parse(text_in(message, "ticket"))
    if ticket is None:
        raise ValueError("ticket is not RUN.FENCING_TOKEN.SECRET")
    return ticket


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


_TAKEN = trusted(Taken, without=("work",))
# A run's process never gets these: the broker of its host does.
_BOUND = Those(tuple, trusted(BoundSecret))


def taken_message(taken: Taken) -> Message:
    message = _TAKEN.write(taken)
    work, sealed = messages.work_message(taken.work, message["timeout"]), message.pop("sealed")
    # An attempt without any is written as before there were some.
    bound = {"bound": _BOUND.write(taken.work.bound)} if taken.work.bound else {}
    return message | {"work": work, **bound, "sealed": sealed}


def taken_of(message: Mapping[str, Any]) -> Taken:
    work = messages.work_of(message["work"])
    work.bound = _BOUND.read(message.get("bound", []), check_json_text)
    return _TAKEN.read(message, work=work)


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


def text_in(message: Mapping[str, Any], name: str) -> str:
    with reading(name):
        text: str = Label().read(message[name], check_json_text)
    return text


def count_in(value: Any, name: str, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{name} is not a number from 0 to {most}")
    return value
