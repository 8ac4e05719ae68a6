"""Runner contract: the work handed to a runner, the way back to the worker, and how to stop a run."""

from __future__ import annotations

import asyncio
import contextvars
import sys
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, Literal, Protocol, TypeVar

from worker.claims.claims import AccessToken, Claims
from worker.errors import Unavailable
from worker.ids import RunId
from worker.runs.outcome import Cancelled, Error, HandedBack, Lost, Outcome, TimedOut
from worker.runs.run import Isolation

StopReason = Literal["drain", "cancel", "timeout", "suspended", "replaced", "closed"]


@dataclass(slots=True)
class Work:
    """All that a handler needs for one attempt; nothing of another org. Never changed.

    `entry_point` is `module:attribute`, `timeout_at` the instant of the run's
    deadline, `memory` a cap in bytes, `checkpoint` what the last attempt saved,
    `traceparent` the handler's place in its run's trace, where there is one. The
    origins are those of the settings of the same names.
    """

    run_id: RunId
    attempt: int
    fencing_token: int
    idempotency_key: str
    scheduled_for: datetime
    org_code: str
    org_name: str
    definition: str
    handler: str
    entry_point: str
    params: Mapping[str, Any]
    claims: Claims = field(repr=False)
    token: AccessToken = field(repr=False)
    api_origins: tuple[str, ...]
    timeout_at: datetime
    checkpoint: Any = field(default=None, repr=False)
    memory: int | None = None
    isolation: Isolation = "child"
    traceparent: str | None = None
    private_origins: tuple[str, ...] = ()
    insecure_origins: tuple[str, ...] = ()


class RunServices(Protocol):
    """What a running handler may ask of the worker, for its own run and org only.

    Called on the worker's loop. Texts come from the handler: the worker masks them.
    """

    async def save(self, data_json: str) -> None:
        """Store a checkpoint, fenced and durable; raises LeaseLost."""
        ...

    async def token(self, *, fresh: bool) -> tuple[AccessToken, Claims]:
        """A token with some life left, minted anew if `fresh`; raises TokenError, Unavailable."""
        ...

    def progress(self, done: float, total: float | None, note: str | None) -> None:
        """The newest progress; may be called often."""
        ...

    def log(self, level: str, source: str, text: str, at: datetime | None = None) -> None:
        """A line of the run's log; `source` is log, stdout or stderr, `at` when not now."""
        ...

    def started(self) -> None:
        """Params and settings are valid, the handler is being called."""
        ...

    def used(self, peak_memory: int) -> None:
        """The most memory that the run's process had, in bytes."""
        ...


class Runner(Protocol):
    """Where handlers run: in child processes, or inline in the worker's loop."""

    async def run(self, work: Work, link: RunServices, stop: StopSignal) -> Outcome:
        """Run the handler to its end; when this returns nothing of it is left running."""
        ...


async def save_for_sure(link: RunServices, data_json: str) -> None:
    """Store a checkpoint, however long the database is away; raises LeaseLost.

    A handler that has waited so long for its save must not fail for that. Where the
    lease is not renewed meanwhile, the run stands frozen anyway.
    """
    pause = 0.1
    while True:
        try:
            return await link.save(data_json)
        except Unavailable:
            await asyncio.sleep(pause)
            pause = min(pause * 2, 2.0)


class StopSignal:
    """The way to end one attempt early, in the hands of whoever started it.

    Made and used on the worker's loop. The first reason stays; a later request can
    only shorten the grace. `interrupt_at` and `kill_at` are on the loop's clock.
    """

    def __init__(self) -> None:
        self.reason: StopReason | None = None
        self.grace = 0.0
        self.interrupt_at = self.kill_at = float("inf")
        self.asked = self.killed = False
        self._killer: Callable[[], None] | None = None
        self._listener: Callable[[], None] | None = None
        self._frozen_since: float | None = None
        self._frozen = 0.0

    @cached_property
    def requested(self) -> asyncio.Event:
        """Set at the first request or kill; made for those who wait, which of most runs nobody does."""
        event = asyncio.Event()
        if self.asked:
            event.set()
        return event

    @cached_property
    def _changed(self) -> asyncio.Event:
        return asyncio.Event()

    def request(self, reason: StopReason, grace: float) -> None:
        """Ask the handler to end: told at once, interrupted at half of `grace` seconds, then killed."""
        now = asyncio.get_running_loop().time()
        self.reason = self.reason or reason
        if now + grace < self.kill_at:
            self.grace = grace
            self.kill_at = now + grace
            self.interrupt_at = min(self.interrupt_at, now + grace / 2)
        self._request()

    def kill(self) -> None:
        """End it now without a word: the lease is lost, and the caller drops the outcome."""
        self.killed = True
        self.kill_at = self.interrupt_at = float("-inf")
        if self._killer is not None:
            self._killer()
        self._request()

    def on_request(self, listener: Callable[[], None] | None) -> None:
        """Call `listener` at the first request or kill, at once if that has come; None ends it.

        One at a time: for what every run goes through, where a task that waits would cost more than the work.
        """
        self._listener = listener
        if listener is not None and self.asked:
            listener()

    def on_kill(self, killer: Callable[[], None]) -> None:
        """Call `killer` as soon as it comes to `kill`, before anything can thaw the run."""
        self._killer = killer
        if self.killed:
            killer()

    def _request(self) -> None:
        first, self.asked = not self.asked, True
        self.requested.set()
        self._changed.set()
        if first and self._listener is not None:
            self._listener()

    async def changed(self, until: float = float("inf")) -> None:
        """Return at the next request or kill, or when the loop's clock reaches `until`."""
        delay = until - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(None if delay == float("inf") else max(delay, 0)):
                await self._changed.wait()
        except TimeoutError:
            return
        self._changed.clear()

    def freeze(self, at: float) -> None:
        """The run stands still since `at` (monotonic), because the lease is not renewed."""
        self._frozen_since = self._frozen_since or at

    def thaw(self, at: float) -> None:
        """The run goes on since `at` (monotonic)."""
        if self._frozen_since is not None:
            self._frozen += max(at - self._frozen_since, 0.0)
            self._frozen_since = None

    def frozen_seconds(self, now: float) -> float:
        """How long the run has stood still up to `now`; that time does not count against its timeout."""
        standing = 0.0 if self._frozen_since is None else max(now - self._frozen_since, 0.0)
        return self._frozen + standing


def stopped(stop: StopSignal) -> Outcome:
    """The outcome that a stop's reason means."""
    match stop.reason:
        case None:
            return Lost("no longer ours")
        case "timeout":
            return TimedOut(Error("TimeoutError", "the run's timeout passed before its handler returned"))
        case "drain":
            return HandedBack()
        case "cancel":
            return Cancelled("requested")
        case reason:
            return Cancelled(reason)


T = TypeVar("T")

_EAGER: dict[str, Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}


def begin(
    work: Coroutine[Any, Any, T],
    *,
    loop: asyncio.AbstractEventLoop,
    name: str | None = None,
    context: contextvars.Context | None = None,
) -> asyncio.Task[T]:
    """A task that may be done when this returns: most attempts find all that they need at hand.

    Each round through the loop that is saved so is a tenth of an inline run. Python 3.11
    schedules the first step as it does every other.
    """
    return asyncio.Task(work, loop=loop, name=name, context=context, **_EAGER)
