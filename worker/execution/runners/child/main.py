"""A run's own process: reads its work, calls the handler, sends the outcome, ends."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import io
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from worker.clock import SystemClock
from worker.execution.runners.child.messages import outcome_message, work_of
from worker.execution.runners.child.run_line import ChannelClosed, RunLine
from worker.execution.runners.context_factory import given_for
from worker.execution.runners.contract import Work
from worker.execution.runners.output import log_to_stderr
from worker.handlers.calling import call, call_blocking, outcome_of_error
from worker.handlers.context import BlockingCancellation, BlockingContext, Cancellation, Context, Given
from worker.handlers.job import Job
from worker.handlers.models import load
from worker.runs.outcome import Outcome

# How the process ends when it can no longer reach the worker, for instance after closing all descriptors.
CHANNEL_CLOSED = 81


class Interrupted(BaseException):
    """Raised in a handler that blocks, at half the grace: the time to clean up."""


def main(channel: int) -> NoReturn:
    """Carry the run of this process to its end; never returns."""
    home = os.getpid()
    code = os.EX_SOFTWARE
    try:
        _open_streams()
        line = RunLine(socket.socket(fileno=channel))
        os.register_at_fork(after_in_child=line.disown)
        work = work_of(line.receive())
        if work.traceparent is not None:
            # As OpenTelemetry's own tools read it, also those that the handler starts.
            os.environ["TRACEPARENT"] = work.traceparent
        log_to_stderr()
        outcome = _carried_out(work, line)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.getpid() == home:
            _flush()
            line.send_end(outcome_message(outcome))
        code = 0
    except SystemExit as end:
        code = _code_of(end)
    except ChannelClosed:
        code = CHANNEL_CLOSED
    except Exception:
        traceback.print_exc()
    finally:
        _flush()
        # Threads, exit functions and leftover tasks have no say: the handler has returned.
        os._exit(code)


def _carried_out(work: Work, line: RunLine) -> Outcome:
    interrupt = _Interrupt()
    try:
        job = load(work.entry_point)
        given = given_for(work, job, logging.getLogger(work.handler), SystemClock())
        line.send({"op": "started"})
        if job.is_async:
            return _run_async(job, given, line, interrupt)
        return _run_blocking(job, given, line)
    except (SystemExit, ChannelClosed):
        raise
    except BaseException as error:
        return outcome_of_error(error)


def _run_blocking(job: Job, given: Given[Any, Any], line: RunLine) -> Outcome:
    cancelled = BlockingCancellation()
    line.listen(cancelled.set)
    return call_blocking(job, BlockingContext(given, line.blocking(), cancelled))


def _run_async(job: Job, given: Given[Any, Any], line: RunLine, interrupt: _Interrupt) -> Outcome:
    home = os.getpid()

    async def body() -> Outcome:
        loop = asyncio.get_running_loop()
        cancelled = Cancellation()

        def tell(reason: str) -> None:
            cancelled.note(reason)
            loop.call_soon_threadsafe(cancelled.set, reason)

        line.listen(tell)
        task = asyncio.current_task(loop)
        if task is not None:
            interrupt.do = lambda: loop.call_soon_threadsafe(task.cancel)
        try:
            return await call(job, Context(given, line.awaited(), cancelled))
        except SystemExit as end:
            if os.getpid() != home:
                _flush()
                os._exit(_code_of(end))
            raise
        finally:
            if os.getpid() != home:
                # A process that the handler forked shares this loop's epoll: leave it alone.
                _flush()
                os._exit(0)

    # The loop is not closed: that would wait for tasks that the handler has left behind.
    return asyncio.new_event_loop().run_until_complete(body())


class _Interrupt:
    """What SIGTERM does: cancels the task of an async handler, raises in one that blocks."""

    def __init__(self) -> None:
        self.do: Callable[[], object] = self._raise
        signal.signal(signal.SIGTERM, self._on_signal)
        # What the handler forks may be ended by SIGTERM as usual.
        os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.do()

    @staticmethod
    def _raise() -> None:
        raise Interrupted("the grace is half over")


def _open_streams() -> None:
    """Standard streams over the new descriptors, written line by line so that a crash keeps them."""
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8")
    sys.stdout = _writer(1)
    sys.stderr = _writer(2)
    faulthandler.enable(file=2, all_threads=False)


def _writer(descriptor: int) -> io.TextIOWrapper:
    raw = io.BufferedWriter(io.FileIO(descriptor, "w", closefd=False))
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=True)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the handler may have closed or replaced it
            stream.flush()


def _code_of(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return (end.code or 0) & 0xFF
    with contextlib.suppress(Exception):
        sys.stderr.write(f"{end.code}\n")
    return 1
