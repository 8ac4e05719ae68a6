"""Issuers are reached over TLS, and one with another certificate is not."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.fakes.certificates import make_certificate
from worker.clock import SystemClock
from worker.guard.http import Reply, exchange
from worker.outbound import OutboundConnections, open_client

RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A file with a key and its own certificate for 127.0.0.1."""
    return make_certificate(tmp_path / "issuer.pem")


@asynccontextmanager
async def serving(certificate: Path) -> AsyncIterator[tuple[str, list[str]]]:
    """The URL of a server, and the peers of its connections."""
    peers: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peers.append(str(writer.get_extra_info("peername")))
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(RESPONSE)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/", peers


async def test_one_connection_serves_several_requests(certificate: Path) -> None:
    async with serving(certificate) as (url, peers):
        transport = OutboundConnections(ssl.create_default_context(cafile=str(certificate)))
        async with open_client(transport) as client:
            for _ in range(3):
                reply = await exchange(client, "GET", url, clock=SystemClock(), limit=100)
                assert isinstance(reply, Reply)
                assert (reply.status, reply.content) == (200, b"ok")

    assert len(peers) == 1


async def test_a_certificate_of_no_known_authority_is_refused(certificate: Path) -> None:
    async with serving(certificate) as (url, _):
        async with open_client() as client:
            assert isinstance(client._transport, OutboundConnections)
            assert await exchange(client, "GET", url, clock=SystemClock(), limit=100) == "unreachable"
        transport = OutboundConnections(ssl.create_default_context())
        with pytest.raises(httpx.ConnectError):
            await transport.handle_async_request(httpx.Request("GET", url))


async def test_a_proxy_of_the_environment_is_used(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only httpx's own transport knows proxies."""
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    async with serving(certificate) as (url, peers), open_client() as client:
        assert client.direct is None
        assert await exchange(client, "GET", url, clock=SystemClock(), limit=100) == "unreachable"

    assert peers == []
