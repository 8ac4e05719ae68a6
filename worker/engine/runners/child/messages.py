"""Messages between worker, zygote and run: work, claims, outcomes and errors as JSON objects, in frames.

Each frame has its length before it. A run's process is not trusted. In its frames long texts follow the JSON
as they are, so that what the worker parses is short, and JSON within JSON needs no second parser.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from worker.engine.runners.child.sandbox import SandboxRules
from worker.engine.runners.contract import Work
from worker.errors import LeaseLost, Unavailable, WorkerError
from worker.handlers.calls import GRANTED, AskToken
from worker.handlers.given import STATE_LIMIT, check_object
from worker.handlers.installed import ENVIRONMENT
from worker.handlers.json_text import LIMIT, UNMASKED_LIMIT, check_json_text
from worker.handlers.parts import CallPart, JsonText, Maybe, Row, Text, TextCheck, TimeSpan, Truth, trusted
from worker.handlers.steps import StepError
from worker.model.egress import TOKEN, placeholder_of, token_name
from worker.model.runs import outcome as outcomes
from worker.model.runs.outcome import Error, Outcome
from worker.secret import AccessToken

Message = dict[str, Any]

# Maximum bytes of a frame of the worker: a checkpoint of 1 MiB and the rest of a run's work.
MAX_FRAME = 8 * 1024 * 1024
# Maximum bytes of a run's frame: its JSON, and the texts after it, such as a result of 1 MiB.
JSON_LIMIT = 256 * 1024
TEXTS_LIMIT = 3 * 1024 * 1024
# Characters from which a text follows the JSON.
LONG = 1024
# Marks and texts in the JSON of a run's frame: a step has up to 1,000 spends, and 100 requests to models.
MAX_TOKENS = 12_288
_LENGTH = struct.Struct("!I")
_LENGTHS = struct.Struct("!II")
_TEXTS = "texts"
# Matches as many as `MAX_TOKENS` without building anything.
_TOO_MANY = re.compile(
    r'(?:[^"\[\]{},:]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},:])){%d}' % MAX_TOKENS,  # noqa: UP031
    re.DOTALL,
)
# What readers of a message raise for one that is not as our own code sends it.
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


class BrokenMessage(Exception):
    """The other side sent what our own code does not send."""


def frame(message: Mapping[str, Any]) -> bytes:
    """A message of the worker."""
    body = _encode(message)
    return _LENGTH.pack(len(body)) + body


class Unframer:
    """Decodes the worker's messages from data that arrives in pieces."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that are complete now; raises BrokenMessage."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME:
                raise BrokenMessage(f"a frame of {length} bytes")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield _object(body)


def run_frame(message: Mapping[str, Any]) -> bytes:
    """A message of a run's process."""
    texts: list[bytes] = []
    places: list[tuple[list[str], int]] = []

    def lifted(value: Mapping[str, Any], path: list[str]) -> Message:
        kept: Message = {}
        for name, part in value.items():
            if isinstance(part, dict):
                kept[name] = lifted(part, [*path, name])
            elif isinstance(part, str) and len(part) > LONG:
                texts.append(part.encode("utf-8", "replace"))
                places.append(([*path, name], len(texts[-1])))
            else:
                kept[name] = part
        return kept

    kept = lifted(message, [])
    body = _encode(kept | {_TEXTS: places} if places else kept)
    return b"".join((_LENGTHS.pack(len(body), sum(map(len, texts))), body, *texts))


class RunFrames:
    """Decodes the messages of a run's process, one at a time."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def add(self, data: bytes) -> None:
        self._buffer += data

    def next(self) -> tuple[Message, int] | None:
        """The next message and its bytes, or None until it is complete. Raises BrokenMessage."""
        if len(self._buffer) < _LENGTHS.size:
            return None
        length, texts = _LENGTHS.unpack_from(self._buffer)
        if length > JSON_LIMIT or texts > TEXTS_LIMIT:
            raise BrokenMessage(f"a frame of {length} and {texts} bytes")
        start, size = _LENGTHS.size + length, _LENGTHS.size + length + texts
        if len(self._buffer) < size:
            return None
        body, rest = bytes(self._buffer[_LENGTHS.size : start]), bytes(self._buffer[start:size])
        del self._buffer[:size]
        message = _object(body, untrusted=True)
        try:
            _put_back(message, rest)
        except MALFORMED as error:
            raise BrokenMessage("a frame whose texts are not where it says") from error
        return message, size


def _put_back(message: Message, texts: bytes) -> None:
    """Put the texts after the JSON where they belong. Raises one of `MALFORMED`."""
    at = 0
    for path, length in message.pop(_TEXTS, ()):
        *parents, name = path
        place: Any = message
        for parent in parents:
            place = place[parent]
        if type(length) is not int or not 0 <= length <= len(texts) - at or not isinstance(place, dict):
            raise ValueError("not a text")
        place[name] = texts[at : at + length].decode()
        at += length
    if at != len(texts):
        raise ValueError("more texts than named")


def _encode(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _object(body: bytes, *, untrusted: bool = False) -> Message:
    try:
        text = body.decode()
        if untrusted and _TOO_MANY.match(text) is not None:
            raise BrokenMessage(f"a frame with more than {MAX_TOKENS} parts")
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BrokenMessage("a frame that is not JSON") from error
    if not isinstance(message, dict):
        raise BrokenMessage("a frame that is not a JSON object")
    return message


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
        return trusted(cls).read(json.loads(text))

    def as_json(self) -> str:
        """For the command line of the zygote."""
        return json.dumps(asdict(self))


WORK = trusted(Work, without=("claims", "token", "bound"), lean=("egress", "traces", "model_apis", "batched"))


def work_message(work: Work, seconds: float, token: AccessToken | None = None) -> Message:
    """All of an attempt's work, with its token or another one; `seconds` are left until its timeout."""
    return WORK.write(work) | {"seconds": seconds} | GRANTED.write((token or work.token, work.claims))


def first_message(work: Work, seconds: float, *, sealed: bool, environment: Mapping[str, str]) -> Message:
    """The first message to a run's process: its work, as a `sealed` run gets it or in clear.

    `seconds` are left until its timeout, by the worker's clock. `environment` has placeholders of variables.
    """
    token = hidden(work, work.token) if sealed else work.token
    return work_message(work, seconds, token) | {"environment": environment}


def hidden(work: Work, token: AccessToken, call: AskToken | None = None) -> AccessToken:
    """The token as a sealed run gets it; `call` asked for it."""
    if work.egress.reveal_token:
        return token
    name = TOKEN if call is None else token_name(call.audience, call.resource)
    return AccessToken(placeholder_of(work.run_id, name), token.expires_at)


def work_of(message: Mapping[str, Any]) -> Work:
    token, claims = GRANTED.read(message)
    return WORK.read(message, token=token, claims=claims)


class StateText(JsonText):
    """The JSON text of a definition's new state."""

    def read(self, value: Any, check: TextCheck) -> str:
        text = super().read(value, check)
        check_object(text)
        return text


# The fields of outcomes by name, cut to the limits that our own code keeps in the run's process.
_TEXT = Text(UNMASKED_LIMIT)
_FIELDS: Mapping[str, CallPart[Any]] = {
    "error": Row(Error, {"type": _TEXT, "message": _TEXT, "trace": Text(UNMASKED_LIMIT + 2)}),
    "permanent": Truth(),
    "reason": _TEXT,
    "message": _TEXT,
    "detail": Maybe(_TEXT),
    "retry_after": TimeSpan(),
    "after": Maybe(TimeSpan()),
    "result": Maybe(JsonText("result", LIMIT)),
    "state": Maybe(StateText("state", STATE_LIMIT)),
}
_OUTCOMES = {
    kind.__name__: Row(kind, {field.name: _FIELDS[field.name] for field in fields(kind)})
    for kind in get_args(Outcome)
}
# Those that only the worker finds; `runners/contract.py` says which of the others count, and when.
_NOT_SENT = (outcomes.TimedOut.__name__, outcomes.Gated.__name__)


def outcome_message(outcome: Outcome) -> Message:
    """An outcome as a message; durations in seconds."""
    kind = type(outcome).__name__
    return {"kind": kind} | _OUTCOMES[kind].write(outcome)


def outcome_of_message(message: Mapping[str, Any], check: TextCheck = check_json_text) -> Outcome:
    """Parse the output of `outcome_message`. Raises ValueError: the process that sent it is not trusted."""
    try:
        kind = message["kind"]
        outcome: Outcome = _OUTCOMES[kind].read(message, check)
        if kind in _NOT_SENT or (isinstance(outcome, outcomes.Snoozed) and outcome.after is None):
            raise ValueError("not an outcome")
        if isinstance(outcome, outcomes.Parked) and outcome.reason not in outcomes.PARKED_REASONS:
            raise ValueError("not an outcome")
    except MALFORMED as error:
        raise ValueError("not an outcome") from error
    return outcome


# The code of a StepError, which is the author's.
_STEP = "step"


def error_message(error: WorkerError | StepError) -> Message:
    """An error of the worker, to be raised in the run's process."""
    if isinstance(error, StepError):
        return {"code": _STEP, "message": str(error)}
    pause = getattr(error, "retry_after", None)
    return {"code": error.code, "message": error.message, "retry_after": pause}


def error_of(message: Mapping[str, Any]) -> WorkerError | StepError:
    if message["code"] == _STEP:
        return StepError(message["message"])
    if message["code"] == LeaseLost.code:
        return LeaseLost(message["message"])
    error = Unavailable(message["message"])
    error.code = message["code"]
    error.retry_after = message["retry_after"]
    return error
