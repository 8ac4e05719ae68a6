"""Steps: which calls of a run have a stored result, and which are being made. Pure: no I/O and no clock."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from worker.handlers.json_text import NotStorable, to_json_text
from worker.model.prices import ModelUsage
from worker.model.runs.run import StepPage, step_label

# Bytes of the JSON text of one result and of all results of a run, and steps of a run.
RESULT_LIMIT = 256 * 1024
TOTAL_LIMIT = 64 * 1024 * 1024
MAX_STEPS = 10_000
NAME_LIMIT = 200

_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_.:/-]{{0,{NAME_LIMIT - 1}}}")
_TELL_APART = "pass key= to tell the calls apart"


class StepError(Exception):
    """A step, wait or spend was used wrongly, or reached a limit: the run has failed, without a retry."""


def check_name(what: str, name: Any) -> str:
    """The name of a step, wait or meter; raises StepError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        shown = repr(name[:50]) if isinstance(name, str) else f"a {type(name).__name__}"
        raise StepError(
            f"{what}: {shown} is not a name: use 1 to {NAME_LIMIT} letters, digits and _ . : / -, "
            "beginning with a letter or digit"
        )
    return name


def check_key(what: str, key: Any) -> str:
    """The key of a step as text; an integer is written in digits. Raises StepError."""
    text = str(key) if isinstance(key, int) else key
    if not isinstance(text, str):
        raise StepError(f"{what}: key= is text or an integer, not a {type(key).__name__}")
    if not 0 < len(text) <= NAME_LIMIT or not text.isprintable():
        raise StepError(f"{what}: key= is 1 to {NAME_LIMIT} printable characters; hash a longer one")
    return text


def digest_of(what: str, item: Any) -> str:
    """The key of an item without one: equal for equal JSON. Raises StepError if it is not JSON."""
    try:
        value = json.loads(to_json_text(item, "item"))
    except NotStorable as error:
        raise StepError(f"{what}: {error}; {_TELL_APART}") from None
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:40]}"


@dataclass(frozen=True, slots=True)
class StepId:
    """What identifies a step in its run."""

    name: str
    key: str | None
    occurrence: int

    def __str__(self) -> str:
        return step_label(self.name, self.key, self.occurrence)


@dataclass(eq=False, slots=True)
class StepNotes:
    """What a step's function says for its span, as `StepSpan` has it; `texts` is None if unwanted."""

    texts: dict[str, str] | None
    about: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def clear(self) -> None:
        self.about, self.error = {}, None
        self.texts = None if self.texts is None else {}


@dataclass(eq=False, slots=True)
class OpenStep:
    """A step whose function is being called or whose result is being stored.

    `spends` and `used` are stored with its result; `requests` counts its requests, from 1 at each try,
    `begun` those of all tries. `placed` once its result has a place among the steps of the run. `notes` if it
    has a span.
    """

    id: StepId
    spends: list[tuple[str, int]] = field(default_factory=list)
    used: list[ModelUsage] = field(default_factory=list)
    requests: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    begun: int = 0
    closed: bool = False
    placed: bool = False
    notes: StepNotes | None = None

    def begin_try(self) -> None:
        """Forget what a failed try did: only the last one counts."""
        self.spends.clear()
        self.used.clear()
        if self.notes is not None:
            self.notes.clear()
        self.requests = itertools.count(1)


_OPEN: ContextVar[OpenStep | None] = ContextVar("OPEN_STEP", default=None)


def open_step() -> OpenStep | None:
    """The step that the current task or thread is inside of."""
    step = _OPEN.get()
    return None if step is None or step.closed else step


def request_key(run_key: str, step: OpenStep) -> str:
    """The idempotency key of the next request inside a step: the same whenever the step is tried again.

    The first 32 hexadecimal digits of SHA-256 over run key, name, key, occurrence and number, in lines.
    """
    number = next(step.requests)
    step.begun += 1
    parts = (run_key, step.id.name, step.id.key or "", str(step.id.occurrence), str(number))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


class Occurrences:
    """Counts the uses of each name and key of a run. Thread-safe.

    Two tasks that use one name would get its numbers in an order that differs between attempts, so
    the second one must pass a key.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used: dict[tuple[str, str | None], tuple[int, object]] = {}

    def take(self, what: str, name: str, key: str | None = None) -> int:
        """The next occurrence, from 1, for the current task or thread; raises StepError."""
        caller = _caller()
        with self._lock:
            used, owner = self._used.get((name, key), (0, caller))
            if owner is not caller:
                if key is None:
                    raise StepError(f"{what} {name} is used by two tasks: {_TELL_APART}")
                raise StepError(f"{what} {name}: two tasks use the key {key!r}; use one for each call")
            self._used[name, key] = (used + 1, caller)
        return used + 1


def _caller() -> object:
    with suppress(RuntimeError):  # a thread without a loop
        if (task := asyncio.current_task()) is not None:
            return task
    return threading.current_thread()


class StepJournal:
    """The steps of one attempt: stored results, occurrences, and those in flight. Thread-safe.

    With `replays` earlier attempts may have stored steps: their pages are added until `complete`.
    """

    def __init__(self, *, replays: bool) -> None:
        self.complete = not replays
        self.in_flight = 0
        self._lock = threading.Lock()
        self._occurrences = Occurrences()
        self._stored: dict[StepId, str] = {}
        # The greatest `seq` known so far: the next page begins after it.
        self.last = 0
        self._size = self._unplaced = 0
        self._on_idle: list[Callable[[], None]] = []
        self._closed: type[BaseException] | None = None

    def add(self, page: StepPage) -> None:
        """Add the next page of stored steps."""
        with self._lock:
            for step in page.steps:
                # If a result is stored twice under one id, the first is what the handler has seen.
                self._stored.setdefault(StepId(step.name, step.key, step.occurrence), step.result_json)
                self.last = max(self.last, step.seq)
                self._size += step.size
            self.complete = not page.more

    def take(self, name: str, key: str | None = None) -> StepId:
        """The id of the next use of a name and key; raises StepError."""
        return StepId(name, key, self._occurrences.take("step", name, key))

    def take_item(self, name: str, digest: str) -> StepId:
        """The id of an item without a key: its position and what it is."""
        return StepId(name, digest, self._occurrences.take("step", name))

    def replayed(self, step: StepId) -> str | None:
        """The stored result as JSON text, once; None if it is not among the pages read so far."""
        return self._stored.pop(step, None)

    @contextmanager
    def open(self, step: StepId) -> Iterator[OpenStep]:
        """The step is in flight, and the current task or thread inside of it; raises StepError."""
        self.refuse_inside(f"step {step.name}")
        if self._closed is not None:
            raise self._closed("the attempt is parked")
        with self._lock:
            if self.last + self._unplaced >= MAX_STEPS:
                raise StepError(f"step {step}: the run has {MAX_STEPS:,} steps, the limit; split the work")
            if self._size >= TOTAL_LIMIT:
                raise StepError(f"step {step}: {TOTAL_FULL}")
            self._unplaced += 1
        with self.busy():
            opened = OpenStep(step)
            token = _OPEN.set(opened)
            try:
                yield opened
            finally:
                opened.closed = True
                _OPEN.reset(token)
                if not opened.placed:
                    with self._lock:
                        self._unplaced -= 1

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Count as one more in flight: the attempt does not park meanwhile."""
        with self._lock:
            self.in_flight += 1
        try:
            yield
        finally:
            with self._lock:
                self.in_flight -= 1
                idle = self.in_flight == 0
            if idle:
                for callback in list(self._on_idle):
                    callback()

    def on_idle(self, callback: Callable[[], None]) -> None:
        """Call this each time that no step is in flight any more, in the task or thread of the last one."""
        self._on_idle.append(callback)

    def close(self, error: type[BaseException]) -> None:
        """The attempt is parked: no step begins any more, but raises this."""
        self._closed = error

    def place(self, opened: OpenStep, size: int) -> int:
        """The place of a result of `size` bytes among the steps of the run."""
        with self._lock:
            opened.placed = True
            self._unplaced -= 1
            self.last += 1
            self._size += size
            return self.last

    def refuse_inside(self, what: str) -> None:
        """Raise StepError if the current task or thread is inside a step."""
        if (step := open_step()) is not None:
            raise StepError(f"{what} is used inside step {step.id}: use it before or after that step")


TOTAL_FULL = (
    f"the results of the run's steps reach {TOTAL_LIMIT // 1024 // 1024} MiB, the limit; "
    "store large results elsewhere and return where"
)
