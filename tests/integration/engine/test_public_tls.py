"""`ctx.public_http` over TLS: it connects to an address, and the certificate must be for the name."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpcore
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.fakes.network import Names
from worker.handlers import public_http
from worker.handlers.public_http import BlockingPublicTransport, PublicTransport

PUBLIC = "93.184.216.34"
NAMES = Names({"api.test": [PUBLIC], "other.test": [PUBLIC]})


@dataclass
class Server:
    """Listens on loopback with a certificate for api.test; `asked` are the names of SNI."""

    port: int = 0
    asked: list[str | None] = field(default_factory=list)


class Network(httpcore.AsyncNetworkBackend):
    """Connects every address to the server, none to itself."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        assert (host, port) == (PUBLIC, 443)
        return await httpcore.AnyIOBackend().connect_tcp("127.0.0.1", self._server.port, timeout=5.0)


class BlockingNetwork(httpcore.NetworkBackend):
    """The same for a client that blocks."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        assert (host, port) == (PUBLIC, 443)
        return httpcore.SyncBackend().connect_tcp("127.0.0.1", self._server.port, timeout=5.0)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for api.test that signs itself, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "api.test")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # OpenSSL's clock stays at the real time where a test's is shifted.
        .not_valid_before(now - timedelta(days=3650))
        .not_valid_after(now + timedelta(days=3650))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("api.test")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path / "api.test.pem"
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return file


@asynccontextmanager
async def serving(certificate: Path) -> AsyncIterator[Server]:
    server = Server()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
        await writer.drain()
        writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.sni_callback = lambda _, name, __: server.asked.append(name)
    listener = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    server.port = listener.sockets[0].getsockname()[1]
    async with listener:
        yield server


@pytest.mark.parametrize("kind", ["async", "blocking"])
async def test_the_certificate_is_checked_against_the_name(
    certificate: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusting = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(public_http, "tls_context", lambda: trusting)
    async with serving(certificate) as server:

        async def get(url: str) -> httpx.Response:
            if kind == "async":
                transport = PublicTransport((), resolve=NAMES.resolve, network=Network(server))
                async with httpx.AsyncClient(transport=transport) as client:
                    return await client.get(url)
            blocking = BlockingPublicTransport((), resolve=NAMES.blocking, network=BlockingNetwork(server))
            with httpx.Client(transport=blocking) as blocking_client:
                return await asyncio.to_thread(blocking_client.get, url)

        assert (await get("https://api.test/")).text == "ok"
        with pytest.raises(httpx.ConnectError, match="not valid for 'other.test'"):
            await get("https://other.test/")

    assert server.asked == ["api.test", "other.test"]


async def test_a_certificate_that_nobody_vouches_for_is_refused(certificate: Path) -> None:
    async with serving(certificate) as server:
        transport = PublicTransport((), resolve=NAMES.resolve, network=Network(server))
        async with httpx.AsyncClient(transport=transport) as client:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await client.get("https://api.test/")
