"""A service on loopback that answers with the headers it got, and keeps what it was sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Self


@dataclass(frozen=True)
class Seen:
    """One request as it arrived."""

    line: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Service:
    """`raw` is all that was sent to it."""

    port: int = 0
    requests: list[Seen] = field(default_factory=list)
    raw: bytearray = field(default_factory=bytearray)
    _open: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._open.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def pause(self) -> None:
        """Answer no request until `go_on`."""
        self._open.clear()

    def go_on(self) -> None:
        self._open.set()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Self]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await self._answer(reader, writer)
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        self.raw += asked
        line, *lines = asked.decode("latin-1").strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.raw += body
        self.requests.append(Seen(line, headers, body))
        await self._open.wait()
        text = json.dumps(headers).encode()
        echo = headers.get("authorization", "none")
        writer.write(
            f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\nX-Echo: {echo}\r\n\r\n".encode() + text
        )
        await writer.drain()
