"""Blocking: the runner for a handler that blocks, in a thread of this process; for trials only.

A thread cannot be killed, and what it prints is not told from what others print: a
worker gives such a handler a process of its own. A debugger or a test wants it here.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Executor, Future
from typing import Any, ParamSpec, TypeVar

from worker.claims.claims import AccessToken, Claims
from worker.clock import Clock
from worker.execution.runners.child.main import Interrupted
from worker.execution.runners.context_factory import given_for
from worker.execution.runners.contract import RunServices, StopSignal, Work, save_for_sure, stopped
from worker.execution.runners.exit_status import after_stop, exited
from worker.execution.runners.inline import LAST_STEPS, RunLogger, end_early, resolve
from worker.handlers.calling import call_blocking, outcome_of_error
from worker.handlers.context import (
    BlockingCancellation,
    BlockingContext,
    BlockingWorkerPort,
    Given,
    close_blocking_http,
)
from worker.handlers.job import Job
from worker.handlers.models import load
from worker.runs.outcome import Lost, Outcome

P = ParamSpec("P")
T = TypeVar("T")


class Blocking:
    """A daemon thread for each run, interrupted at half its grace and given up when that is over."""

    def __init__(
        self,
        clock: Clock,
        *,
        find: Callable[[str], Job] = load,
        context: Callable[
            [Given[Any, Any], BlockingWorkerPort, BlockingCancellation], BlockingContext[Any, Any]
        ] = BlockingContext,
    ) -> None:
        self._clock = clock
        self._find = find
        self._context = context

    async def run(self, work: Work, link: RunServices, stop: StopSignal) -> Outcome:
        """Run the handler in a thread, its questions answered on this loop."""
        loop = asyncio.get_running_loop()
        line, cancelled, thread = _ThreadLine(link, loop), BlockingCancellation(), OneThread()
        log = RunLogger(work.handler, link.log, self._clock, loop)
        ended = loop.run_in_executor(thread, self._body, work, line, cancelled, log)
        over: asyncio.Future[None] = loop.create_future()
        stopping: list[asyncio.Task[None]] = []
        ended.add_done_callback(lambda _: resolve(over))
        stop.on_request(
            lambda: stopping.append(loop.create_task(end_early(stop, cancelled, thread.interrupt, over)))
        )
        try:
            await over
            line.cut()
            if not ended.done():
                thread.interrupt()
                await asyncio.wait({ended}, timeout=LAST_STEPS)
        finally:
            stop.on_request(None)
            for waiting in stopping:
                waiting.cancel()
            line.cut()
            log.close()
        if stop.killed:
            return Lost("the lease on the run is lost")
        return after_stop(ended.result(), stop) if ended.done() else stopped(stop)

    def _body(
        self, work: Work, line: _ThreadLine, cancelled: BlockingCancellation, log: RunLogger
    ) -> Outcome:
        try:
            job = self._find(work.entry_point)
            ctx = self._context(given_for(work, job, log, self._clock), line, cancelled)
            line.started()
            try:
                return call_blocking(job, ctx)
            finally:
                close_blocking_http(ctx)
        except SystemExit as end:
            return exited(end.code if isinstance(end.code, int) else int(end.code is not None))
        except BaseException as error:
            return outcome_of_error(error)


class _ThreadLine:
    """The link of one run, as its thread uses it; what waits at the cut is interrupted."""

    def __init__(self, link: RunServices, loop: asyncio.AbstractEventLoop) -> None:
        self._link = link
        self._loop = loop
        self._lock = threading.Lock()
        self._cut = False
        self._waiting: Future[Any] | None = None

    def save(self, data_json: str) -> None:
        self._ask(lambda: save_for_sure(self._link, data_json))

    def token(self, *, fresh: bool) -> tuple[AccessToken, Claims]:
        return self._ask(lambda: self._link.token(fresh=fresh))

    def progress(self, done: float, total: float | None, note: str | None) -> None:
        self._tell(self._link.progress, done, total, note)

    def started(self) -> None:
        self._tell(self._link.started)

    def cut(self) -> None:
        with self._lock:
            self._cut = True
            if self._waiting is not None:
                self._waiting.cancel()

    def _ask(self, question: Callable[[], Coroutine[Any, Any, T]]) -> T:
        with self._lock:
            self._check()
            asked = self._waiting = asyncio.run_coroutine_threadsafe(question(), self._loop)
        try:
            answer: T = asked.result()
            return answer
        except CancelledError:
            raise Interrupted("the run has ended") from None
        finally:
            self._waiting = None

    def _tell(self, what: Callable[P, None], *words: P.args, **named: P.kwargs) -> None:
        with self._lock:
            self._check()
            self._loop.call_soon_threadsafe(lambda: what(*words, **named))

    def _check(self) -> None:
        if self._cut:
            raise Interrupted("the run has ended")


class OneThread(Executor):
    """Runs one call in a daemon thread, so that one which does not end keeps no interpreter from its exit."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._over = self._interrupting = False

    def submit(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()

        def work() -> None:
            result: list[T] = []
            error: BaseException | None = None
            try:
                try:
                    result.append(call(*args, **kwargs))
                finally:
                    self._end()
            except BaseException as raised:
                error = raised
            # It may have been raised in `_end` itself, and a second one may follow the first.
            try:
                self._end()
            except Interrupted:
                self._end()
            if error is None or result:
                future.set_result(result[0])
            else:
                future.set_exception(error)

        self._thread = threading.Thread(target=work, name="blocking handler", daemon=True)
        self._thread.start()
        return future

    def interrupt(self) -> None:
        """Raise Interrupted in the thread at its next step of Python; what sleeps is not woken."""
        self._interrupting = True
        if not self._over and self._thread is not None and self._thread.ident is not None:
            _raise_in(self._thread.ident, Interrupted)
        self._interrupting = False

    def _end(self) -> None:
        """From here on nothing is raised in this thread; what is on its way is taken back.

        Raised in the steps that tell of the result, it would leave whoever waits for that
        waiting. A lock would not do: an exception may come right after it is taken.
        """
        self._over = True
        while self._interrupting:
            time.sleep(0.001)
        _raise_in(threading.get_ident(), None)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Have an exception raised in a thread; None takes back one that is not raised yet."""
    wanted = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), wanted)
