"""Handlers in the worker's own process: async ones as tasks; in trials, blocking ones in threads."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any

from worker.clock import Clock
from worker.engine.runners.contract import (
    LEASE_LOST,
    Interrupted,
    RunServices,
    StopSignal,
    Work,
    after_handler,
    after_stop,
    handler_exited,
    outcome_of_stop,
    start_task,
)
from worker.engine.runners.egress import BrokeredAttempt, EgressBroker
from worker.engine.runners.output import RunOutput, Sink, marked
from worker.handlers.blocking import DaemonThread
from worker.handlers.calling import call, call_blocking, outcome_of_error
from worker.handlers.calls import A, Call, OneWayCall
from worker.handlers.context import (
    BlockingContext,
    Context,
    close_blocking_http,
    close_http,
    used_clients,
)
from worker.handlers.given import BlockingCancellation, Cancellation, Given
from worker.handlers.job import Job
from worker.handlers.models import load
from worker.model.runs.outcome import Failed, Outcome, Parked
from worker.telemetry.events import emit

# Seconds without an iteration of the loop before it counts as blocked, and between two checks.
PATIENCE = 1.0
TICK = 0.25
# Seconds between cancellations of a handler that swallows them after its grace.
NAG = 1.0
# Seconds that a handler may take to unwind after its last cancellation.
LAST_STEPS = 1.0


# The run that a context belongs to, also the context of tasks that the handler starts.
_RUN: contextvars.ContextVar[Work] = contextvars.ContextVar("RUN")
# The watched loops, each with the time of its last tick.
_ticked_at: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, float] = weakref.WeakKeyDictionary()


def watch_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Emit `loop.blocked` each time the running loop is blocked for longer than `PATIENCE`; idempotent."""
    if loop not in _ticked_at:
        _tick(loop)
        arguments = (loop, threading.get_ident())
        threading.Thread(target=_watch, args=arguments, name="loop watch", daemon=True).start()


def _tick(loop: asyncio.AbstractEventLoop) -> None:
    _ticked_at[loop] = time.monotonic()
    loop.call_later(TICK, _tick, loop)


def _watch(loop: asyncio.AbstractEventLoop, thread: int) -> None:
    reported_at = 0.0
    while not loop.is_closed():
        began, used = time.monotonic(), time.process_time()
        time.sleep(TICK)
        now, ticked_at = time.monotonic(), _ticked_at[loop]
        # If the whole process was stopped, no handler is to blame.
        stopped = now - began > 2 * TICK and time.process_time() - used < (now - began) / 2
        if now - ticked_at > PATIENCE and ticked_at != reported_at and not stopped:
            reported_at = ticked_at
            frame = sys._current_frames().get(thread)
            where = None
            if frame is not None:
                where = f"{frame.f_code.co_qualname} ({frame.f_code.co_filename}:{frame.f_lineno})"
            emit(
                "loop.blocked",
                **_run_of(asyncio.current_task(loop)),
                where=where,
                seconds=round(now - ticked_at, 1),
            )


def _run_of(task: asyncio.Task[Any] | None) -> dict[str, str | int]:
    # `Task.get_context` is new in Python 3.12.
    referents = [] if task is None else gc.get_referents(task)
    context = next((each for each in referents if isinstance(each, contextvars.Context)), None)
    work = None if context is None else context.get(_RUN)
    if work is None:
        return {}
    return {"org": work.org_code, "run": work.run_id, "attempt": work.attempt, "handler": work.handler}


# The transports of a context's HTTP clients, by name.
Transports = Callable[[Given[Any, Any]], Mapping[str, Any]]


@dataclass(eq=False, repr=False)
class Inline:
    """A task for each run. One that swallows its cancellation past the grace is abandoned.

    The worker rejects its calls then, and keeps cancelling it. Trials replace `find` and `transports`.
    """

    clock: Clock
    find: Callable[[str], Job] = load
    transports: Transports = lambda given: {}
    watched: bool = True
    broker: EgressBroker | None = None
    _abandoned: set[asyncio.Task[None]] = field(default_factory=set)
    # Looking up a module that is already imported costs more than calling the handler.
    _jobs: dict[str, Job] = field(default_factory=dict)
    # The watched loop.
    _loop: asyncio.AbstractEventLoop | None = None

    async def run(self, work: Work, services: RunServices, stop: StopSignal) -> Outcome:
        """Run the handler as a task of this loop."""
        attempt, cancelled = _Attempt(work, services, stop, self.clock), Cancellation()
        if self.broker is not None:
            attempt.brokered = self.broker.serve(work, services)
            stop.on_kill(attempt.brokered.stop)
        if self.watched and attempt.loop is not self._loop:
            self._loop = attempt.loop
            watch_loop(attempt.loop)
        body = self._body(work, services, cancelled, attempt)
        task = start_task(body, name=work.handler, context=contextvars.Context())
        try:
            if not task.done():
                await attempt.wait(task, cancelled, task.cancel)
            if attempt.brokered is not None:
                await attempt.brokered.end()
        finally:
            if attempt.brokered is not None:
                attempt.brokered.drop()
            services.close()
            attempt.log.close()
            if not task.done():
                self._abandon(task)
        return attempt.outcome(task)

    async def _body(
        self, work: Work, services: RunServices, cancelled: Cancellation, attempt: _Attempt
    ) -> Outcome:
        _RUN.set(work)
        try:
            job = self._job(work.entry_point)
            given = work.given(job, attempt.log, self.clock)
            given.connect = None if attempt.brokered is None else attempt.brokered.connect
            ctx = Context(given, services, cancelled, self.transports(given), attempt.park)
            services.started()
            try:
                return await call(job, ctx)
            finally:
                if used_clients(ctx):
                    await close_http(ctx)
        except BaseException as error:
            return _outcome_of(error)

    def _job(self, entry_point: str) -> Job:
        job = self._jobs.get(entry_point)
        if job is None:
            job = self._jobs[entry_point] = self.find(entry_point)
        return job

    def _abandon(self, task: asyncio.Task[Outcome]) -> None:
        async def nag() -> None:
            while not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=NAG)

        nagging = asyncio.create_task(nag())
        self._abandoned.add(nagging)
        nagging.add_done_callback(self._abandoned.discard)


@dataclass(eq=False, repr=False)
class Blocking:
    """A daemon thread for each blocking handler, so that a debugger or a test can reach it; trials only.

    At half the grace the next call of `ctx` raises Interrupted; at its end a running handler is abandoned.
    """

    clock: Clock
    find: Callable[[str], Job] = load
    transports: Transports = lambda given: {}

    async def run(self, work: Work, services: RunServices, stop: StopSignal) -> Outcome:
        """Run the handler in a thread; its calls to the worker are answered on this loop."""
        attempt, cancelled = _Attempt(work, services, stop, self.clock), BlockingCancellation()
        port = _ThreadPort(services, attempt.loop)
        ended = attempt.loop.run_in_executor(DaemonThread(), self._body, work, port, cancelled, attempt)
        try:
            await attempt.wait(ended, cancelled, port.interrupt)
        finally:
            port.close()
            attempt.log.close()
            ended.cancel()
        return attempt.outcome(ended)

    def _body(
        self, work: Work, port: _ThreadPort, cancelled: BlockingCancellation, attempt: _Attempt
    ) -> Outcome:
        try:
            job = self.find(work.entry_point)
            given = work.given(job, attempt.log, self.clock)
            ctx = BlockingContext(given, port, cancelled, self.transports(given), attempt.park)
            port.started()
            try:
                return call_blocking(job, ctx)
            finally:
                close_blocking_http(ctx)
        except BaseException as error:
            return _outcome_of(error)


class _ThreadPort:
    """The port of a handler in a thread of its own."""

    def __init__(self, services: RunServices, loop: asyncio.AbstractEventLoop) -> None:
        self._services = services
        self._loop = loop
        self._lock = threading.Lock()
        self._interrupted = self._closed = False
        self._waiting: set[Future[Any]] = set()

    async def ask(self, call: Call[A]) -> A:
        """The answer; blocks this thread until the loop has it."""
        with self._lock:
            self._check()
            waiting = asyncio.run_coroutine_threadsafe(self._services.ask(call), self._loop)
            self._waiting.add(waiting)
        try:
            return waiting.result()
        except CancelledError:
            raise Interrupted("the run is being stopped") from None
        finally:
            with self._lock:
                self._waiting.discard(waiting)

    def tell(self, notice: OneWayCall) -> None:
        self._send(self._services.tell, notice)

    def started(self) -> None:
        self._send(self._services.started)

    def interrupt(self) -> None:
        """Raise Interrupted in the calls that wait, or else in the next one."""
        with self._lock:
            interrupted = [waiting for waiting in self._waiting if waiting.cancel()]
            self._interrupted = not interrupted

    def close(self) -> None:
        """Raise Interrupted in every further call: the run has ended."""
        self._closed = True
        self.interrupt()

    def _send(self, callback: Callable[..., None], *args: object) -> None:
        with self._lock:
            self._check()
            self._loop.call_soon_threadsafe(callback, *args)

    def _check(self) -> None:
        if self._interrupted or self._closed:
            self._interrupted = False
            raise Interrupted("the run is being stopped")


class _Attempt:
    """One run in this process: its log, and how it ends or parks."""

    def __init__(self, work: Work, services: RunServices, stop: StopSignal, clock: Clock) -> None:
        self.loop = asyncio.get_running_loop()
        self.log = RunLogger(work.handler, services.log, clock, self.loop)
        self._errors = services.errors
        self._stop = stop
        self._parked: Parked | None = None
        self._over: asyncio.Future[None] | None = None
        self._last_steps: asyncio.TimerHandle | None = None
        self.brokered: BrokeredAttempt | None = None

    def park(self, outcome: Parked) -> None:
        """Take the outcome, from any thread. The handler has `LAST_STEPS` seconds to end."""
        self._parked = outcome
        self.loop.call_soon_threadsafe(self._end_soon)

    async def wait(
        self,
        ended: asyncio.Future[Outcome],
        cancelled: Cancellation | BlockingCancellation,
        interrupt: Callable[[], object],
    ) -> None:
        """Wait for the handler's end. After a stop wait for its grace, then interrupt it a last time."""
        self._over = self.loop.create_future()
        stopping: list[asyncio.Task[None]] = []

        def begin_to_stop() -> None:
            stopping.append(self.loop.create_task(self._stop.escalate(cancelled.set, interrupt)))
            stopping[0].add_done_callback(self._finish)

        ended.add_done_callback(self._finish)
        # A task that waits for a stop would cost each run more than everything else here.
        self._stop.on_request(begin_to_stop)
        try:
            await self._over
            if not ended.done():
                interrupt()
                await asyncio.wait({ended}, timeout=LAST_STEPS)
        finally:
            self._stop.on_request(None)
            for pending in (*stopping, self._last_steps):
                if pending is not None:
                    pending.cancel()

    def outcome(self, ended: asyncio.Future[Outcome]) -> Outcome:
        """The outcome once the wait for the handler is over."""
        if self._stop.killed:
            return LEASE_LOST
        if self._parked is not None:
            return after_handler(self._parked, self._stop, self._errors)
        if not ended.done() or ended.cancelled():
            return outcome_of_stop(self._stop)
        outcome = ended.result()
        if isinstance(outcome, Failed) and outcome.reason == "handler_exited":  # from `_outcome_of`
            return after_stop(outcome, self._stop)
        return after_handler(outcome, self._stop, self._errors)

    def _end_soon(self) -> None:
        if self._over is not None and not self._over.done():
            self._last_steps = self.loop.call_later(LAST_STEPS, self._finish)

    def _finish(self, _: object = None) -> None:
        if self._over is not None and not self._over.done():
            self._over.set_result(None)


def _outcome_of(error: BaseException) -> Outcome:
    if not isinstance(error, SystemExit):
        return outcome_of_error(error)
    # It would end the worker.
    code = error.code if isinstance(error.code, int) else int(error.code is not None)
    return handler_exited(f"exit code {code}")


# Formats records, and reports on stderr those that cannot be formatted.
_FORMATTER = logging.Handler()


class RunLogger(logging.Logger):
    """`ctx.log`, outside logging's own hierarchy, because its records belong to one run. Thread-safe.

    It handles records itself: a handler for each run would cost more than the run.
    """

    # What `logging.Logger` sets: most runs log nothing, and its constructor takes longer than a handler.
    parent = None
    propagate = True
    disabled = False
    _output: RunOutput | None = None
    _closed = False

    def __init__(self, name: str, sink: Sink, clock: Clock, loop: asyncio.AbstractEventLoop) -> None:
        self.name = name
        self.level = logging.INFO
        self._sink = sink
        self._clock = clock
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        if name not in ("filters", "handlers", "_cache"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        self.filters, self.handlers = [], []
        self._cache: dict[int, bool] = {}
        return self.__dict__[name]

    def close(self) -> None:
        """Pass on what the run logged last; drop what it logs from now on."""
        self._closed = True
        if self._output is not None:
            self._output.close()

    def callHandlers(self, record: logging.LogRecord) -> None:
        try:
            line = marked(record.levelname.lower(), _FORMATTER.format(record))
            if asyncio._get_running_loop() is self._loop:
                self._feed(line)
            else:
                self._loop.call_soon_threadsafe(self._feed, line)
        except Exception:
            _FORMATTER.handleError(record)
        for handler in self.handlers:
            handler.handle(record)

    def _feed(self, line: bytes) -> None:
        if self._closed:
            return
        if self._output is None:
            self._output = RunOutput(self._sink, self._clock)
        self._output.feed("stderr", line)
