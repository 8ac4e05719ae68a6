"""A run's own process: becomes one, isolated; reads its work, calls the handler, sends the outcome, ends.

Also its end of the channel to the worker: sends requests, receives answers and the request to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import io
import itertools
import logging
import os
import resource
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn
from urllib.request import getproxies

from worker.clock import SystemClock
from worker.engine.runners.child import landlock, linux, seccomp
from worker.engine.runners.child.landlock import Ruleset
from worker.engine.runners.child.messages import (
    CHANNEL_CLOSED,
    BrokenMessage,
    Message,
    Unframer,
    error_of,
    outcome_message,
    run_frame,
    work_of,
)
from worker.engine.runners.child.sandbox import allow_own_proc
from worker.engine.runners.contract import Interrupted, Work
from worker.engine.runners.output import log_to_stderr
from worker.handlers.blocking_context import BlockingContext
from worker.handlers.calling import call, call_blocking, outcome_of_error, sandboxed
from worker.handlers.calls import A, Call, OneWayCall, answer_in, message_of
from worker.handlers.context import Context
from worker.handlers.describe import LAST_DESCRIPTOR
from worker.handlers.door import Door
from worker.handlers.given import BlockingCancellation, Cancellation, Connect, Given
from worker.handlers.job import Job
from worker.handlers.models import load
from worker.model.runs.outcome import Outcome, Parked

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
        """Send a notice soon, unless a newer one of its kind replaces it; at once if each counts."""
        message = {"op": notice.path, **message_of(notice)}
        if notice.way.each:
            self.send(message)
            return
        self._told[notice.path] = message
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
            answer.set_exception(error_of(message["error"]))
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


# What a run may allocate beyond its cap before malloc itself fails: thread stacks and the like count here.
_DATA_SLACK = 64 * 1024 * 1024
# Open descriptors of a run: as many as select(2) supports, and what the run may raise that to.
FILES = 1024
MAX_FILES = 8192
# Seconds of processor time beyond the timeout, grace included; and between SIGXCPU and SIGKILL.
CPU_SLACK = 3600.0
_CPU_GRACE = 5


@dataclass(frozen=True, slots=True)
class RunPlace:
    """Where a run lives: descriptors, its own folder, and that of its cgroup; `door` leads to the broker.

    If `sealed`, that is its only way out.
    """

    channel: int
    stdout: int
    stderr: int
    folder: str
    group: str | None = None
    door: int | None = None
    sealed: bool = False


class Seal:
    """Denies a process the network; the zygote makes it once, since that takes longer than to apply it."""

    def __init__(self) -> None:
        version = landlock.abi()
        self.ruleset = Ruleset(version, files=False) if version >= landlock.NETWORK else None
        self._filter = seccomp.Filter(seccomp.SEALED)

    def apply(self) -> None:
        """Deny this process and its descendants the network for good; raises OSError."""
        if self.ruleset is not None:
            self.ruleset.restrict()
        self._filter.install()


def isolate(
    place: RunPlace, *, zygote: int, lock: int | None, ruleset: Ruleset | None, seal: Seal | None
) -> int | None:
    """Turn a process that was just forked into a run's own; raises OSError if the kernel refuses.

    Returns a descriptor for the cap of its cgroup, for `main`.
    """
    os.setsid()
    linux.die_with_parent()
    if os.getppid() != zygote:  # it died before the line above
        os._exit(os.EX_UNAVAILABLE)
    linux.become_subreaper()
    linux.name_process(linux.ProcessName.RUN)
    cap = None if place.group is None else linux.join_cgroup(place.group)
    _default_signals()
    own_proc = () if ruleset is None else (ruleset.descriptor, allow_own_proc(ruleset))
    of_seal = () if seal is None or seal.ruleset is None else (seal.ruleset.descriptor,)
    _keep_only(place, lock, *own_proc, *of_seal, *(() if cap is None else (cap,)))
    # A core would contain the token. 1 also turns off a program that the kernel would give it to.
    linux.lower_limit(resource.RLIMIT_CORE, 1, 1)
    # The kernel also counts the descriptors in flight between processes by account, and compares them with
    # the limit of the process that sends: no run may have as many as keep the worker from passing its own.
    most = min(MAX_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
    linux.lower_limit(resource.RLIMIT_NOFILE, min(FILES, most), most)
    os.chdir(place.folder)
    tempfile.tempdir = os.environ["HOME"] = os.environ["TMPDIR"] = place.folder
    if ruleset is not None:
        ruleset.restrict()
        linux.show_memory()  # the zygote counts its files in memory
        sandboxed()
    if seal is not None:
        seal.apply()
    return cap


def _default_signals() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _keep_only(place: RunPlace, lock: int | None, *others: int) -> None:
    kept = {place.channel, *others}
    if place.door is not None:
        kept.add(place.door)
    if lock is not None:
        kept.add(linux.hold_shared(lock))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(place.stdout, 1)
    os.dup2(place.stderr, 2)
    # One call for each gap: the zygote has some forty descriptors open for the sandbox alone.
    first = 3
    for number in sorted(kept):
        os.closerange(first, number)
        first = number + 1
    os.closerange(first, LAST_DESCRIPTOR)


def _limit(seconds: float, memory: int | None, cap: int | None) -> None:
    """Limit what this run may use: `seconds` until its timeout, and bytes of memory."""
    # In case nothing ends the run at its timeout; until then it may use every processor.
    most = int(max(seconds, 0) + CPU_SLACK) * (os.cpu_count() or 1)
    linux.lower_limit(resource.RLIMIT_CPU, most, most + _CPU_GRACE)
    if cap is not None:
        linux.write_cap(cap, memory)
    if memory is not None:
        # The zygote checks actual usage; this stops allocations that are faster than its checks.
        most = linux.data_size() + 2 * memory + _DATA_SLACK
        linux.lower_limit(resource.RLIMIT_DATA, most, most)


# The channel of the run in this process.
_channel: WorkerChannel | None = None


def _after_fork() -> None:
    """In a process that the handler forked: it must not speak for the run, and ends at SIGTERM as usual."""
    if _channel is not None:
        _channel.disown()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_after_fork)


def _way_out(place: RunPlace) -> Connect | None:
    """How the clients of `ctx` reach the broker; None if they connect themselves."""
    # Where a network is left by a proxy only, the broker would not reach what an open run reaches.
    if place.door is None or (not place.sealed and getproxies()):
        return None
    return Door(place.door).connect


def main(place: RunPlace, cap: int | None) -> NoReturn:
    """Wait for the work of this process and run its handler; never returns."""
    global _channel
    home = os.getpid()
    code = os.EX_SOFTWARE
    try:
        channel = _channel = WorkerChannel(socket.socket(fileno=place.channel))
        connect = _way_out(place)
        message = channel.receive()
        # From here on it holds data of an org; nothing of a plug-in runs before the limits apply.
        _limit(message["seconds"], message["memory"], cap)
        os.environ |= message["environment"]
        work = work_of(message)
        if work.traceparent is not None:
            # The variable that OpenTelemetry's tools read, also in programs that the handler starts.
            os.environ["TRACEPARENT"] = work.traceparent
        signal.signal(signal.SIGTERM, _raise_interrupted)
        outcome = call_handler(work, channel, connect)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.getpid() == home:
            _flush()
            channel.send_end(outcome_message(outcome))
        code = 0
    except SystemExit as exit_:
        code = _code_of(exit_)
    except ChannelClosed:
        code = CHANNEL_CLOSED
    except Exception:
        traceback.print_exc()
    finally:
        _flush()
        # The handler has returned: skip threads, exit functions and leftover tasks.
        os._exit(code)


def call_handler(work: Work, channel: WorkerChannel, connect: Connect | None = None) -> Outcome:
    """Import the handler, validate its input, call it; `connect` leads to the broker.

    Its event loop is not closed: that would wait for tasks that the handler left behind.
    """
    try:
        job = load(work.entry_point)
        given = work.given(job, logging.getLogger(work.handler), SystemClock())
        given.connect = connect
        channel.send({"op": "started"})
        if job.is_async:
            loop = asyncio.new_event_loop()
            return loop.run_until_complete(_run_async(job, given, channel))
        cancelled = BlockingCancellation()
        channel.listen(cancelled.set)
        return call_blocking(job, BlockingContext(given, channel, cancelled, on_park=_send_park(channel)))
    except (SystemExit, ChannelClosed):
        raise
    except BaseException as error:
        return outcome_of_error(error)


async def _run_async(job: Job, given: Given[Any, Any], channel: WorkerChannel) -> Outcome:
    home, loop = os.getpid(), asyncio.get_running_loop()
    cancelled = Cancellation()

    def on_stop(reason: str) -> None:
        cancelled.note(reason)
        loop.call_soon_threadsafe(cancelled.set, reason)

    channel.listen(on_stop)
    task = asyncio.current_task(loop)
    if task is not None:
        signal.signal(signal.SIGTERM, lambda *_: loop.call_soon_threadsafe(task.cancel))
    code = 0
    try:
        return await call(job, Context(given, AsyncPort(channel), cancelled, on_park=_send_park(channel)))
    except SystemExit as exit_:
        code = _code_of(exit_)
        raise
    finally:
        if os.getpid() != home:
            # A process that the handler forked shares this loop's epoll: do not touch it.
            _flush()
            os._exit(code)


def _send_park(channel: WorkerChannel) -> Callable[[Parked], None]:
    """Send the outcome at once: the worker kills a handler that goes on."""
    return lambda parked: channel.send_end(outcome_message(parked))


def _raise_interrupted(number: int, frame: FrameType | None) -> None:
    raise Interrupted("the grace is half over")


def open_streams() -> None:
    """Open the standard streams of all runs, in the zygote; line-buffered, so that a crash loses no line."""
    reader, writer = os.pipe()
    own = [os.dup(number) for number in (1, 2)]
    for number in (1, 2):
        os.dup2(writer, number)  # of a run they are pipes; a file would be written to at a position
    _open_streams()
    for number, descriptor in zip((1, 2), own, strict=True):
        os.dup2(descriptor, number)
    for descriptor in (reader, writer, *own):
        os.close(descriptor)
    log_to_stderr()


def _open_streams() -> None:
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


def _code_of(exit_: SystemExit) -> int:
    if exit_.code is None or isinstance(exit_.code, int):
        return (exit_.code or 0) & 0xFF
    with contextlib.suppress(Exception):
        sys.stderr.write(f"{exit_.code}\n")
    return 1
