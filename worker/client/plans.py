"""What a client does, without doing it: each call is a generator of steps.

`Client` and `AsyncClient` take them. A plan yields a `Send`, a `Listen` or a `Sleep`, gets a `Reply` or an
`Unavailable` for the first two, and returns its result or raises a ClientError.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import quote
from uuid import uuid4

from .errors import BY_STATUS, BadAnswer, ClientError, InvalidRequest, Unavailable, WaitTimeout
from .results import Replayed, Run, Started, run_of

BASE = "/api/v1"
# Bytes of an answer, of an event, and of the JSON of params.
ANSWER_LIMIT = 4 * 1024 * 1024
EVENT_LIMIT = 1024 * 1024
PARAMS_LIMIT = 64 * 1024
MAX_NAME = 200
# Seconds: the first pause before another try, the longest, and what a server may ask for.
FIRST_PAUSE = 0.2
LONGEST_PAUSE = 10.0
LONGEST_RETRY_AFTER = 300.0
# Behind every line of a log: the stream then has no log.
NO_LOG = "2147483647.0"
# Characters of a server's text in an error.
SHOWN = 500
PROBLEM = "application/problem+json"

T = TypeVar("T")
_UNPRINTABLE = re.compile(r"[^ -~\u00a0-\uffff]+")


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete answer; header names are in lower case."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    content: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Send:
    """One request; its answer has at most ANSWER_LIMIT bytes."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Listen:
    """An event stream for `reader`, until its run has ended, or for `seconds`."""

    path: str
    reader: EventReader
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Sleep:
    seconds: float


Plan = Generator[Send | Listen | Sleep, "Reply | Unavailable | None", T]


@dataclass(frozen=True, slots=True)
class Retries:
    """For how many seconds a call that may succeed later is repeated."""

    seconds: float
    monotonic: Callable[[], float]
    random: Callable[[], float] = random.random

    def pause(self, tries: int, error: ClientError) -> float:
        """Seconds before the next try: what the server asks for, else about doubled each time."""
        if error.retry_after is not None:
            return error.retry_after
        most: float = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(tries, 10))
        return most * (0.5 + self.random() / 2)


@dataclass(frozen=True, slots=True)
class StartRequest:
    """What is started; the key makes it one run however often it is sent."""

    org: str
    definition: str
    params: Mapping[str, Any]
    key: str
    not_before: datetime | None = None

    def send(self) -> Send:
        body: dict[str, Any] = {"params": self.params} if self.params else {}
        if self.not_before is not None:
            body["not_before"] = self.not_before.astimezone(UTC).isoformat()
        path = f"/definitions/{_segment(self.org, 'org')}/{_segment(self.definition, 'definition')}/run"
        return Send("POST", path, {"idempotency-key": self.key}, json.dumps(body).encode())


def start_request(
    org: str,
    definition: str,
    params: Mapping[str, Any] | None,
    key: str | None,
    not_before: datetime | None,
) -> StartRequest:
    """A checked request; without a key it gets a random one.

    Raises:
        InvalidRequest: a name, the key, the params or the time is of another shape, or too large.
    """
    _segment(org, "org")
    _segment(definition, "definition")
    key = str(uuid4()) if key is None else key
    if not isinstance(key, str) or not (0 < len(key) <= MAX_NAME and key.isprintable() and key.isascii()):
        raise InvalidRequest(
            f"a key has 1 to {MAX_NAME} printable ASCII characters", fix="such as order-4711", field="key"
        )
    if key != key.strip():
        raise InvalidRequest("a key begins and ends without spaces", fix="strip it", field="key")
    if not_before is not None and not_before.tzinfo is None:
        raise InvalidRequest(
            "not_before has no time zone", fix="such as datetime.now(UTC)", field="not_before"
        )
    return StartRequest(org, definition, json.loads(params_text(params)), key, not_before)


def params_text(params: Mapping[str, Any] | None) -> str:
    """The JSON of params, in ASCII; raises InvalidRequest."""
    if params is not None and not isinstance(params, Mapping):
        raise InvalidRequest("params is not a mapping", fix="such as {'page': 1}", field="params")
    try:
        text = json.dumps({} if params is None else dict(params), allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"params is not JSON: {error}", fix="use plain values", field="params") from None
    if len(text) > PARAMS_LIMIT:
        raise InvalidRequest(
            f"params has {len(text)} bytes of JSON, over {PARAMS_LIMIT}",
            fix="store the data, and give its id",
            field="params",
        )
    return text


def _segment(text: str, name: str) -> str:
    """A segment of a path; a dot segment would lead to another address."""
    if not isinstance(text, str) or not 0 < len(text) <= MAX_NAME or text in (".", ".."):
        raise InvalidRequest(f"{name} {text!r:.80} is not a name", fix="1 to 200 characters", field=name)
    try:
        return quote(text, safe="")
    except UnicodeEncodeError:
        raise InvalidRequest(f"{name} is not text", fix="leave out surrogates", field=name) from None


def start(request: StartRequest, retries: Retries) -> Plan[Started]:
    """Start a run, again and again while a retry may help: the key makes that safe."""
    reply = yield from _answered(request.send(), retries)
    run = run_of(_json(reply))
    if (run.org, run.definition) != (request.org, request.definition):
        raise BadAnswer("the answer is a run of another definition", fix="check the address of the API")
    said = reply.headers.get("idempotency-replayed")
    replayed: Replayed | None = None if said is None else "same" if said == "same-params" else "other"
    return Started(run, request.key, replayed)


def show(run_id: str, retries: Retries) -> Plan[Run]:
    """One run."""
    reply = yield from _answered(Send("GET", f"/runs/{_segment(run_id, 'run')}"), retries)
    return run_of(_json(reply))


def wait(run_id: str, seconds: float | None, retries: Retries) -> Plan[Run]:
    """A run that has ended, from its events; a stream that ends before is opened again.

    Raises:
        WaitTimeout: it has not ended in `seconds`.
    """
    path = f"/runs/{_segment(run_id, 'run')}/events?after={NO_LOG}"
    reader, until, tries = EventReader(), None if seconds is None else retries.monotonic() + seconds, 0
    lost_at: float | None = None
    while True:
        left = None if until is None else until - retries.monotonic()
        if left is not None and left <= 0:
            raise WaitTimeout(f"run {run_id} has not ended in {seconds} s", fix="it continues: wait again")
        heard = reader.count
        reply = yield Listen(path, reader, left)
        if reader.run is not None and reader.run.has_ended:
            return reader.run
        if isinstance(reply, Reply) and reply.status == 200 and reply.content:
            raise BadAnswer("the answer is not a stream of events", fix="check the address of the API")
        now = retries.monotonic()
        if reader.count > heard or (isinstance(reply, Reply) and reply.status == 200):
            # A drain has ended the stream, or a connection that worked.
            tries, lost_at = 0, None
        if isinstance(reply, Reply) and reply.status == 204:
            return (yield from show(run_id, retries))
        error: ClientError | None = reply if isinstance(reply, Unavailable) else None
        if isinstance(reply, Reply) and reply.status != 200:
            error = error_of(reply)
            if not error.transient:
                raise error
        lost_at = now if lost_at is None else lost_at
        is_over = until is not None and now >= until
        if error is not None and now - lost_at >= retries.seconds and not is_over:
            raise error
        pause = retries.pause(tries, error or Unavailable("the stream has ended"))
        yield Sleep(pause if until is None else max(0.0, min(pause, until - now)))
        tries += 1


def _answered(send: Send, retries: Retries) -> Plan[Reply]:
    """The successful answer of a request that may be repeated."""
    until, tries = retries.monotonic() + retries.seconds, 0
    while True:
        reply = yield send
        if isinstance(reply, Reply) and 200 <= reply.status < 300:
            return reply
        error = error_of(reply) if isinstance(reply, Reply) else reply
        if error is None:
            raise BadAnswer("there was no answer")
        pause = retries.pause(tries, error)
        if not error.transient or retries.monotonic() + pause > until:
            raise error
        yield Sleep(pause)
        tries += 1


def error_of(reply: Reply) -> ClientError:
    """The error in an answer (RFC 9457); one without a problem is not from the API, but from before it."""
    status = reply.status
    problem = _problem(reply)
    retry_after = _retry_after(reply.headers.get("retry-after", ""))
    if problem is None:
        if status in (408, 429) or status >= 500:
            return Unavailable(
                f"status {status}, and not from the API",
                fix="see the proxy before the API",
                status=status,
                retry_after=retry_after,
            )
        where = "a redirect, which is not followed" if 300 <= status < 400 else "no answer of the API"
        fix = "set the address of the API itself, such as https://jobs.acme.com"
        return BadAnswer(f"status {status}: {where}", fix=fix, status=status)
    kind = BY_STATUS.get(status, Unavailable if status >= 500 else BadAnswer)
    name = problem.get("field")
    return kind(
        _shown(problem.get("detail")) or f"status {status}",
        fix=_shown(problem.get("fix")),
        code=_shown(problem.get("code")),
        status=status,
        field=_shown(name) if name is not None else None,
        retry_after=retry_after,
    )


def _problem(reply: Reply) -> Mapping[str, Any] | None:
    if reply.headers.get("content-type", "").partition(";")[0].strip().lower() != PROBLEM:
        return None
    try:
        found = _json(reply)
    except BadAnswer:
        return None
    return found if isinstance(found, Mapping) and isinstance(found.get("code"), str) else None


def _shown(text: Any) -> str:
    return _UNPRINTABLE.sub(" ", text)[:SHOWN] if isinstance(text, str) else ""


def _retry_after(text: str) -> float | None:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        return None
    return min(float(text), LONGEST_RETRY_AFTER)


def _json(reply: Reply) -> Any:
    try:
        return json.loads(reply.content)
    except (ValueError, RecursionError):
        raise BadAnswer(
            f"status {reply.status}, and the body is not JSON", fix="check the address of the API"
        ) from None


class EventReader:
    """Reads the server-sent events of a run: `run` is its last state, `last_id` the place to resume at."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.last_id = ""
        # Events that were read.
        self.count = 0
        self._line = bytearray()
        self._fields: dict[bytes, bytes] = {}
        self._size = 0

    def begin(self) -> None:
        """Forget what is left of the stream before."""
        self._line.clear()
        self._fields, self._size = {}, 0

    def feed(self, chunk: bytes) -> bool:
        """Take bytes; whether the run has ended. Raises BadAnswer."""
        self._size += len(chunk)
        if self._size > EVENT_LIMIT:
            raise BadAnswer("an event of the run is too large", fix="check the address of the API")
        self._line += chunk
        if b"\n" in chunk:
            *lines, rest = self._line.split(b"\n")
            self._line = bytearray(rest)
            for line in lines:
                self._take(bytes(line).rstrip(b"\r"))
        return self.run is not None and self.run.has_ended

    def _take(self, line: bytes) -> None:
        if line:
            name, _, value = line.partition(b":")
            self._fields[name] = value.removeprefix(b" ")
            return
        fields, self._fields, self._size = self._fields, {}, len(self._line)
        id_ = fields.get(b"id", b"").decode(errors="replace")
        if id_.isascii() and id_.isprintable() and 0 < len(id_) <= MAX_NAME:
            self.last_id = id_
        if fields.get(b"event") == b"state":
            self.run = run_of(_json(Reply(200, {}, fields.get(b"data", b""))))
        self.count += 1
