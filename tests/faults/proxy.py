"""A TCP proxy in a thread of its own that fails on command: pass, delay, hang, refuse, reset, cut."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from types import TracebackType
from typing import ClassVar, Literal, Protocol

Mode = Literal["pass", "delay", "hang", "refuse", "reset"]
Verdict = Literal["pass", "cut", "hold", "mute"]
DELAY = 0.2


class Watch(Protocol):
    """Sees what one connection's client sends, and says what becomes of it.

    `cut` means that it arrives and its answer does not; `hold` that it waits for `let_go`;
    `mute` that it arrives, as all that follows, and every answer waits for `let_go`.
    """

    left: ClassVar[int]

    def sees(self, data: bytes) -> Verdict: ...


class Proxy:
    """Stands before a server on loopback; `mode` holds for new connections and for those that are open.

    `cut_after` ends each new connection once the server has sent that many bytes on it;
    `watch` makes one for each new connection. `ports` are those that the server sees.
    """

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.mode: Mode = "pass"
        self.cut_after: int | None = None
        self.watch: type[Watch] | None = None
        self._let_go = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._serving = threading.Event()
        self._open: dict[asyncio.StreamWriter, _Connection] = {}
        self.ports: set[int] = set()
        self._passing = asyncio.Event()
        self._ended = asyncio.Event()

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._serving.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    def become(self, mode: Mode) -> None:
        """Fail from now on, or no longer. With refuse and reset whatever is open ends."""
        self._loop.call_soon_threadsafe(self._become, mode)

    def stall(self) -> None:
        """Let nothing more through what is open now; new connections pass, as after a failover."""
        self._loop.call_soon_threadsafe(self._stall)

    def _stall(self) -> None:
        for connection in self._open.values():
            connection.going.clear()

    def let_go(self) -> None:
        """Let pass what a watch has had held."""
        self._loop.call_soon_threadsafe(self._let_go.set)

    def _become(self, mode: Mode) -> None:
        self.mode = mode
        (self._passing.clear if mode == "hang" else self._passing.set)()
        if mode in ("refuse", "reset"):
            for writer, connection in self._open.items():
                connection.going.set()
                self._end(writer)

    def _end(self, writer: asyncio.StreamWriter) -> None:
        # RST, as from a peer that is gone: nobody is told politely.
        with contextlib.suppress(OSError):  # it is closed already
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._passing.set()
        server = await asyncio.start_server(self._connected, sock=self._listener)
        self._serving.set()
        async with server:
            await self._ended.wait()
            self._become("reset")
            self._let_go.set()
            while self._open:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.mode in ("refuse", "reset"):
            self._end(writer)
            return
        try:
            theirs, ours = await asyncio.open_connection("127.0.0.1", self._server_port)
        except OSError:  # nobody is there
            self._end(writer)
            return
        port = ours.get_extra_info("sockname")[1]
        self.ports.add(port)
        watch = None if self.watch is None else self.watch()
        connection = self._open[writer] = _Connection(self.cut_after, watch, self._let_go)
        both = [
            asyncio.create_task(self._pump(reader, ours, connection, connection.asked)),
            asyncio.create_task(self._pump(theirs, writer, connection, connection.answered)),
        ]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for task in both:
            task.cancel()
        await asyncio.wait(both)
        self._end(writer)
        ours.close()
        self.ports.discard(port)
        del self._open[writer]

    async def _pump(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        connection: _Connection,
        through: _Through,
    ) -> None:
        try:
            while data := await source.read(65_536):
                if self.mode == "delay":
                    await asyncio.sleep(DELAY)
                await self._passing.wait()
                await connection.going.wait()
                allowed, last = await through(data)
                sink.write(allowed)
                await sink.drain()
                if last:
                    return
        except OSError:  # one side is gone: so is the connection
            return


class _Through(Protocol):
    async def __call__(self, data: bytes) -> tuple[bytes, bool]:
        """What may pass, and whether it was the last."""
        ...


class _Connection:
    def __init__(self, cut_after: int | None, watch: Watch | None, let_go: asyncio.Event) -> None:
        self._left = cut_after
        self._watch = watch
        self._let_go = let_go
        self._cut = False
        self._mute = False
        self.going = asyncio.Event()
        self.going.set()

    async def asked(self, data: bytes) -> tuple[bytes, bool]:
        verdict = "pass" if self._watch is None else self._watch.sees(data)
        self._cut = self._cut or verdict == "cut"
        self._mute = self._mute or verdict == "mute"
        if verdict == "hold":
            await self._let_go.wait()
        return data, False

    async def answered(self, data: bytes) -> tuple[bytes, bool]:
        if self._cut:
            return b"", True
        if self._mute:
            await self._let_go.wait()
        if self._left is not None:
            data, self._left = data[: self._left], self._left - len(data)
            return data, self._left <= 0
        return data, False
