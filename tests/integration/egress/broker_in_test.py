"""The broker's process as an object of the test, which speaks to it as a worker and as runs do."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, ClassVar

from tests.fakes.running import until
from worker.features.egress.broker import BrokerProcess
from worker.handlers.frames import DATA, END, FAILED, HEAD, Frame, Frames, frame, json_frame

TOKEN_PLACEHOLDER, KEY_PLACEHOLDER = "orgworker-placeholder-token", "orgworker-placeholder-key"


class Stream:
    """A stream as a run has it; `keeps` the broker's end too. `all` of them are closed with the broker."""

    all: ClassVar[list[Stream]] = []

    def __init__(self, door: socket.socket, *, keeps: bool = False) -> None:
        self.socket, self.theirs = socket.socketpair()
        self.socket.setblocking(False)
        socket.send_fds(door, [b"s"], [self.theirs.fileno()])
        self._loop = asyncio.get_running_loop()
        self._frames = Frames()
        if not keeps:
            self.theirs.close()
        self.all.append(self)

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self.socket, data)

    async def frames(self) -> AsyncIterator[Frame]:
        """Until the answer ends, or the stream."""
        while data := await self._loop.sock_recv(self.socket, 65_536):
            for found in self._frames.feed(data):
                yield found
                if found.kind in (END, FAILED):
                    return

    async def answer(self) -> list[Frame]:
        async with asyncio.timeout(5):
            with suppress(ConnectionError):
                return [found async for found in self.frames()]
        return []

    async def ended(self) -> bool:
        """Whether the broker closes it, within a second."""
        try:
            async with asyncio.timeout(1):
                while await self._loop.sock_recv(self.socket, 65_536):
                    pass
        except TimeoutError:
            return False
        except ConnectionError:
            pass
        return True

    def close(self) -> None:
        self.socket.close()
        self.theirs.close()


class Worker:
    """The worker's side of a broker in this process; `told` is what the broker says."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.control, theirs):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1024 * 1024)
        self.told: list[dict[str, Any]] = []
        self.tokens: list[str] = []
        self.answers = True
        self._doors: dict[int, socket.socket] = {}
        self.broker = BrokerProcess(theirs, ssl.create_default_context())
        asyncio.get_running_loop().add_reader(self.control, self._receive)

    def attempt(
        self, number: int, owner: str, *, value: str = "", org: str = "acme", **fields: Any
    ) -> socket.socket:
        """Introduce an attempt with the owner's API and secret; returns the run's end of its door."""
        about = {
            "lists": [["api", "http://127.0.0.1:1"]],
            "owners": ["handler"],
            "api_origins": [owner],
            "private_origins": ["http://127.0.0.1:1"],
            "insecure_origins": [],
            "revealed": False,
            "tokens": [[TOKEN_PLACEHOLDER, "", ""]],
            "traced": False,
        }
        self.send({"op": "attempt", "number": number, "org": org, **about, **fields})
        if value:
            secret = {"placeholder": KEY_PLACEHOLDER, "value": value, "origin": owner, "header": None}
            self.send({"op": "secret", "number": number, **secret})
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.send({"op": "door", "number": number}, theirs.fileno())
        theirs.close()
        self._doors[number] = ours
        return ours

    def send(self, message: dict[str, Any], *descriptors: int) -> None:
        socket.send_fds(self.control, [json.dumps(message).encode()], descriptors)

    async def end(self, number: int) -> list[dict[str, Any]]:
        """End an attempt; its record."""
        self.send({"op": "end", "number": number})
        rows = await until(lambda: [each["rows"] for each in self.told if self._is_end(each, number)])
        self._doors.pop(number).close()
        return list(rows[0])

    @staticmethod
    def _is_end(message: dict[str, Any], number: int) -> bool:
        return (message["op"], message.get("number")) == ("ended", number)

    def _receive(self) -> None:
        with suppress(BlockingIOError):
            while data := self.control.recv(256 * 1024):
                message = json.loads(data)
                self.told.append(message)
                if message["op"] == "ask" and message["call"] == "limits":
                    self.send({"op": "answer", "n": message["n"], "limits": [], "paused": 0})
                elif asks_token(message) and self.answers:
                    self.answer(message)

    def answer(self, question: dict[str, Any]) -> None:
        text = self.tokens.pop(0) if len(self.tokens) > 1 else self.tokens[0]
        self.send({"op": "answer", "n": question["n"], "text": text, "seconds": 60.0})

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.control)
        for door in self._doors.values():
            door.close()
        self.control.close()


def asks_token(message: dict[str, Any]) -> bool:
    """Whether the broker asks for the token of an attempt."""
    return message["op"] == "ask" and message["call"] == "token"


@asynccontextmanager
async def broker_in_test() -> AsyncIterator[Worker]:
    worker = Worker()
    serving = asyncio.create_task(worker.broker.serve())
    try:
        yield worker
    finally:
        while Stream.all:
            Stream.all.pop().close()
        for number in list(worker.broker.attempts):
            worker.broker._end(number)
        await asyncio.sleep(0.01)
        worker.close()
        await serving
        await worker.broker.pools.close()
        await asyncio.sleep(0.01)  # closed connections are gone
        worker.broker._control.close()


def head(url: str, **fields: Any) -> bytes:
    """The head of a GET."""
    host, _, port = url.removeprefix("http://").partition(":")
    common = {
        "method": "GET",
        "scheme": "http",
        "host": host,
        "port": int(port),
        "target": "/",
        "headers": [],
    }
    return json_frame(HEAD, {**common, "timeout": {}, "public": False, "fresh": False, **fields})


def get(url: str, **fields: Any) -> bytes:
    """A whole GET."""
    return head(url, **fields) + frame(END)


def text_of(frames: list[Frame]) -> str:
    """The body of an answer."""
    return b"".join(found.body for found in frames if found.kind == DATA).decode("latin-1")


def kinds(frames: list[Frame]) -> list[int]:
    return [found.kind for found in frames]


@asynccontextmanager
async def listening(serve: Any) -> AsyncIterator[str]:
    """The URL of a server on loopback, whose connections are aborted at the end."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        server.abort_clients()
        await asyncio.sleep(0.01)
