"""Handlers in the worker's own process: async ones as tasks; in trials, blocking ones in threads."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from worker.clock import Clock
from worker.engine.runners.child.messages import hidden
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
from worker.engine.runners.egress import BrokeredAttempt, EgressBroker, unless_starved
from worker.engine.runners.output import RunLogger
from worker.handlers.blocking import DaemonThread
from worker.handlers.blocking_context import BlockingContext, close_blocking_http
from worker.handlers.calling import call, call_blocking, outcome_of_error
from worker.handlers.calls import A, AskToken, Call, OneWayCall, Port
from worker.handlers.context import Context, close_http, used_clients
from worker.handlers.given import BlockingCancellation, Cancellation, Connect, Given
from worker.handlers.job import Job
from worker.handlers.models import load
from worker.model.runs.outcome import Failed, Outcome, Parked
from worker.telemetry.events import emit

T = TypeVar("T")
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
        attempt, cancelled = _Attempt(work, services, stop, self.clock, self.broker), Cancellation()
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
            services.close()
            attempt.close()
            if not task.done():
                self._abandon(task)
        return unless_starved(attempt.outcome(task), attempt.brokered)

    async def _body(
        self, work: Work, services: RunServices, cancelled: Cancellation, attempt: _Attempt
    ) -> Outcome:
        _RUN.set(work)
        try:
            job = self._job(work.entry_point)
            connect = None if attempt.brokered is None else attempt.brokered.connect
            given, port = attempt.given(job, services, connect)
            ctx = Context(given, port, cancelled, self.transports(given), attempt.park)
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
    broker: EgressBroker | None = None

    async def run(self, work: Work, services: RunServices, stop: StopSignal) -> Outcome:
        """Run the handler in a thread; its calls to the worker are answered on this loop."""
        attempt, cancelled = _Attempt(work, services, stop, self.clock, self.broker), BlockingCancellation()
        port = _ThreadPort(services, attempt.loop)
        ended = attempt.loop.run_in_executor(DaemonThread(), self._body, work, port, cancelled, attempt)
        try:
            await attempt.wait(ended, cancelled, port.interrupt)
            if attempt.brokered is not None:
                await attempt.brokered.end()
        finally:
            port.close()
            attempt.close()
            ended.cancel()
        return attempt.outcome(ended)

    def _body(
        self, work: Work, port: _ThreadPort, cancelled: BlockingCancellation, attempt: _Attempt
    ) -> Outcome:
        try:
            job = self.find(work.entry_point)
            brokered = attempt.brokered
            connect = None if brokered is None else partial(port.call, brokered.connect)
            given, asked = attempt.given(job, port, connect)
            ctx = BlockingContext(given, asked, cancelled, self.transports(given), attempt.park)
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
        return self._result(lambda: self._services.ask(call))

    def call(self, function: Callable[[], T]) -> T:
        """What a function returns on the loop."""

        async def called() -> T:
            return function()

        return self._result(called)

    def _result(self, begin: Callable[[], Coroutine[Any, Any, T]]) -> T:
        with self._lock:
            self._check()
            waiting = asyncio.run_coroutine_threadsafe(begin(), self._loop)
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


class _HidingPort:
    """What a handler asks, with a token as a sealed run gets it."""

    def __init__(self, port: Port, work: Work) -> None:
        self._port = port
        self._work = work

    async def ask(self, call: Call[A]) -> A:
        given: Any = await self._port.ask(call)
        if isinstance(call, AskToken):
            given = hidden(self._work, given[0], call), given[1]
        return given  # type: ignore[no-any-return]

    def tell(self, notice: OneWayCall) -> None:
        self._port.tell(notice)


class _Attempt:
    """One run in this process: its log, its requests, and how it ends or parks."""

    def __init__(
        self,
        work: Work,
        services: RunServices,
        stop: StopSignal,
        clock: Clock,
        broker: EgressBroker | None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.log = RunLogger(work.handler, services.log, clock, self.loop)
        self._work = work
        self._clock = clock
        self._errors = services.errors
        self._stop = stop
        self._parked: Parked | None = None
        self._over: asyncio.Future[None] | None = None
        self._last_steps: asyncio.TimerHandle | None = None
        self.brokered: BrokeredAttempt | None = None
        if broker is not None:
            self.brokered = broker.serve(work, services)
            stop.on_kill(self.brokered.stop)

    def given(self, job: Job, port: Port, connect: Connect | None) -> tuple[Given[Any, Any], Port]:
        """What the handler's context is made of; `connect` leads to the broker. Raises as `Work.given`.

        What a sealed run would have a placeholder for has one here too.
        """
        work = self._work
        if connect is not None and not work.egress.is_open:
            work, port = replace(work, token=hidden(work, work.token)), _HidingPort(port, work)
        given = work.given(job, self.log, self._clock)
        given.connect = connect
        return given, port

    def close(self) -> None:
        """Close its log, and drop what the broker has of it."""
        if self.brokered is not None:
            self.brokered.drop()
        self.log.close()

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
