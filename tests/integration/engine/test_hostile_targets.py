"""`http.request` and hostile targets: none is reached, and without the check each of them is.

Whatever is connected to ends at a listener on loopback, which counts: the addresses of
clouds and neighbours are never dialled.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import httpcore
import httpx
import pytest

from jobs.http_request import Params, http_request
from tests.fakes.network import Answers, Names
from tests.fakes.running import claims, token
from worker import PermanentError, addresses
from worker.clock import SystemClock
from worker.handlers import public_http
from worker.handlers.calling import call
from worker.handlers.context import Context
from worker.handlers.given import Cancellation, Given, HeldToken, Org, ThisRun
from worker.handlers.public_http import AddressRefused, PublicTransport
from worker.model.runs.outcome import Failed

PUBLIC = "93.184.216.34"
PORT = 19555

NAMES: Answers = {
    "localhost": ["127.0.0.1", "::1"],
    "localhost.": ["127.0.0.1"],
    "127.0.0.1.": ["127.0.0.1"],
    "loopback.test": ["127.0.0.1"],
    "loopback6.test": ["::1"],
    "private.test": ["10.0.0.5"],
    "metadata.test": ["169.254.169.254"],
    "mapped.test": ["::ffff:10.0.0.5"],
    "mixed.test": [PUBLIC, "192.168.1.1"],
    "public.test": [PUBLIC],
}
# First a public address, for whoever checks; then another, for whoever asks again to connect.
REBINDING: Answers = {
    "rebind.test": [[PUBLIC], ["127.0.0.1"]],
    "rebind6.test": [[PUBLIC], ["::1"]],
    "rebind-metadata.test": [[PUBLIC], ["169.254.169.254"]],
    "rebind-mapped.test": [[PUBLIC], ["::ffff:127.0.0.1"]],
}

LITERAL = [
    f"http://127.0.0.1:{PORT}/",
    f"https://127.0.0.1:{PORT}/",
    f"http://127.255.255.254:{PORT}/",
    f"http://0.0.0.0:{PORT}/",
    f"http://10.0.0.5:{PORT}/",
    f"http://172.16.0.1:{PORT}/",
    f"http://192.168.1.1:{PORT}/",
    f"http://100.64.0.1:{PORT}/",
    "http://169.254.169.254/latest/meta-data/iam/security-credentials/",
    "http://169.254.170.2/v2/credentials/",
    "http://100.100.100.200/latest/meta-data/",
    "http://192.0.0.192/opc/v2/instance/",
    "http://168.63.129.16/machine/",
    f"http://[::1]:{PORT}/",
    f"http://[0:0:0:0:0:0:0:1]:{PORT}/",
    f"http://[::]:{PORT}/",
    f"http://[fe80::1]:{PORT}/",
    "http://[fd00:ec2::254]/latest/meta-data/",
    f"http://[::ffff:127.0.0.1]:{PORT}/",
    f"http://[::ffff:7f00:1]:{PORT}/",
    "http://[::ffff:169.254.169.254]/",
    f"http://[64:ff9b::127.0.0.1]:{PORT}/",
    f"http://[2002:7f00:1::]:{PORT}/",
    f"http://[2001:0:4136:e378:8000:63bf:80ff:fffe]:{PORT}/",
    f"http://[::127.0.0.1]:{PORT}/",
]
OTHER_FORMS = [
    f"http://2130706433:{PORT}/",
    f"http://0x7f000001:{PORT}/",
    f"http://017700000001:{PORT}/",
    f"http://0177.1:{PORT}/",
    f"http://0x7f.1:{PORT}/",
    f"http://127.1:{PORT}/",
    f"http://0:{PORT}/",
    "http://2852039166/latest/meta-data/",
    "http://0xa9.0xfe.0xa9.0xfe/latest/meta-data/",
    f"http://127。0。0。1:{PORT}/",
    f"http://127.0.0.1.:{PORT}/",
]
# httpx itself does not take these.
UNREADABLE = [
    f"http://0177.0.0.1:{PORT}/",
    f"http://１２７．０．０．１:{PORT}/",
    f"http:///127.0.0.1:{PORT}/",
    f"http://[::1:{PORT}/",
]
USERINFO = [
    f"http://public.test@127.0.0.1:{PORT}/",
    f"http://public.test:80@10.0.0.5:{PORT}/",
    f"http://public.test\\@127.0.0.1:{PORT}/",
    f"http://127.0.0.1:{PORT}#@public.test/",
]
RESOLVED = [
    f"http://localhost:{PORT}/",
    f"http://LOCALHOST.:{PORT}/",
    f"http://loopback.test:{PORT}/",
    f"http://loopback6.test:{PORT}/",
    f"http://private.test:{PORT}/",
    "http://metadata.test/latest/meta-data/",
    f"http://mapped.test:{PORT}/",
]
# A client that takes the first address reaches the public one, and the next time the other.
MIXED = [f"http://mixed.test:{PORT}/"]
REBOUND = [f"http://{host}:{PORT}/" for host in REBINDING]
# The public site answers with a redirect to what follows the ?.
REDIRECTS = [
    f"http://public.test/?http://127.0.0.1:{PORT}/",
    "http://public.test/?http://169.254.169.254/latest/meta-data/",
    f"http://public.test/?http://[::ffff:127.0.0.1]:{PORT}/",
    f"http://public.test/?http://2130706433:{PORT}/",
    f"http://public.test/?http://private.test:{PORT}/",
    f"http://public.test/?http://public.test/?http://127.0.0.1:{PORT}/",
]
REFUSED_AT_ONCE = [*LITERAL, *OTHER_FORMS, *USERINFO, *RESOLVED, *MIXED]
TARGETS = [*REFUSED_AT_ONCE, *REBOUND, *REDIRECTS, *UNREADABLE]


@dataclass
class Site:
    """A victim that counts connections, and a public site that redirects; both listen on loopback."""

    victim: int
    redirector: int
    reached: int = 0
    passed: list[str] = field(default_factory=list)


@dataclass
class Network(httpcore.AsyncNetworkBackend):
    """Connects public addresses to the public site, and all others to the victim."""

    site: Site
    names: Names
    dialled: list[str] = field(default_factory=list)

    async def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        # As a system does that is given a name: it resolves it and takes the first address.
        address = (await self.names.resolve(host, port))[0]
        self.dialled.append(address)
        listener = self.site.redirector if address == PUBLIC else self.site.victim
        return await httpcore.AnyIOBackend().connect_tcp("127.0.0.1", listener, timeout=5.0)


@asynccontextmanager
async def listening() -> AsyncIterator[Site]:
    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        site.reached += 1
        first = await reader.read(1)
        if first != b"\x16":  # TLS is not spoken here
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nsecret")
            await writer.drain()
        writer.close()

    async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = (await reader.readuntil(b"\r\n\r\n")).decode().partition("\r\n")[0]
        site.passed.append(line)
        location = line.split(" ")[1].partition("?")[2]
        status = f"302 Found\r\nLocation: {location}" if location else "200 OK"
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()
        writer.close()

    victim = await asyncio.start_server(count, "127.0.0.1", 0)
    redirector = await asyncio.start_server(redirect, "127.0.0.1", 0)
    site = Site(victim.sockets[0].getsockname()[1], redirector.sockets[0].getsockname()[1])
    async with victim, redirector:
        yield site


class Idle:
    """The line to a worker that has nothing to say."""

    async def save(self, data_json: str) -> None: ...

    async def token(self, *, fresh: bool) -> Any:
        raise AssertionError("no origin is listed: the token is not asked for")

    def progress(self, done: float, total: float | None, note: str | None) -> None: ...


def context(url: str, network: Network) -> Context[Any, Any]:
    """The context of a run whose public client uses this network."""
    now = datetime.now(UTC)
    held = HeldToken(token(), claims(), SystemClock())
    given: Given[Any, Any] = Given(
        org=Org("org_acme", "Acme"),
        run=ThisRun("run-1", now, 1, 1, "key-1"),
        params=Params(url=url, timeout=5),
        settings={},
        checkpoint=None,
        deadline=now + timedelta(hours=1),
        api_origins=(),
        log=logging.getLogger("tests.targets"),
        held=held,
    )
    transport = PublicTransport((), resolve=network.names.resolve, network=network)
    return Context(given, Idle(), Cancellation(), {"public_http": transport})


def network_of(site: Site) -> Network:
    return Network(site, Names({**NAMES, **REBINDING}))


async def test_http_request_reaches_none_of_them() -> None:
    assert len(TARGETS) == len(set(TARGETS)) >= 40
    async with listening() as site:
        for url in TARGETS:
            network = network_of(site)

            outcome = await call(http_request, context(url, network))

            assert site.reached == 0, url
            if url in REBOUND or url in REDIRECTS:
                # The public address was checked, and it is the public site that answers.
                assert network.dialled == [PUBLIC], url
                continue
            assert network.dialled == [], url
            assert isinstance(outcome, Failed) and outcome.permanent, (url, outcome)
            why = "is not a URL" if url in UNREADABLE else "reaches public addresses only"
            assert why in outcome.error.message, (url, outcome)


async def test_no_redirect_leads_to_them_where_a_handler_follows_it() -> None:
    async with listening() as site:
        for url in [*REFUSED_AT_ONCE, *REBOUND, *REDIRECTS]:
            network = network_of(site)
            client = context(url, network).public_http
            if url in REBOUND:
                await client.get(url, follow_redirects=True)
            else:
                with pytest.raises(AddressRefused):
                    await client.get(url, follow_redirects=True)

            assert site.reached == 0, url
            assert set(network.dialled) <= {PUBLIC}, url


async def test_without_the_check_each_of_them_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the same requests, with every address taken for public."""
    monkeypatch.setattr(addresses, "kind_of", lambda address: None)
    async with listening() as site:
        for url in [*LITERAL, *OTHER_FORMS, *USERINFO, *RESOLVED, *REDIRECTS]:
            before = site.reached
            client = context(url, network_of(site)).public_http
            try:
                await client.get(url, follow_redirects=True)
            except httpx.ConnectError:
                assert url.startswith("https:")
            assert site.reached == before + 1, url


async def test_a_check_that_resolves_apart_from_the_connection_is_got_past() -> None:
    """The control for rebinding: check the name, then let the connection resolve it again."""
    async with listening() as site:
        for url in REBOUND:
            before = site.reached
            network = network_of(site)
            host = httpx.URL(url).host
            public_http.check_addresses(httpx.URL(url), await network.names.resolve(host, PORT))
            async with httpx.AsyncClient(transport=PublicTransport([url], network=network)) as client:
                await client.get(url)
            assert site.reached == before + 1, url


class Victim:
    """Answers 200 to each connection and counts them."""

    def __init__(self) -> None:
        self.reached = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.reached += 1
            with connection:
                connection.recv(65_536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture
def victim() -> Iterator[Victim]:
    """A listener on 127.0.0.1 for handlers in processes of their own."""
    found = Victim()
    yield found
    found.close()


HERE = ("127.0.0.1", "2130706433", "0x7f.1", "0177.1", "public.test@127.0.0.1", "0.0.0.0", "localhost")


@pytest.mark.parametrize("host", HERE)
def test_a_run_in_a_process_of_its_own_reaches_this_machine_only_where_that_is_listed(
    orgworker: Any, victim: Victim, host: str
) -> None:
    """With the system's own resolver and network; the run whose origin is private is the control."""
    url = f"http://{host}:{victim.port}/"
    origin = f"http://{host.rpartition('@')[2]}:{victim.port}"
    run: dict[str, Any] = {"params": {"url": url}, "definition": {"max_attempts": 1}, "place": "child"}

    refused = orgworker.run("http.request", **run)
    assert (refused.state, victim.reached) == ("failed", 0)
    assert "[execution] private_origins" in refused.error["message"]

    private = orgworker.run("http.request", private_origins=[origin], **run)
    assert (private.state, victim.reached) == ("succeeded", 1)
    if host == HERE[0]:
        listed = orgworker.run("http.request", api_origins=[origin], **run)
        assert (listed.state, victim.reached) == ("succeeded", 2)


def test_permanent_errors_are_what_a_refusal_is() -> None:
    assert issubclass(AddressRefused, PermanentError)
