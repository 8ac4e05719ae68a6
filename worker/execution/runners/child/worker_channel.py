"""The run's end of its channel to the worker: sends requests, receives answers and the request to stop."""

from __future__ import annotations

import asyncio
import itertools
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from worker.errors import LeaseLost, Unavailable, WorkerError
from worker.execution.runners.child.frames import BrokenMessage, Message, Unframer, run_frame
from worker.execution.runners.child.messages import (
    budgets_of,
    granted_of,
    page_of,
    step_message,
    wait_message,
    wait_state_of,
)
from worker.guard.claims import Claims
from worker.handlers.steps import StepError
from worker.runs.budgets import BudgetState
from worker.runs.run import NewStep, StepPage
from worker.runs.waits import NewWait, WaitState
from worker.secret import AccessToken

# Seconds between two progress messages at least; the newest counts.
PROGRESS_EVERY = 0.1
_TICK = 1.0
_RECEIVE = 65_536


class ChannelClosed(Exception):
    """The worker cannot be reached: it is gone, or the handler has closed the channel's descriptor."""


class WorkerChannel:
    """The channel of one run, and the `BlockingWorkerPort` of its handler; thread-safe."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel: socket.socket | None = channel
        self._inode = os.fstat(channel.fileno()).st_ino
        self._unframer = Unframer()
        self._early: list[Message] = []
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, Future[Message]] = {}
        self._progress: Message | None = None
        self._progress_at = 0.0
        self._ended = False

    def receive(self) -> Message:
        """The first message; call before `listen`."""
        while not self._early:
            self._early += self._unframer.feed(self._read())
        return self._early.pop(0)

    def listen(self, on_stop: Callable[[str], None]) -> None:
        """Start to listen in a separate thread; `on_stop` gets the reason."""
        thread = threading.Thread(target=self._listen, args=(on_stop,), name="worker", daemon=True)
        # SIGTERM must interrupt the handler, so the kernel must not deliver it to this thread.
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        thread.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message; raises ChannelClosed."""
        data = run_frame(message)
        try:
            with self._lock:
                self._own_channel().sendall(data)
        except OSError as error:
            raise ChannelClosed(f"the worker cannot be reached: {error.strerror}") from error

    def ask(self, message: Mapping[str, Any]) -> Future[Message]:
        """Send a request; the future gets the answer, or the worker's error."""
        number = next(self._numbers)
        answer: Future[Message] = Future()
        self._waiting[number] = answer
        self.send({**message, "n": number})
        return answer

    def save(self, data_json: str) -> None:
        self.ask({"op": "save", "data": data_json}).result()

    def token(self, *, fresh: bool) -> tuple[AccessToken, Claims]:
        return granted_of(self.ask({"op": "token", "fresh": fresh}).result()["granted"])

    def load_steps(self, after: int) -> StepPage:
        return page_of(self.ask({"op": "steps", "after": after}).result())

    def open_wait(self, wait: NewWait) -> WaitState:
        return wait_state_of(self.ask({"op": "wait", "wait": wait_message(wait)}).result())

    def store_step(self, step: NewStep) -> str:
        return _as_stored(step, self.ask({"op": "step", "step": step_message(step)}).result())

    def budgets(self) -> Sequence[BudgetState]:
        return budgets_of(self.ask({"op": "budgets"}).result())

    def spend(self, meter: str, amount: int, number: int) -> Sequence[BudgetState]:
        return budgets_of(self.ask(_spend(meter, amount, number)).result())

    def progress(self, done: float, total: float | None, note: str | None) -> None:
        self._progress = {"op": "progress", "done": done, "total": total, "note": note}
        self._send_progress(time.monotonic() - PROGRESS_EVERY)

    def send_end(self, outcome: Mapping[str, Any]) -> None:
        """Send how the attempt ended; only the first call counts."""
        if self._ended:
            return
        self._ended = True
        self._send_progress(float("inf"))
        self.send({"op": "end", "outcome": outcome})

    def disown(self) -> None:
        """Close the channel in a process that the handler forked, which must not speak for the run."""
        channel, self._channel = self._channel, None
        self._lock = threading.Lock()  # a thread that the fork did not copy may have held the old one
        if channel is not None:
            channel.close()

    def _send_progress(self, sent_before: float) -> None:
        if self._progress is not None and self._progress_at <= sent_before:
            progress, self._progress = self._progress, None
            self._progress_at = time.monotonic()
            self.send(progress)

    def _listen(self, on_stop: Callable[[str], None]) -> None:
        try:
            early, self._early = self._early, []
            for message in early:
                self._handle(message, on_stop)
            poll = select.poll()
            poll.register(self._own_channel(), select.POLLIN)
            while True:
                if poll.poll(_TICK * 1000):
                    for message in self._unframer.feed(self._read()):
                        self._handle(message, on_stop)
                self._send_progress(time.monotonic() - PROGRESS_EVERY)
        except (ChannelClosed, BrokenMessage, OSError):
            for answer in list(self._waiting.values()):
                answer.set_exception(ChannelClosed("the worker cannot be reached"))

    def _handle(self, message: Message, on_stop: Callable[[str], None]) -> None:
        if message["op"] == "stop":
            on_stop(message["reason"])
            return
        answer = self._waiting.pop(message["n"], None)
        if answer is None or not answer.set_running_or_notify_cancel():
            return
        if "error" in message:
            answer.set_exception(_error_of(message["error"]))
        else:
            answer.set_result(message)

    def _read(self) -> bytes:
        data = self._own_channel().recv(_RECEIVE)
        if not data:
            raise ChannelClosed("the worker has closed the channel")
        return data

    def _own_channel(self) -> socket.socket:
        channel = self._channel
        try:
            # The handler may have closed every descriptor, and opened a file that got this number.
            if channel is not None and os.fstat(channel.fileno()).st_ino == self._inode:
                return channel
        except OSError as error:
            raise ChannelClosed("the channel's descriptor is closed") from error
        raise ChannelClosed("the channel belongs to another process or is closed")


class AsyncPort:
    """The `WorkerPort` of an async handler."""

    def __init__(self, channel: WorkerChannel) -> None:
        self._channel = channel
        self.progress = channel.progress

    async def save(self, data_json: str) -> None:
        await asyncio.wrap_future(self._channel.ask({"op": "save", "data": data_json}))

    async def token(self, *, fresh: bool) -> tuple[AccessToken, Claims]:
        answer = await asyncio.wrap_future(self._channel.ask({"op": "token", "fresh": fresh}))
        return granted_of(answer["granted"])

    async def load_steps(self, after: int) -> StepPage:
        answer = await asyncio.wrap_future(self._channel.ask({"op": "steps", "after": after}))
        return page_of(answer)

    async def open_wait(self, wait: NewWait) -> WaitState:
        answer = await asyncio.wrap_future(self._channel.ask({"op": "wait", "wait": wait_message(wait)}))
        return wait_state_of(answer)

    async def store_step(self, step: NewStep) -> str:
        answer = await asyncio.wrap_future(self._channel.ask({"op": "step", "step": step_message(step)}))
        return _as_stored(step, answer)

    async def budgets(self) -> Sequence[BudgetState]:
        answer = await asyncio.wrap_future(self._channel.ask({"op": "budgets"}))
        return budgets_of(answer)

    async def spend(self, meter: str, amount: int, number: int) -> Sequence[BudgetState]:
        answer = await asyncio.wrap_future(self._channel.ask(_spend(meter, amount, number)))
        return budgets_of(answer)


def _spend(meter: str, amount: int, number: int) -> Message:
    return {"op": "spend", "meter": meter, "amount": amount, "number": number}


def _as_stored(step: NewStep, answer: Message) -> str:
    """The text that the worker has stored; it sends only one that differs."""
    stored: str | None = answer["stored"]
    return step.result_json if stored is None else stored


# The code of a StepError, which is the author's.
_STEP = "step"


def error_message(error: WorkerError | StepError) -> Message:
    """An error of the worker, to be raised in the run's process."""
    if isinstance(error, StepError):
        return {"code": _STEP, "message": str(error)}
    pause = getattr(error, "retry_after", None)
    return {"code": error.code, "message": error.message, "retry_after": pause}


def _error_of(message: Mapping[str, Any]) -> WorkerError | StepError:
    if message["code"] == _STEP:
        return StepError(message["message"])
    if message["code"] == LeaseLost.code:
        return LeaseLost(message["message"])
    error = Unavailable(message["message"])
    error.code = message["code"]
    error.retry_after = message["retry_after"]
    return error
