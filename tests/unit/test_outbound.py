"""Connections are used again only if they can be, and their errors are httpx's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import httpcore
import httpx
import pytest

from tests.fakes.clock import settle
from worker import connections
from worker.outbound import OutboundConnections

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Stream(httpcore.AsyncNetworkStream):
    """The other side of a connection: gives its parts one by one; one that is an exception is raised."""

    def __init__(self, parts: Iterable[bytes | Exception]) -> None:
        self.parts = list(parts)
        self.sent = b""
        self.is_closed = self.is_readable = False

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if not self.parts:
            await asyncio.Event().wait()
        part = self.parts.pop(0)
        if isinstance(part, Exception):
            raise part
        return part

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.sent += buffer

    async def aclose(self) -> None:
        self.is_closed = True

    def get_extra_info(self, info: str) -> Any:
        return self.is_readable if info == "is_readable" else None


class Network(httpcore.AsyncNetworkBackend):
    """Opens the given streams in turn."""

    def __init__(self, *streams: Stream | Exception) -> None:
        self.left = list(streams)
        self.opened: list[tuple[str, int, Stream]] = []

    async def connect_tcp(self, host: str, port: int, **options: Any) -> httpcore.AsyncNetworkStream:
        stream = self.left.pop(0)
        if isinstance(stream, Exception):
            raise stream
        self.opened.append((host, port, stream))
        return stream


async def get(pool: OutboundConnections, url: str = "http://127.0.0.1:8080/a?b=c") -> httpx.Response:
    response = await pool.handle_async_request(httpx.Request("GET", url))
    await response.aread()
    await response.aclose()
    return response


async def test_a_connection_is_used_for_the_next_request():
    network = Network(Stream([OK, OK]))
    pool = OutboundConnections(None, backend=network)

    responses = [await get(pool) for _ in range(2)]

    assert [(response.status_code, response.content) for response in responses] == [(200, b"ok")] * 2
    [(host, port, stream)] = network.opened
    assert (host, port) == ("127.0.0.1", 8080)
    assert stream.sent.count(b"GET /a?b=c HTTP/1.1\r\n") == 2
    await pool.aclose()
    assert stream.is_closed


async def test_requests_at_the_same_time_and_to_other_origins_have_their_own_connections():
    streams = [Stream([OK, OK]) for _ in range(3)]
    network = Network(*streams)
    pool = OutboundConnections(None, backend=network)
    open_responses = [
        await pool.handle_async_request(httpx.Request("GET", "http://127.0.0.1:8080/")) for _ in range(2)
    ]
    for response in open_responses:
        await response.aread()
        await response.aclose()

    await get(pool, "http://127.0.0.1:8081/")
    await get(pool)

    assert [port for _, port, _ in network.opened] == [8080, 8080, 8081]
    # The one that was used last is used first.
    assert [stream.sent.count(b"GET ") for stream in streams] == [1, 2, 1]


@pytest.mark.parametrize(
    ("first", "readable", "kept"),
    [
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", False, 5.0),
        (OK, True, 5.0),
        (OK, False, -1.0),
    ],
    ids=["the response says so", "the other side closed it", "idle for too long"],
)
async def test_a_connection_that_is_closed_or_old_is_not_used_again(
    first: bytes, readable: bool, kept: float
):
    streams = [Stream([first]), Stream([OK])]
    pool = OutboundConnections(None, kept=kept, backend=Network(*streams))
    await get(pool)
    streams[0].is_readable = readable

    assert (await get(pool)).content == b"ok"
    assert streams[0].is_closed
    assert streams[1].sent


async def test_a_response_that_is_not_read_to_its_end_closes_its_connection():
    streams = [Stream([OK[:-1]]), Stream([OK])]
    pool = OutboundConnections(None, backend=Network(*streams))
    response = await pool.handle_async_request(httpx.Request("GET", "http://127.0.0.1:8080/"))

    await response.aclose()
    await get(pool)

    assert streams[0].is_closed


async def test_a_cancelled_request_closes_its_connection():
    streams = [Stream([]), Stream([OK])]
    pool = OutboundConnections(None, backend=Network(*streams))
    hanging = asyncio.ensure_future(get(pool))
    await settle()

    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging

    assert streams[0].is_closed
    assert (await get(pool)).content == b"ok"


async def test_only_so_many_idle_connections_are_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "MAX_IDLE", 2)
    streams = [Stream([OK]) for _ in range(3)]
    pool = OutboundConnections(None, backend=Network(*streams))
    responses = [
        await pool.handle_async_request(httpx.Request("GET", "http://127.0.0.1:8080/")) for _ in range(3)
    ]
    for response in responses:
        await response.aread()
        await response.aclose()

    assert [stream.is_closed for stream in streams] == [True, False, False]


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (httpcore.ConnectError("refused"), httpx.ConnectError),
        (httpcore.ConnectTimeout("late"), httpx.ConnectTimeout),
        (Stream([httpcore.ReadError("reset")]), httpx.ReadError),
        (Stream([httpcore.ReadTimeout("late")]), httpx.TimeoutException),
        (Stream([b""]), httpx.RemoteProtocolError),
        (Stream([b"no HTTP at all\r\n\r\n"]), httpx.RemoteProtocolError),
        (Stream([OK[:-1], httpcore.ReadError("reset")]), httpx.ReadError),
    ],
    ids=["refused", "late", "reset", "read late", "closed", "malformed", "reset in the body"],
)
async def test_failures_are_those_of_httpx(failure: Stream | Exception, expected: type[Exception]):
    pool = OutboundConnections(None, backend=Network(failure, Stream([OK])))

    with pytest.raises(expected):
        await get(pool)

    assert (await get(pool)).content == b"ok"
