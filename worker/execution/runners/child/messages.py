"""Messages between worker, zygote and run: work, claims and outcomes as JSON frames."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from typing import Any, get_args

from worker.clock import from_text, to_text
from worker.definitions.budgets import MAX_AMOUNT, OWN_METERS
from worker.execution.runners.child.sandbox import Rules
from worker.execution.runners.contract import Work
from worker.guard.claims import Claims, Flag
from worker.handlers.calling import DETAIL_LIMIT, MESSAGE_LIMIT, TRACE_LIMIT
from worker.handlers.context import NOTE_LIMIT, check_progress
from worker.handlers.installed import ENVIRONMENT
from worker.handlers.json_text import check_json_text, clean
from worker.handlers.results import as_timedelta
from worker.handlers.state import check_state_text
from worker.handlers.steps import MOST_STEPS, RESULT_LIMIT, check_key, check_name
from worker.ids import RunId
from worker.runs import outcome as outcomes
from worker.runs.budgets import MOST_SPENDS, BudgetState
from worker.runs.outcome import Error, Outcome
from worker.runs.run import NewStep, StepPage, StoredStep
from worker.runs.waits import KINDS, MOST_ASKED, MOST_WAITS, NewWait, WaitState
from worker.secret import AccessToken

# Exit code of a run's process that cannot reach the worker, for instance after closing all descriptors.
CHANNEL_CLOSED = 81
# Maximum bytes of a frame: 1 MiB of JSON, such as a result, can grow sixfold as text within JSON.
LIMIT = 8 * 1024 * 1024
_LENGTH = struct.Struct("!I")

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setup:
    """The settings of a zygote. `max_freeze` is in seconds; `folder` contains the folders of the runs.

    `lock` is the descriptor of the SQLite file's lock, which each run also locks for reading. Without
    `sandbox` the runs are not confined. `spares` if processes are forked ahead of their runs. After
    `share_after` forks the zygote shares its pages; never if that is None. `describing` is the socket of a
    process that describes handlers for the catalogue.
    """

    folder: str
    parent: int = 0
    lock: int | None = None
    environment: tuple[str, ...] = ENVIRONMENT
    preload: tuple[str, ...] = ()
    max_freeze: float = 600.0
    sandbox: Rules | None = None
    spares: bool = False
    share_after: int | None = None
    describing: int | None = None

    @classmethod
    def from_json(cls, text: str) -> Setup:
        given = json.loads(text)
        rules = given.pop("sandbox", None)
        return cls(**given, sandbox=None if rules is None else Rules.of(rules))

    def as_json(self) -> str:
        """For the command line of the zygote."""
        return json.dumps(asdict(self))


class BrokenFrame(Exception):
    """Invalid data: a frame that is too long, or not a JSON object."""


def frame(message: Mapping[str, Any]) -> bytes:
    body = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return _LENGTH.pack(len(body)) + body


class Unframer:
    """Decodes messages from data that arrives in pieces."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that are complete now; raises BrokenFrame."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > LIMIT:
                raise BrokenFrame(f"a frame of {length} bytes")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            try:
                message = json.loads(body)
            except (ValueError, RecursionError) as error:
                raise BrokenFrame("a frame that is not JSON") from error
            if not isinstance(message, dict):
                raise BrokenFrame("a frame that is not a JSON object")
            yield message


def work_message(work: Work, seconds: float) -> Message:
    """The first message to a run: everything its process needs, including the token.

    `seconds` are left until its timeout, by the worker's clock.
    """
    values = {field.name: getattr(work, field.name) for field in fields(work)}
    token, claims = values.pop("token"), values.pop("claims")
    return values | {
        "seconds": seconds,
        "params": dict(work.params),
        "secrets": dict(work.secrets),
        "scheduled_for": to_text(work.scheduled_for),
        "timeout_at": to_text(work.timeout_at),
        "granted": granted_message(token, claims),
        "budgets": None if work.budgets is None else budgets_message(work.budgets)["budgets"],
    }


def work_of(message: Mapping[str, Any]) -> Work:
    given = dict(message)
    del given["seconds"]
    token, claims = granted_of(given.pop("granted"))
    return Work(
        **given
        | {
            "run_id": RunId(given["run_id"]),
            "scheduled_for": from_text(given["scheduled_for"]),
            "timeout_at": from_text(given["timeout_at"]),
            "api_origins": tuple(given["api_origins"]),
            "private_origins": tuple(given["private_origins"]),
            "insecure_origins": tuple(given["insecure_origins"]),
            "budgets": None if given["budgets"] is None else tuple(budgets_of(given)),
            "token": token,
            "claims": claims,
        }
    )


def granted_message(token: AccessToken, claims: Claims) -> Message:
    """A token and its claims; only for the process of its own run."""
    return {
        "text": token.reveal(),
        "expires_at": to_text(token.expires_at),
        "claims": asdict(claims)
        | {
            "scopes": sorted(claims.scopes),
            "issued_at": to_text(claims.issued_at),
            "expires_at": to_text(claims.expires_at),
        },
    }


def granted_of(message: Mapping[str, Any]) -> tuple[AccessToken, Claims]:
    given = message["claims"]
    claims = Claims(
        **given
        | {
            "scopes": frozenset(given["scopes"]),
            "flags": {name: Flag(**flag) for name, flag in given["flags"].items()},
            "issued_at": from_text(given["issued_at"]),
            "expires_at": from_text(given["expires_at"]),
        }
    )
    return AccessToken(message["text"], from_text(message["expires_at"])), claims


# The outcomes that a run's process may report.
_OUTCOMES: dict[str, type[Any]] = {
    kind.__name__: kind for kind in get_args(Outcome) if kind not in (outcomes.TimedOut, outcomes.Gated)
}


def outcome_message(outcome: Outcome) -> Message:
    """An outcome as a message; durations in seconds."""
    values = asdict(outcome)
    spans = {name: value.total_seconds() for name, value in values.items() if isinstance(value, timedelta)}
    return {"kind": type(outcome).__name__} | values | spans


def outcome_of_message(message: Mapping[str, Any]) -> Outcome:
    """Parse the output of `outcome_message`. Raises ValueError: the process that sent it is not trusted."""
    try:
        kind = _OUTCOMES[message["kind"]]
        names = [field.name for field in fields(kind) if field.name in message]
        outcome: Outcome = kind(**{name: _field(name, message[name]) for name in names})
        if isinstance(outcome, outcomes.Snoozed) and outcome.after is None:
            raise ValueError("not an outcome")
        if isinstance(outcome, outcomes.Parked) and outcome.reason not in outcomes.PARKED_REASONS:
            raise ValueError("not an outcome")
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError("not an outcome") from error
    return outcome


def _field(name: str, value: Any) -> Any:
    """A field of an outcome, cut to the limits that our own code keeps in the run's process."""
    match name:
        case "error":
            return Error(
                clean(value["type"], DETAIL_LIMIT),
                clean(value["message"], MESSAGE_LIMIT),
                clean(value["trace"], TRACE_LIMIT + 2),
            )
        case "permanent":
            return value is True
        case "reason" | "message":
            return clean(value, MESSAGE_LIMIT)
        case "retry_after":
            return as_timedelta(float(value))
        case _ if value is None:
            return None
        case "after":
            return as_timedelta(float(value))
        case "result":
            check_json_text(value, "result")
            return value
        case "state":
            check_state_text(value)
            return value
        case _:
            return clean(value, MESSAGE_LIMIT)


def progress_of(message: Mapping[str, Any]) -> tuple[float, float | None, str | None]:
    """Progress as a run's process sent it. Raises ValueError: that process is not trusted."""
    done, total, note = message["done"], message["total"], message["note"]
    check_progress(done, total)
    return done, total, None if note is None else clean(str(note), NOTE_LIMIT)


def step_message(step: NewStep) -> Message:
    values = {name: getattr(step, name) for name in _STEP}
    return values | {"started_at": to_text(step.started_at), "ended_at": to_text(step.ended_at)}


_STEP = [field.name for field in fields(NewStep)]


def step_of(message: Mapping[str, Any]) -> NewStep:
    """A step as a run's process sent it. Raises ValueError or StepError: that process is not trusted."""
    key, seq, occurrence = message["key"], message["seq"], message["occurrence"]
    if not (type(seq) is type(occurrence) is int and 1 <= seq <= MOST_STEPS and 1 <= occurrence <= 2**31 - 1):
        raise ValueError("not a step")
    if len(message["spends"]) > MOST_SPENDS:
        raise ValueError("not a step")
    name = check_name("step", message["name"])
    check_json_text(message["result_json"], f"result of step {name}", RESULT_LIMIT)
    return NewStep(
        name=name,
        key=None if key is None else check_key(f"step {name}", key),
        occurrence=occurrence,
        seq=seq,
        result_json=message["result_json"],
        started_at=from_text(message["started_at"]),
        ended_at=from_text(message["ended_at"]),
        spends=tuple(_spend(*spend) for spend in message["spends"]),
    )


def _spend(meter: Any, amount: Any) -> tuple[str, int]:
    if type(amount) is not int or not 0 <= amount <= MAX_AMOUNT or meter in OWN_METERS:
        raise ValueError("not a spend")
    return check_name("spend", meter), amount


def wait_of(message: Mapping[str, Any]) -> NewWait:
    """A wait as a run's process sent it. Raises ValueError or StepError: that process is not trusted."""
    name, occurrence, seconds = check_name("wait", message["name"]), message["occurrence"], message["seconds"]
    if type(occurrence) is not int or not 1 <= occurrence <= MOST_WAITS or message["kind"] not in KINDS:
        raise ValueError("not a wait")
    if message["ask_json"] is not None:
        check_json_text(message["ask_json"], f"ask of {name}", MOST_ASKED)
    return NewWait(
        name=name,
        occurrence=occurrence,
        kind=message["kind"],
        seconds=None if seconds is None else as_timedelta(float(seconds)).total_seconds(),
        ask_json=message["ask_json"],
        alert=message["alert"] is True,
    )


def wait_state_message(state: WaitState) -> Message:
    return asdict(state) | {"until": None if state.until is None else to_text(state.until)}


def wait_state_of(message: Mapping[str, Any]) -> WaitState:
    until = message["until"]
    at = None if until is None else from_text(until)
    return WaitState(message["kind"], message["state"], message["answer_json"], at)


def spend_of(message: Mapping[str, Any]) -> tuple[str, int, int]:
    """A spend as a run's process sent it. Raises ValueError or StepError: that process is not trusted."""
    meter, amount = _spend(message["meter"], message["amount"])
    number = message["number"]
    if type(number) is not int or not 1 <= number <= MOST_SPENDS:
        raise ValueError("not a spend")
    return meter, amount, number


def budgets_message(states: Iterable[BudgetState]) -> Message:
    rows = [asdict(state) for state in states]
    for row in rows:
        row["resets_at"] = None if row["resets_at"] is None else to_text(row["resets_at"])
    return {"budgets": rows}


def budgets_of(message: Mapping[str, Any]) -> list[BudgetState]:
    times = [row["resets_at"] for row in message["budgets"]]
    return [
        BudgetState(**row | {"resets_at": None if at is None else from_text(at)})
        for row, at in zip(message["budgets"], times, strict=True)
    ]


def page_message(page: StepPage) -> Message:
    steps = [
        (step.seq, step.name, step.key, step.occurrence, step.size, step.result_json) for step in page.steps
    ]
    return {"steps": steps, "more": page.more}


def page_of(message: Mapping[str, Any]) -> StepPage:
    return StepPage([StoredStep(*values) for values in message["steps"]], message["more"])
