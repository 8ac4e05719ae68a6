"""Messages between worker, zygote and run: work, claims and outcomes as JSON objects."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from typing import Any, get_args

from worker.clock import from_text, to_text
from worker.definitions.budgets import MAX_AMOUNT, OWN_METERS
from worker.execution.runners.child.frames import MALFORMED
from worker.execution.runners.child.frames import Message as Message
from worker.execution.runners.child.sandbox import SandboxRules
from worker.execution.runners.contract import Work
from worker.guard.claims import Claims, Flag
from worker.handlers.calls import GRANTED, budget_rows, budgets_in
from worker.handlers.context import check_progress
from worker.handlers.installed import ENVIRONMENT
from worker.handlers.json_text import LIMIT, UNMASKED_LIMIT, check_json_text, clean, to_json_text
from worker.handlers.results import as_timedelta
from worker.handlers.state import LIMIT as STATE_LIMIT
from worker.handlers.state import check_object
from worker.handlers.steps import MOST_STEPS, RESULT_LIMIT, StepError, check_key, check_name
from worker.ids import RunId
from worker.runs import outcome as outcomes
from worker.runs.budgets import MOST_SPENDS, BudgetState
from worker.runs.outcome import Error, Outcome
from worker.runs.run import NewStep, StepPage, StoredStep
from worker.runs.waits import KINDS, MOST_ASKED, MOST_WAITS, NewWait, Option, WaitState, check_options
from worker.secret import AccessToken

# Exit code of a run's process that cannot reach the worker, for instance after closing all descriptors.
CHANNEL_CLOSED = 81
# Spends of one step, of as many meters: those of one meter are added up.
MOST_METERS = 1000


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
    sandbox: SandboxRules | None = None
    spares: bool = False
    share_after: int | None = None
    describing: int | None = None

    @classmethod
    def from_json(cls, text: str) -> Setup:
        given = json.loads(text)
        rules = given.pop("sandbox", None)
        return cls(**given, sandbox=None if rules is None else SandboxRules.of(rules))

    def as_json(self) -> str:
        """For the command line of the zygote."""
        return json.dumps(asdict(self))


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
        "budgets": None if work.budgets is None else budget_rows(work.budgets),
        **GRANTED.write((token, claims)),
    }


def work_of(message: Mapping[str, Any]) -> Work:
    given = dict(message)
    del given["seconds"]
    token, claims = GRANTED.read(given)
    del given["granted"]
    return Work(
        **given
        | {
            "run_id": RunId(given["run_id"]),
            "scheduled_for": from_text(given["scheduled_for"]),
            "timeout_at": from_text(given["timeout_at"]),
            "api_origins": tuple(given["api_origins"]),
            "private_origins": tuple(given["private_origins"]),
            "insecure_origins": tuple(given["insecure_origins"]),
            "budgets": None if given["budgets"] is None else budgets_in(given["budgets"]),
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


# Raises NotStorable unless a text is JSON within its limit in bytes; gets the text, its name and the limit.
TextCheck = Callable[[str, str, int], None]

# The outcomes that have a message; `runners/contract.py` says which of them count, and when.
_OUTCOMES: dict[str, type[Any]] = {
    kind.__name__: kind for kind in get_args(Outcome) if kind not in (outcomes.TimedOut, outcomes.Gated)
}


def outcome_message(outcome: Outcome) -> Message:
    """An outcome as a message; durations in seconds."""
    values = asdict(outcome)
    spans = {name: value.total_seconds() for name, value in values.items() if isinstance(value, timedelta)}
    return {"kind": type(outcome).__name__} | values | spans


def outcome_of_message(message: Mapping[str, Any], check: TextCheck = check_json_text) -> Outcome:
    """Parse the output of `outcome_message`. Raises ValueError: the process that sent it is not trusted."""
    try:
        kind = _OUTCOMES[message["kind"]]
        names = [field.name for field in fields(kind) if field.name in message]
        outcome: Outcome = kind(**{name: _field(name, message[name], check) for name in names})
        if isinstance(outcome, outcomes.Snoozed) and outcome.after is None:
            raise ValueError("not an outcome")
        if isinstance(outcome, outcomes.Parked) and outcome.reason not in outcomes.PARKED_REASONS:
            raise ValueError("not an outcome")
    except MALFORMED as error:
        raise ValueError("not an outcome") from error
    return outcome


def _field(name: str, value: Any, check: TextCheck) -> Any:
    """A field of an outcome, cut to the limits that our own code keeps in the run's process."""
    match name:
        case "error":
            return Error(
                clean(value["type"], UNMASKED_LIMIT),
                clean(value["message"], UNMASKED_LIMIT),
                clean(value["trace"], UNMASKED_LIMIT + 2),
            )
        case "permanent":
            return value is True
        case "reason" | "message":
            return clean(value, UNMASKED_LIMIT)
        case "retry_after":
            return as_timedelta(float(value))
        case _ if value is None:
            return None
        case "after":
            return as_timedelta(float(value))
        case "result":
            check(value, "result", LIMIT)
            return value
        case "state":
            check(value, "state", STATE_LIMIT)
            check_object(value)
            return value
        case _:
            return clean(value, UNMASKED_LIMIT)


def progress_of(message: Mapping[str, Any]) -> tuple[float, float | None, str | None]:
    """Progress as a run's process sent it. Raises ValueError: that process is not trusted."""
    done, total, note = message["done"], message["total"], message["note"]
    check_progress(done, total)
    return done, total, None if note is None else clean(str(note), UNMASKED_LIMIT)


def step_message(step: NewStep) -> Message:
    values = {name: getattr(step, name) for name in _STEP}
    times = {"started_at": to_text(step.started_at), "ended_at": to_text(step.ended_at)}
    return values | times | {"spends": _by_meter(step)}


def _by_meter(step: NewStep) -> list[tuple[str, int]]:
    """The spends of a step, those of one meter added up as far as one spend may go."""
    spends: list[tuple[str, int]] = []
    places: dict[str, int] = {}
    for meter, amount in step.spends:
        place = places.get(meter)
        if place is not None and spends[place][1] + amount <= MAX_AMOUNT:
            spends[place] = (meter, spends[place][1] + amount)
        else:
            places[meter] = len(spends)
            spends.append((meter, amount))
    if len(spends) > MOST_METERS:
        raise StepError(f"step {step.name}: it has spends of more than {MOST_METERS:,} meters, the limit")
    return spends


_STEP = [field.name for field in fields(NewStep)]


def step_of(message: Mapping[str, Any], check: TextCheck = check_json_text) -> NewStep:
    """A step as a run's process sent it. Raises ValueError or StepError: that process is not trusted."""
    key, seq, occurrence = message["key"], message["seq"], message["occurrence"]
    if not (type(seq) is type(occurrence) is int and 1 <= seq <= MOST_STEPS and 1 <= occurrence <= 2**31 - 1):
        raise ValueError("not a step")
    if len(message["spends"]) > MOST_METERS:
        raise ValueError("not a step")
    name = check_name("step", message["name"])
    check(message["result_json"], f"result of step {name}", RESULT_LIMIT)
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


def wait_message(wait: NewWait) -> Message:
    """A wait; without `options` as the previous release writes it."""
    message = asdict(wait)
    if not wait.options:
        del message["options"]
    return message


def wait_of(message: Mapping[str, Any]) -> NewWait:
    """A wait as a run's process sent it. Raises ValueError or StepError: that process is not trusted."""
    name, occurrence, seconds = check_name("wait", message["name"]), message["occurrence"], message["seconds"]
    if type(occurrence) is not int or not 1 <= occurrence <= MOST_WAITS or message["kind"] not in KINDS:
        raise ValueError("not a wait")
    if message["ask_json"] is not None:
        check_json_text(message["ask_json"], f"ask of {name}", MOST_ASKED)
    options: tuple[Option, ...] = ()
    if message.get("options") is not None:
        if message["kind"] != "answer":
            raise ValueError("only a wait for an answer has options")
        options = check_options(message["options"])
        to_json_text(options, f"options of {name}", MOST_ASKED)
    return NewWait(
        name=name,
        occurrence=occurrence,
        kind=message["kind"],
        seconds=None if seconds is None else as_timedelta(float(seconds)).total_seconds(),
        ask_json=message["ask_json"],
        alert=message["alert"] is True,
        options=options,
    )


def count_of(value: Any, most: int) -> int:
    """A number from 0 to `most`. Raises ValueError."""
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"not a number from 0 to {most}")
    return value


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
