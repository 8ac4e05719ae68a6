"""A process that the zygote forks for one run, as the worker sees it: channel, output, signals and end.

It may be forked before there is a run for it. It then waits for its work, and holds nothing of an org.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, cast

from worker.execution.runners.child.frames import Message, frame

_READ = 65_536
# Reads of a closed channel: more than its buffer in the kernel has.
_MAX_REST = 32
_SOURCES = ("stdout", "stderr")


@dataclass(frozen=True, slots=True)
class Ended:
    """What the zygote reports of a process; `why` is set if it killed the process or could not fork it."""

    status: int = 0
    memory: int = 0
    why: str | None = None
    detail: str | None = None


class ChildReceiver(Protocol):
    """What a process sends is for the run that it serves."""

    def on_data(self, data: bytes) -> None: ...

    def on_output(self, source: str, data: bytes) -> None: ...

    def on_room(self) -> None: ...


class ChildProcess(asyncio.Protocol):
    """`open` it, have it forked, `serve` one run, and `close` it once it has `ended`."""

    def __init__(self, number: int, folder: str, tell_zygote: Callable[[Message], None]) -> None:
        self.number = number
        self.folder = folder
        self._tell_zygote = tell_zygote
        self._loop = asyncio.get_running_loop()
        self._receiver: ChildReceiver | None = None
        self._channel: asyncio.Transport | None = None
        self._socket: socket.socket | None = None
        self._channel_open = False
        self._pipes: dict[str, int] = {}
        self._drained = asyncio.Event()
        self._heard = False
        self._reset = False
        # Whether it leaves unread what was sent to it.
        self.is_behind = False
        self.ended: asyncio.Future[Ended] = self._loop.create_future()

    async def open(self) -> list[int]:
        """The descriptors for the process: channel, stdout, stderr. Raises OSError."""
        ours, theirs = socket.socketpair()
        given = [theirs.detach()]
        try:
            self._socket, self._channel_open = ours, True
            await self._loop.create_connection(lambda: self, sock=ours)
            for source in _SOURCES:
                self._pipes[source], end = os.pipe()
                given.append(end)
                os.set_blocking(self._pipes[source], False)
        except OSError:
            self.close()
            for descriptor in given:
                os.close(descriptor)
            raise
        return given

    @property
    def usable(self) -> bool:
        """Whether it may still be given a run."""
        return self._channel_open and not self.ended.done()

    def serve(self, receiver: ChildReceiver, work: Message) -> None:
        """Send the first message, and pass on what the process sends."""
        self._receiver = receiver
        for source, descriptor in self._pipes.items():
            self._loop.add_reader(descriptor, self._read, source, descriptor)
        # A spare may have died just now: then the work is never sent.
        self._reset = self._channel is not None and self._channel.is_closing()
        self.send(work)

    def send(self, message: Message) -> None:
        if self._channel is not None and not self._channel.is_closing():
            self._channel.write(frame(message))

    def signal(self, op: str, **fields: Any) -> None:
        """Have the zygote do something: interrupt, kill, check or cap."""
        self._tell_zygote({"op": op, "run": self.number, **fields})

    @property
    def has_read_all(self) -> bool:
        """Whether it has read everything that was sent to it."""
        if self._channel is None or self._socket is None or self._channel.get_write_buffer_size():
            return False
        try:  # bytes that the other end has not read yet (SIOCOUTQ)
            left = fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, b"\0\0\0\0")
        except OSError:  # it is closed
            return False
        return struct.unpack("i", left) == (0,)

    @property
    def ended_unread(self) -> bool:
        """Whether it ended without reading its work: its run has not begun."""
        return not self._heard and (self._channel is None or self._reset)

    def end(self, ended: Ended) -> None:
        """The process and all its descendants are gone, or the zygote is."""
        if not self.ended.done():
            self.ended.set_result(ended)

    async def drained(self, patience: float) -> None:
        """Wait until everything that it wrote is read."""
        try:
            async with asyncio.timeout(patience):
                await self._drained.wait()
        except TimeoutError:
            # A process outside the run holds a descriptor; what it writes is not the run's.
            self._drained.set()

    def pause_reading(self) -> None:
        if self._channel is not None:
            self._channel.pause_reading()

    def resume_reading(self) -> None:
        if self._channel is not None and not self._channel.is_closing():
            self._channel.resume_reading()

    def close(self) -> None:
        """Close every descriptor."""
        for source in list(self._pipes):
            self._close_pipe(source)
        if self._channel is not None:
            self._channel.abort()

    # asyncio.Protocol, for the channel

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._channel = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._heard = True
        if self._receiver is not None:
            self._receiver.on_data(data)
        else:  # nothing was asked of it
            self.signal("kill")

    def pause_writing(self) -> None:
        self.is_behind = True

    def resume_writing(self) -> None:
        self.is_behind = False
        if self._receiver is not None:
            self._receiver.on_room()

    def connection_lost(self, error: Exception | None) -> None:
        self._channel_open = False
        if error is not None:
            self._read_rest()
        if self.is_behind:
            self.resume_writing()
        # The kernel reports a reset if the other end closes while something is left to read.
        self._reset |= isinstance(error, (ConnectionResetError, BrokenPipeError))
        self._check_drained()

    def _read_rest(self) -> None:
        """Read what a process sent before it closed its end.

        asyncio drops that if an answer cannot be written while reading is paused.
        """
        with suppress(OSError):
            for _ in range(_MAX_REST):  # it may have closed only what it reads from, and go on sending
                if self._socket is None or not (data := self._socket.recv(_READ)):
                    break
                self.data_received(data)

    # output

    def _read(self, source: str, descriptor: int) -> None:
        try:
            data = os.read(descriptor, _READ)
        except BlockingIOError:
            return
        if data and self._receiver is not None:
            self._receiver.on_output(source, data)
        elif not data:
            self._close_pipe(source)
            self._check_drained()

    def _close_pipe(self, source: str) -> None:
        descriptor = self._pipes.pop(source)
        self._loop.remove_reader(descriptor)
        os.close(descriptor)

    def _check_drained(self) -> None:
        if not self._pipes and not self._channel_open:
            self._drained.set()
