"""Messages between worker, zygote and run: work, claims and outcomes as JSON objects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from typing import Any, get_args

from worker.clock import from_text, to_text
from worker.execution.runners.child.frames import MALFORMED
from worker.execution.runners.child.frames import Message as Message
from worker.execution.runners.child.sandbox import SandboxRules
from worker.execution.runners.contract import Work
from worker.handlers.calls import GRANTED, budget_rows, budgets_in
from worker.handlers.installed import ENVIRONMENT
from worker.handlers.json_text import LIMIT, UNMASKED_LIMIT, check_json_text, clean
from worker.handlers.parts import TextCheck
from worker.handlers.results import as_timedelta
from worker.handlers.state import LIMIT as STATE_LIMIT
from worker.handlers.state import check_object
from worker.ids import RunId
from worker.runs import outcome as outcomes
from worker.runs.outcome import Error, Outcome

# Exit code of a run's process that cannot reach the worker, for instance after closing all descriptors.
CHANNEL_CLOSED = 81


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
