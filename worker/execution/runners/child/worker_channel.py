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
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from worker.errors import LeaseLost, Unavailable, WorkerError
from worker.execution.runners.child.frames import BrokenMessage, Message, Unframer, run_frame
from worker.handlers.calls import A, Call, OneWayCall, answer_in, message_of
from worker.handlers.steps import StepError

# Seconds between two notices at least; of each kind the newest counts.
TOLD_EVERY = 0.1
_TICK = 1.0
_RECEIVE = 65_536


class ChannelClosed(Exception):
    """The worker cannot be reached: it is gone, or the handler has closed the channel's descriptor."""


class WorkerChannel:
    """The channel of one run, and the port of a handler that blocks; thread-safe."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel: socket.socket | None = channel
        self._inode = os.fstat(channel.fileno()).st_ino
        self._unframer = Unframer()
        self._early: list[Message] = []
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, Future[Message]] = {}
        self._told: dict[str, Message] = {}
        self._told_at = 0.0
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

    def request(self, call: Call[Any]) -> Future[Message]:
        """Send a call; the future gets the message with its answer, or the worker's error."""
        number = next(self._numbers)
        answer: Future[Message] = Future()
        self._waiting[number] = answer
        self.send({"op": call.path, **message_of(call), "n": number})
        return answer

    async def ask(self, call: Call[A]) -> A:
        """The answer to a call of a handler that blocks."""
        return answer_in(call, self.request(call).result())

    def tell(self, notice: OneWayCall) -> None:
        """Send a notice soon, unless a newer one of its kind replaces it."""
        self._told[notice.path] = {"op": notice.path, **message_of(notice)}
        self._send_told(time.monotonic() - TOLD_EVERY)

    def send_end(self, outcome: Mapping[str, Any]) -> None:
        """Send how the attempt ended; only the first call counts."""
        if self._ended:
            return
        self._ended = True
        self._send_told(float("inf"))
        self.send({"op": "end", "outcome": outcome})

    def disown(self) -> None:
        """Close the channel in a process that the handler forked, which must not speak for the run."""
        channel, self._channel = self._channel, None
        self._lock = threading.Lock()  # a thread that the fork did not copy may have held the old one
        if channel is not None:
            channel.close()

    def _send_told(self, sent_before: float) -> None:
        if self._told and self._told_at <= sent_before:
            self._told_at = time.monotonic()
            for name in list(self._told):
                # The handler and the thread that listens may both be here.
                if (message := self._told.pop(name, None)) is not None:
                    self.send(message)

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
                self._send_told(time.monotonic() - TOLD_EVERY)
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
    """The port of an async handler."""

    def __init__(self, channel: WorkerChannel) -> None:
        self._channel = channel
        self.tell = channel.tell

    async def ask(self, call: Call[A]) -> A:
        answer: Message = await asyncio.wrap_future(self._channel.request(call))
        return answer_in(call, answer)


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
