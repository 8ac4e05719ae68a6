"""Connections to issuers on real sockets: what is sent at once, and what the other side may do to them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import httpcore
import httpx
import pytest

from worker import connections
from worker.connections import Sockets
from worker.outbound import OutboundConnections

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[int]:
    """The port of a server that answers each connection so."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await answer(reader, writer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as running:
        yield running.sockets[0].getsockname()[1]


async def connect(port: int) -> httpcore.AsyncNetworkStream:
    return await Sockets().connect_tcp("127.0.0.1", port)


async def test_a_request_is_sent_as_a_whole() -> None:
    received: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await reader.read(65536))
        writer.write(OK)

    async with server(answer) as port:
        pool = OutboundConnections(None)
        request = httpx.Request("POST", f"http://127.0.0.1:{port}/token", content=b"a=b")
        response = await pool.handle_async_request(request)
        assert await response.aread() == b"ok"
        await response.aclose()
        await pool.aclose()

    [head_and_body] = received
    assert head_and_body.startswith(b"POST /token HTTP/1.1\r\n")
    assert head_and_body.endswith(b"\r\n\r\na=b")


async def test_what_is_too_much_is_sent_in_parts_and_read_in_parts() -> None:
    size = 20 * connections.UNREAD

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(size))
        await writer.drain()

    async with server(answer) as port:
        stream = await connect(port)
        for _ in range(size // 65536):
            await stream.write(b"x" * 65536)
        parts = [await stream.read(65536)]
        while parts[-1]:
            parts.append(await stream.read(65536))

    assert max(map(len, parts)) <= 65536
    assert sum(map(len, parts)) == size


async def test_reading_pauses_while_data_is_not_taken() -> None:
    sent = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        while True:
            writer.write(b"x" * connections.UNREAD)
            sent += connections.UNREAD
            await writer.drain()

    async with server(answer) as port:
        stream = await connect(port)
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.2)

        assert stream.get_extra_info("is_readable")
        assert len(await stream.read(1 << 30)) <= 3 * connections.UNREAD
        await stream.aclose()


async def test_a_connection_that_the_other_side_closed_is_not_used() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        return

    async with server(answer) as port:
        stream = await connect(port)
        assert await stream.read(10) == b""
        assert stream.get_extra_info("is_readable")
        with pytest.raises(httpcore.WriteError):
            await stream.write(b"GET")


async def test_a_silent_side_and_a_closed_port_are_reported() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with server(answer) as port:
        stream = await connect(port)
        assert not stream.get_extra_info("is_readable")
        with pytest.raises(httpcore.ReadTimeout):
            await stream.read(10, timeout=0.01)
        await stream.aclose()
    with pytest.raises(httpcore.ConnectError):
        await connect(port)
