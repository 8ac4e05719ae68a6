"""Inline: the runner for async handlers that the operator lets run in the worker's own loop."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

from worker.claims.claims import AccessToken, Claims
from worker.clock import Clock
from worker.errors import LeaseLost
from worker.execution.runners.context_factory import given_for
from worker.execution.runners.contract import RunServices, StopSignal, Work, begin, save_for_sure, stopped
from worker.execution.runners.exit_status import after_stop, exited
from worker.execution.runners.output import RunOutput, Sink, marked
from worker.handlers.calling import call, outcome_of_error
from worker.handlers.context import (
    BlockingCancellation,
    Cancellation,
    Context,
    Given,
    WorkerPort,
    close_http,
)
from worker.handlers.job import Job
from worker.handlers.models import load
from worker.runs.outcome import Lost, Outcome
from worker.telemetry.events import emit

# Seconds for which a loop may not come round, and between two looks.
PATIENCE = 1.0
TICK = 0.25


class ThisRun(NamedTuple):
    """Whose code a context belongs to; also that of tasks which the handler has started."""

    org: str
    run: str
    attempt: int
    handler: str


_watched: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()

THIS_RUN: contextvars.ContextVar[ThisRun] = contextvars.ContextVar("THIS_RUN")


class LoopWatch:
    """One event for each time that the loop stands still for longer than `PATIENCE`."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ticked_at = 0.0

    def start(self) -> None:
        """Watch the running loop until it is closed; called again it does nothing."""
        if self._loop is not None:
            return
        self._loop = loop = asyncio.get_running_loop()
        if loop in _watched:  # by an earlier incarnation of this worker
            return
        _watched.add(loop)
        self._tick(loop)
        arguments = (loop, threading.get_ident())
        threading.Thread(target=self._watch, args=arguments, name="loop watch", daemon=True).start()

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._ticked_at = time.monotonic()
        loop.call_later(TICK, self._tick, loop)

    def _watch(self, loop: asyncio.AbstractEventLoop, thread: int) -> None:
        told_of = 0.0
        while not loop.is_closed():
            began, used = time.monotonic(), time.process_time()
            time.sleep(TICK)
            now, ticked_at = time.monotonic(), self._ticked_at
            # Where this process itself was stopped, nobody in it is to blame.
            stopped = now - began > 2 * TICK and time.process_time() - used < (now - began) / 2
            if now - ticked_at > PATIENCE and ticked_at != told_of and not stopped:
                told_of = ticked_at
                frame = sys._current_frames().get(thread)
                run = _run_of(asyncio.current_task(loop))
                emit(
                    "loop.blocked",
                    **({} if run is None else run._asdict()),
                    where=None if frame is None else _place(frame),
                    seconds=round(now - ticked_at, 1),
                )


def _run_of(task: asyncio.Task[Any] | None) -> ThisRun | None:
    # `Task.get_context` came with Python 3.12.
    held = [] if task is None else gc.get_referents(task)
    context = next((each for each in held if isinstance(each, contextvars.Context)), None)
    return None if context is None else context.get(THIS_RUN)


def _place(frame: FrameType) -> str:
    code = frame.f_code
    return f"{code.co_qualname} ({code.co_filename}:{frame.f_lineno})"


# Seconds between cancellations of a handler that swallows them after its grace.
NAG = 1.0
# Seconds that a handler may take to unwind once it is cancelled for the last time.
LAST_STEPS = 1.0

# Formats records, and says on stderr which could not be formatted.
_FAULTS = logging.Handler()


class Inline:
    """A task for each run, with context variables of its own; only as well-behaved as its handler.

    A task cannot be killed. One that swallows its cancellation past the grace is given
    up: its line to the worker is cut, and it is cancelled again and again.

    What a trial gives in place of the usual: `find` makes an entry point its handler,
    `context` makes what that is called with; not `watched`, it may block the loop.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        find: Callable[[str], Job] = load,
        context: Callable[[Given[Any, Any], WorkerPort, Cancellation], Context[Any, Any]] = Context,
        watched: bool = True,
    ) -> None:
        self._clock = clock
        self._find = find
        self._context = context
        self._watch = LoopWatch() if watched else None
        self._given_up: set[asyncio.Task[None]] = set()
        # To ask Python for a module that it has costs more than the call of its handler.
        self._jobs: dict[str, Job] = {}

    async def run(self, work: Work, link: RunServices, stop: StopSignal) -> Outcome:
        """Run the handler as a task of this loop."""
        if self._watch is not None:
            self._watch.start()
        loop = asyncio.get_running_loop()
        line = _InlineLine(link)
        cancelled = Cancellation()
        log = RunLogger(work.handler, link.log, self._clock, loop)
        body = self._body(work, line, cancelled, log)
        task = begin(body, loop=loop, name=work.handler, context=contextvars.Context())
        if task.done():
            line.cut = True
            log.close()
            return self._outcome(task, stop)
        over: asyncio.Future[None] = loop.create_future()
        stopping: list[asyncio.Task[None]] = []
        task.add_done_callback(lambda _: resolve(over))
        # A task that waits for a stop would cost each run more than all the rest of this.
        stop.on_request(
            lambda: stopping.append(loop.create_task(end_early(stop, cancelled, task.cancel, over)))
        )
        try:
            await over
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=LAST_STEPS)
        finally:
            stop.on_request(None)
            for waiting in stopping:
                waiting.cancel()
            line.cut = True
            log.close()
            if not task.done():
                self._give_up(task)
        return self._outcome(task, stop)

    async def _body(
        self, work: Work, line: _InlineLine, cancelled: Cancellation, log: logging.Logger
    ) -> Outcome:
        THIS_RUN.set(ThisRun(work.org_code, work.run_id, work.attempt, work.handler))
        try:
            job = self._job(work.entry_point)
            ctx = self._context(given_for(work, job, log, self._clock), line, cancelled)
            line.started()
            try:
                return await call(job, ctx)
            finally:
                await close_http(ctx)
        except SystemExit as end:
            # Let through, it would end the worker.
            return exited(end.code if isinstance(end.code, int) else int(end.code is not None))
        except BaseException as error:
            return outcome_of_error(error)

    def _job(self, entry_point: str) -> Job:
        job = self._jobs.get(entry_point)
        if job is None:
            job = self._jobs[entry_point] = self._find(entry_point)
        return job

    def _outcome(self, task: asyncio.Task[Outcome], stop: StopSignal) -> Outcome:
        if stop.killed:
            return Lost("the lease on the run is lost")
        if not task.done() or task.cancelled():
            return stopped(stop)
        return after_stop(task.result(), stop)

    def _give_up(self, task: asyncio.Task[Outcome]) -> None:
        async def nag() -> None:
            while not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=NAG)

        nagging = asyncio.create_task(nag())
        self._given_up.add(nagging)
        nagging.add_done_callback(self._given_up.discard)


class _InlineLine:
    """The link of one run, as its context uses it; cut once the run has ended."""

    def __init__(self, link: RunServices) -> None:
        self._link = link
        self.cut = False

    async def save(self, data_json: str) -> None:
        self._check()
        await save_for_sure(self._link, data_json)

    async def token(self, *, fresh: bool) -> tuple[AccessToken, Claims]:
        self._check()
        return await self._link.token(fresh=fresh)

    def progress(self, done: float, total: float | None, note: str | None) -> None:
        self._check()
        self._link.progress(done, total, note)

    def started(self) -> None:
        self._link.started()

    def _check(self) -> None:
        if self.cut:
            raise LeaseLost("the run has ended")


class RunLogger(logging.Logger):
    """`ctx.log`: not one of logging's own tree, since what it gets belongs to this run alone.

    It takes records itself, from any thread: a handler of its own for each run
    would cost more than the run. `sink` is what the lines go to.
    """

    def __init__(self, name: str, sink: Sink, clock: Clock, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(name, logging.INFO)
        self._sink = sink
        self._clock = clock
        self._loop = loop
        self._home = threading.get_ident()
        self._output: RunOutput | None = None
        self._closed = False

    def close(self) -> None:
        """The run has ended: what it said last goes out too, and what it says from now on does not."""
        self._closed = True
        if self._output is not None:
            self._output.close()

    def callHandlers(self, record: logging.LogRecord) -> None:
        try:
            line = marked(record.levelname.lower(), _FAULTS.format(record))
            if threading.get_ident() == self._home:
                self._feed(line)
            else:
                self._loop.call_soon_threadsafe(self._feed, line)
        except Exception:
            _FAULTS.handleError(record)
        for handler in self.handlers:
            handler.handle(record)

    def _feed(self, line: bytes) -> None:
        if self._closed:
            return
        if self._output is None:
            self._output = RunOutput(self._sink, self._clock)
        self._output.feed("stderr", line)


def resolve(over: asyncio.Future[None]) -> None:
    """Say that it is over, unless that has been said."""
    if not over.done():
        over.set_result(None)


async def end_early(
    stop: StopSignal,
    cancelled: Cancellation | BlockingCancellation,
    interrupt: Callable[[], object],
    over: asyncio.Future[None],
) -> None:
    """Tell, interrupt, and say when the grace is over."""
    loop, interrupted = asyncio.get_running_loop(), False
    if stop.reason is not None:
        cancelled.set(stop.reason)
    while (now := loop.time()) < stop.kill_at:
        if now >= stop.interrupt_at and not interrupted:
            interrupted = True
            interrupt()
        await stop.changed(stop.kill_at if interrupted else stop.interrupt_at)
    resolve(over)
