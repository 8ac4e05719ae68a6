"""A process that the zygote forks for one run, as the worker sees it: channel, output, signals and end.

It may be forked before there is a run for it. It then waits for its work, and holds nothing of an org. Its
inbox reads what it sends, a little in each turn of the loop, and each run at a limited rate. A run that
floods its channel is read more slowly, and nothing is dropped: once the socket's buffer is full, its own
process waits.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
import termios
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from typing import Any, Protocol, cast

from worker.engine.runners.child.messages import BrokenMessage, Message, RunFrames, frame
from worker.handlers.json_scan import Scan
from worker.handlers.json_text import check_json_text, check_size

# What a message costs besides its bytes: reading one takes as long as copying so many.
MESSAGE = 4 * 1024
# Work of one turn of the loop for all runs together, in bytes; the largest message may exceed it. It is what
# the worker reads in one or two milliseconds.
TURN = 256 * 1024
# Bytes a second that are read of one channel, and how many at once. The calls of a run wait for the database
# and stay below that: 15 results of 1 MiB or 240 checkpoints of 64 KiB pass at once, then as many a second.
# A flood of small messages is read at 4,096 a second, which takes a tenth of the loop.
RATE = 16 * 1024 * 1024
BURST = 16 * 1024 * 1024
# Characters of JSON text that are checked at once.
CHECKED_AT_ONCE = 4 * 1024


class InboxTurns:
    """Shares the turns of the loop between runs, in the order in which they ask."""

    def __init__(self, call_soon: Callable[[Callable[[], None]], object]) -> None:
        self._call_soon = call_soon
        self._left = TURN
        self._waiting: deque[Callable[[], None]] = deque()
        self._begins = False

    @property
    def left(self) -> bool:
        """Whether something may still be done in this turn."""
        return self._left > 0

    @property
    def free(self) -> bool:
        """Whether that is so and no other run waits for it."""
        return self._left > 0 and not self._waiting

    def spend(self, work: int) -> None:
        self._left -= work
        self._begin_soon()

    def wait(self, callback: Callable[[], None]) -> None:
        """Call `callback` in a later turn."""
        self._waiting.append(callback)
        self._begin_soon()

    async def whole(self) -> None:
        """Wait for a turn of which others use nothing."""
        if self._left == TURN and not self._waiting:
            self.spend(TURN)
            return
        given = asyncio.get_running_loop().create_future()

        def give() -> None:
            if not given.done():
                self._left = 0
                given.set_result(None)

        self.wait(give)
        await given

    def _begin_soon(self) -> None:
        if not self._begins:
            self._begins = True
            self._call_soon(self._begin)

    def _begin(self) -> None:
        self._begins = False
        self._left = TURN
        while self._waiting and self._left > 0:
            self._waiting.popleft()()
        if self._waiting or self._left < TURN:
            self._begin_soon()


@dataclass(eq=False, repr=False)
class Inbox:
    """The messages of one run, each passed to `receive` when its turn has come.

    The data stays with the process while `channel` pauses reading. `holds` says that the run has to wait,
    until `go_on` is called. Once a message is broken, `on_broken` is called and nothing more is read.
    """

    turns: InboxTurns
    channel: ChildProcess
    receive: Callable[[Message], None]
    _: KW_ONLY
    holds: Callable[[], bool]
    on_broken: Callable[[], None]
    time: Callable[[], float]
    call_later: Callable[[float, Callable[[], None]], asyncio.TimerHandle]

    def __post_init__(self) -> None:
        self._frames = RunFrames()
        # Bytes that were read beyond the rate, at that time.
        self._ahead = 0.0
        self._ahead_at = self.time()
        # Whether the rest waits for its turn, or for its rate.
        self._queued = False
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._empty = asyncio.Event()
        self._checking = asyncio.Lock()

    def feed(self, data: bytes) -> None:
        if not self._closed:
            self._frames.add(data)
            self.go_on()

    def go_on(self) -> None:
        """Read on, unless the rest waits for its turn already."""
        if not self._queued and self._timer is None and not self._closed:
            self._read(self.turns.free)

    async def emptied(self) -> None:
        """Wait until all that has come is read."""
        self._empty.clear()
        self.go_on()
        if not self._closed:
            await self._empty.wait()

    async def check(self, text: str, what: str, limit: int) -> None:
        """Raise NotStorable unless a text is JSON that can be stored; a long one is read in turns."""
        if len(text) <= CHECKED_AT_ONCE:
            return check_json_text(text, what, limit)
        check_size(text, what, limit)
        scan = Scan(text, what)
        async with self._checking:
            await self.turns.whole()
            while not scan.step():
                await self.turns.whole()

    def close(self) -> None:
        """Drop the rest: the run has ended, or its process does not keep to the protocol."""
        self._closed = True
        self._frames = RunFrames()
        self._empty.set()
        if self._timer is not None:
            self._timer.cancel()

    def _in_turn(self) -> None:
        self._queued = False
        if not self._closed:
            self._read(self.turns.left)

    def _in_time(self) -> None:
        self._timer = None
        if not self._closed:
            self._read(self.turns.free)

    def _read(self, has_turn: bool) -> None:
        try:
            while not self.holds():
                if not has_turn:
                    self._queued = True
                    self.turns.wait(self._in_turn)
                    break
                if (early := self._early()) > 0:
                    self._timer = self.call_later(early, self._in_time)
                    break
                found = self._frames.next()
                if found is None:
                    self.channel.resume_reading()
                    self._empty.set()
                    return
                message, size = found
                self._ahead += MESSAGE + size
                self.turns.spend(MESSAGE + size)
                self.receive(message)
                has_turn = self.turns.left
        except BrokenMessage:
            self.close()
            self.on_broken()
            return
        self.channel.pause_reading()

    def _early(self) -> float:
        """Seconds until the next message may be read."""
        now = self.time()
        self._ahead = max(0.0, self._ahead - (now - self._ahead_at) * RATE)
        self._ahead_at = now
        return (self._ahead - BURST) / RATE


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

    def __init__(
        self,
        number: int,
        folder: str,
        tell_zygote: Callable[[Message], None],
        *,
        brokered: bool = False,
        sealed: bool = False,
    ) -> None:
        """With `brokered` it gets a door to the broker; if `sealed`, that is its only way out."""
        self.number = number
        self.sealed = sealed
        self._brokered = brokered
        self._door: socket.socket | None = None
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
        """The descriptors for the process: channel, stdout, stderr and perhaps a door. Raises OSError."""
        ours, theirs = socket.socketpair()
        given = [theirs.detach()]
        try:
            self._socket, self._channel_open = ours, True
            await self._loop.create_connection(lambda: self, sock=ours)
            for source in _SOURCES:
                self._pipes[source], end = os.pipe()
                given.append(end)
                os.set_blocking(self._pipes[source], False)
            if self._brokered:
                self._door, outside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                given.append(outside.detach())
        except OSError:
            self.close()
            for descriptor in given:
                os.close(descriptor)
            raise
        return given

    def take_door(self) -> socket.socket | None:
        """The broker's end of its door; the caller closes it."""
        taken, self._door = self._door, None
        return taken

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
        if (door := self.take_door()) is not None:
            door.close()
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
