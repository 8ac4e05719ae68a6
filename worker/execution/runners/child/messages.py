"""Messages between worker, zygote and run: work, claims and outcomes as JSON frames."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from typing import Any

from worker.claims.claims import AccessToken, Claims, Flag
from worker.clock import from_text, to_text
from worker.execution.runners.child.sandbox import Rules
from worker.execution.runners.contract import Work
from worker.handlers.calling import DETAIL_LIMIT, MESSAGE_LIMIT, TRACE_LIMIT
from worker.handlers.context import NOTE_LIMIT, check_progress
from worker.handlers.installed import ENVIRONMENT
from worker.handlers.json_text import check_json_text, clean
from worker.handlers.results import as_timedelta
from worker.ids import RunId
from worker.runs import outcome as outcomes
from worker.runs.outcome import Error, Outcome


@dataclass(frozen=True, slots=True)
class Setup:
    """`max_freeze` is in seconds, `folder` the runs' home.

    `lock` is the descriptor of the SQLite file's lock. The zygote holds it; each run holds
    a read lock of its own on the same file. Without `sandbox` nothing is denied to the runs.
    """

    folder: str
    parent: int = 0
    lock: int | None = None
    environment: tuple[str, ...] = ENVIRONMENT
    preload: tuple[str, ...] = ()
    max_freeze: float = 600.0
    sandbox: Rules | None = None

    @classmethod
    def from_json(cls, text: str) -> Setup:
        """What `as_json` has written."""
        given = json.loads(text)
        rules = given.pop("sandbox", None)
        return cls(**given, sandbox=None if rules is None else Rules.of(rules))

    def as_json(self) -> str:
        """For the command line of the zygote."""
        return json.dumps(asdict(self))


# A result and a checkpoint are at most 1 MiB of JSON; as text within JSON they can grow sixfold.
LIMIT = 8 * 1024 * 1024
_LENGTH = struct.Struct("!I")

Message = dict[str, Any]


class BrokenFrame(Exception):
    """What arrives is not this protocol: too long, or no JSON object."""


def frame(message: Mapping[str, Any]) -> bytes:
    """One message, ready to be sent."""
    body = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return _LENGTH.pack(len(body)) + body


class Unframer:
    """Puts what arrives in pieces together again."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that are whole now; raises BrokenFrame."""
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
            yield _parsed(body)


def _parsed(body: bytes) -> Message:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BrokenFrame("a frame that is no JSON") from error
    if not isinstance(message, dict):
        raise BrokenFrame("a frame that is no object")
    return message


_OUTCOMES: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        outcomes.Succeeded,
        outcomes.Failed,
        outcomes.Retried,
        outcomes.Snoozed,
        outcomes.Cancelled,
        outcomes.HandedBack,
        outcomes.Lost,
        outcomes.Refused,
        outcomes.NoToken,
        outcomes.NoHandler,
    )
}


def work_message(work: Work) -> dict[str, Any]:
    """The first frame of a run's channel: everything its process needs, the token included."""
    return {
        "run_id": work.run_id,
        "attempt": work.attempt,
        "fencing_token": work.fencing_token,
        "idempotency_key": work.idempotency_key,
        "scheduled_for": to_text(work.scheduled_for),
        "org_code": work.org_code,
        "org_name": work.org_name,
        "definition": work.definition,
        "handler": work.handler,
        "entry_point": work.entry_point,
        "params": dict(work.params),
        "granted": granted_message(work.token, work.claims),
        "api_origins": list(work.api_origins),
        "timeout_at": to_text(work.timeout_at),
        "checkpoint": work.checkpoint,
        "memory": work.memory,
        "isolation": work.isolation,
        "traceparent": work.traceparent,
        "private_origins": list(work.private_origins),
        "insecure_origins": list(work.insecure_origins),
    }


def work_of(message: Mapping[str, Any]) -> Work:
    """The work that `work_message` wrote."""
    given = dict(message)
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
            "token": token,
            "claims": claims,
        }
    )


def granted_message(token: AccessToken, claims: Claims) -> dict[str, Any]:
    """A token and what it says, for the process of its own run only."""
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
    """The token and claims that `granted_message` wrote."""
    said = message["claims"]
    claims = Claims(
        **said
        | {
            "scopes": frozenset(said["scopes"]),
            "flags": {name: Flag(**flag) for name, flag in said["flags"].items()},
            "issued_at": from_text(said["issued_at"]),
            "expires_at": from_text(said["expires_at"]),
        }
    )
    return AccessToken(message["text"], from_text(message["expires_at"])), claims


def outcome_message(outcome: Outcome) -> dict[str, Any]:
    """An outcome as a message; durations in seconds."""
    said = asdict(outcome)
    spans = {name: value.total_seconds() for name, value in said.items() if isinstance(value, timedelta)}
    return {"kind": type(outcome).__name__} | said | spans


def outcome_of_message(message: Mapping[str, Any]) -> Outcome:
    """The outcome that `outcome_message` wrote.

    Raises:
        ValueError: it is none; the process that sent it is not to be trusted.
    """
    try:
        kind = _OUTCOMES[message["kind"]]
        names = [field.name for field in fields(kind) if field.name in message]
        outcome: Outcome = kind(**{name: _part(name, message[name]) for name in names})
        if isinstance(outcome, outcomes.Snoozed) and outcome.after is None:
            raise ValueError("not an outcome")
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError("not an outcome") from error
    return outcome


def _part(name: str, value: Any) -> Any:
    """A field of an outcome, within the limits that the run's process keeps if it is what we started."""
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
        case _:
            return clean(value, MESSAGE_LIMIT)


def shown_progress(message: Mapping[str, Any]) -> tuple[float, float | None, str | None]:
    """Progress as a run's process sent it.

    Raises:
        ValueError: it is none; the process that sent it is not to be trusted.
    """
    done, total, note = message["done"], message["total"], message["note"]
    check_progress(done, total)
    if note is not None:
        note = clean(str(note), NOTE_LIMIT)
    return done, total, note
