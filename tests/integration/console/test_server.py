"""The server in the worker's loop: it leaves signals alone, waits for its port, and cannot end the worker."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import signal
import socket
from collections.abc import AsyncIterator
from typing import Any, ClassVar, Literal

import httpx
import pytest
import uvicorn
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.fakes.limits import no_limits
from tests.fakes.ports import free_port
from worker.clock import SystemClock
from worker.errors import Busy, ConfigurationError
from worker.features.console.access import Access
from worker.features.console.server import build
from worker.features.console.wiring import ConsolePages
from worker.kit.web import listener as module
from worker.kit.web.connections import ClientDeadlines, Connections
from worker.kit.web.health import PATHS, Health
from worker.kit.web.listener import WebServer, bind, build_health
from worker.kit.web.side import Web
from worker.settings import Settings, load
from worker.settings.sections import LogSettings, WebSettings
from worker.telemetry.metrics import Metrics

NOTHING: Any = None


def application() -> ASGIApp:
    access = Access([], {}, NOTHING, org_role="viewer", limits=no_limits())
    return build(Health(Metrics(version="1.0")), NOTHING, access, SystemClock())


def serve(listen: str, listener: socket.socket | None) -> WebServer:
    return WebServer(application(), listen, listener, SystemClock())


async def wait_for(url: str) -> int:
    async with asyncio.timeout(10), httpx.AsyncClient() as client:
        while True:
            try:
                return (await client.get(url)).status_code
            except httpx.TransportError:
                await asyncio.sleep(0.02)


async def test_it_serves_leaves_signals_alone_and_ends_at_once_with_a_connection_open():
    listen = f"127.0.0.1:{free_port()}"
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    async with asyncio.timeout(5), httpx.AsyncClient() as client, serve(listen, bind(listen)).serving():
        assert (await client.get(f"http://{listen}/livez")).status_code == 200
        assert {number: signal.getsignal(number) for number in before} == before

    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*listen.split(":"))


async def test_a_port_that_is_taken_is_waited_for(monkeypatch, emitted):
    monkeypatch.setattr(module, "AGAIN", 0.05)
    listen = f"127.0.0.1:{free_port()}"
    other = bind(listen)
    async with serve(listen, None).serving():
        await asyncio.sleep(0.3)
        assert [one.event.name for one in emitted] == ["web.unavailable"]
        other.close()

        assert await wait_for(f"http://{listen}/livez") == 200


async def test_a_server_that_cannot_start_or_dies_is_started_again(monkeypatch, emitted):
    monkeypatch.setattr(module, "AGAIN", 0.05)
    faults: list[BaseException] = [SystemExit(1), OSError("broken"), RuntimeError("broken")]
    startup = uvicorn.Server.startup

    async def faulty(self: uvicorn.Server, sockets: Any = None) -> None:
        if faults:
            raise faults.pop()
        await startup(self, sockets=sockets)

    monkeypatch.setattr(uvicorn.Server, "startup", faulty)
    listen = f"127.0.0.1:{free_port()}"
    async with serve(listen, bind(listen)).serving():
        assert await wait_for(f"http://{listen}/livez") == 200

    assert [one.fields["loop"] for one in emitted if one.event.name == "loop.failed"] == ["web"] * 3


# As many as took health down before: 20 more than uvicorn's limit, and more than a listener's connections.
MANY = 520, 700


@contextlib.asynccontextmanager
async def as_it_was(app: ASGIApp, listener: socket.socket) -> AsyncIterator[None]:
    """uvicorn with its own limit of 500 connections."""
    config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None, limit_concurrency=500)
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    task = asyncio.create_task(server.serve(sockets=[listener]))
    yield
    server.should_exit = server.force_exit = True
    await task


@pytest.mark.parametrize("count", MANY)
@pytest.mark.parametrize("control", [True, False], ids=["control", "limits"])
async def test_idle_connections_do_not_keep_health_or_api_out(count: int, control: bool):
    app = application()
    listen = f"127.0.0.1:{free_port()}"
    listener = bind(listen)
    running = as_it_was(app, listener) if control else serve(listen, listener).serving()
    async with running, httpx.AsyncClient(base_url=f"http://{listen}") as client:
        idle = [await asyncio.open_connection(*listen.split(":")) for _ in range(count)]

        health = [(await client.get(path)).status_code for path in ("/livez", "/metrics")]
        api = (await client.get("/api/v1/runs")).status_code

        assert (health, api) == (([503, 503], 503) if control else ([200, 200], 401))
        for _, writer in idle:
            writer.close()


@pytest.mark.parametrize(
    "head", [b"GET /livez HTTP/1.1\r\n", b"POST /login HTTP/1.1\r\norigin: http://x\r\ncontent-length: 9\r\n"]
)
async def test_a_slow_client_is_told_that_it_was_too_slow_and_is_closed(head: bytes):
    listen = f"127.0.0.1:{free_port()}"
    deadlines = ClientDeadlines(headers=0.2, body=0.2)
    server = WebServer(application(), listen, bind(listen), SystemClock(), deadlines=deadlines)
    async with asyncio.timeout(10), server.serving():
        reader, writer = await asyncio.open_connection(*listen.split(":"))
        writer.write(head + b"host: x\r\n" + (b"\r\n" if head.startswith(b"POST") else b""))

        assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
        writer.close()


async def test_a_client_that_takes_nothing_of_its_response_is_closed_by_the_kernel(monkeypatch):
    """The control, without a deadline, began before and is still open by then."""
    gone = asyncio.Event()

    class Watched(Connections):
        def remove(self, connection: Any) -> None:
            super().remove(connection)
            gone.set()

    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(b"x" * 50_000_000)(scope, receive, send)

    @contextlib.asynccontextmanager
    async def reading_nothing(connections: Connections, unread: int) -> AsyncIterator[None]:
        monkeypatch.setattr(module, "UNREAD", unread)
        listen = f"127.0.0.1:{free_port()}"
        server = WebServer(large, listen, bind(listen), SystemClock(), connections=connections)
        async with server.serving():
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect(("127.0.0.1", int(listen.rpartition(":")[2])))
                client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
                yield

    control, limited = Connections(), Watched()
    async with reading_nothing(control, 0), reading_nothing(limited, 300):
        await asyncio.wait_for(gone.wait(), 20)

        assert (len(control), len(limited)) == (1, 0)


def with_console(settings: Settings, health: Health) -> Web:
    clock = SystemClock()
    return Web(settings, clock, health, ConsolePages(settings, clock, health))


@pytest.mark.parametrize("listening", [True, False], ids=["both", "health-only"])
async def test_health_has_a_listener_of_its_own(sqlite_url: str, listening: bool):
    """A worker may also serve health alone."""
    health_listen = f"127.0.0.1:{free_port()}"
    listen = f"127.0.0.1:{free_port()}" if listening else ""
    settings = load(
        None, {"database.url": sqlite_url, "web.listen": listen, "web.health_listen": health_listen}, {}
    )
    web = with_console(settings, Health(Metrics(version="1.0")))
    web.bind()
    async with web.serving(), httpx.AsyncClient() as client:
        for path in PATHS:
            assert (await client.get(f"http://{health_listen}{path}")).status_code in (200, 503)
            if listening:
                assert (await client.get(f"http://{listen}{path}")).status_code == 404
        assert (await client.get(f"http://{health_listen}/api/v1/runs")).status_code == 404
        if listening:
            assert (await client.get(f"http://{listen}/api/v1/runs")).status_code == 401


def test_a_port_for_health_that_is_taken_ends_the_worker(sqlite_url: str):
    with bind("127.0.0.1:0") as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        settings = load(None, {"database.url": sqlite_url, "web.health_listen": taken}, {})
        with pytest.raises(Busy, match=rf"\[web\] health_listen: another process has {taken}"):
            Web(settings, SystemClock(), Health(Metrics(version="1.0"))).bind()


def test_an_address_is_bound_or_refused_with_what_to_do():
    with bind("127.0.0.1:0") as listener:
        port = listener.getsockname()[1]
        with pytest.raises(Busy, match=f"another process has 127.0.0.1:{port}") as caught:
            bind(f"127.0.0.1:{port}")
    assert caught.value.exit_code == 75
    with pytest.raises(ConfigurationError, match=r"cannot listen on 192\.0\.2\.1:8470"):
        bind("192.0.2.1:8470")
    with pytest.raises(ConfigurationError, match="cannot listen on"):
        bind("no-such-host.invalid:8470")


def default_listen(listen: str) -> WebSettings:
    """Settings as of a file that does not name `listen`, with another default."""
    default = WebSettings.model_construct(listen=listen, metrics_top_orgs=0)
    default.model_fields_set.clear()
    return default


class Said:
    def __init__(self, web: WebSettings, style: Literal["", "console", "json"] = "") -> None:
        self.web = web
        self.log = LogSettings(style=style)


@pytest.mark.parametrize("style", ["", "json"])
async def test_a_taken_default_port_is_one_plain_line_with_the_fix(
    style: Literal["", "json"], monkeypatch, emitted, capsys
):
    """Who asked for a log in JSON gets the event instead: the control."""
    monkeypatch.setattr(module, "AGAIN", 0.02)
    with bind("127.0.0.1:0") as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        settings = Said(default_listen(taken), style)
        web = Web(settings, SystemClock(), Health(Metrics(version="1.0")))  # type: ignore[arg-type]
        web.bind()
        line = capsys.readouterr().err
        async with web._server(application(), taken, web._listener):
            await asyncio.sleep(0.1)
            other.close()
            assert await wait_for(f"http://{taken}/livez") == 200

    events = [one.event.name for one in emitted]
    assert events[-1] == "web.listening"
    if style == "json":
        assert line == ""
        assert events[0] == "web.unavailable"
    else:
        assert line.count("\n") == 1
        assert f"another process has {taken}" in line
        assert "--set web.listen=127.0.0.1:PORT" in line
        assert "web.unavailable" not in events


def test_only_a_port_that_was_asked_for_ends_the_worker(monkeypatch):
    """Two workers of one machine on PostgreSQL need no [web] in their worker.toml."""
    health = Health(Metrics(version="1.0"))
    with bind("127.0.0.1:0") as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(Busy):
            Web(Said(WebSettings(listen=taken)), SystemClock(), health).bind()  # type: ignore[arg-type]
        worker = Web(Said(default_listen(taken)), SystemClock(), health)  # type: ignore[arg-type]
        worker.bind()
        with pytest.raises(Busy):
            worker.bind(required=True)


class TestAsConfigured:
    """Over a real socket, put together from worker.toml as a worker does it."""

    OPERATOR: ClassVar = {
        "name": "ada",
        "role": "viewer",
        "token_sha256": hashlib.sha256(b"adas-token").hexdigest(),
    }

    @contextlib.asynccontextmanager
    async def serving(self, database_url: str, **web: Any) -> AsyncIterator[httpx.AsyncClient]:
        listen = f"127.0.0.1:{free_port()}"
        settings = Settings.model_validate(
            {"database": {"url": database_url}, "web": {"listen": listen, "operators": [self.OPERATOR]} | web}
        )
        health = Health(Metrics(version="1.0", top_orgs=settings.web.metrics_top_orgs))
        made = with_console(settings, health)
        made.bind(required=True)
        async with asyncio.timeout(30), made.serving():
            await wait_for(f"http://{listen}/livez")
            async with httpx.AsyncClient(base_url=f"http://{listen}") as client:
                yield client

    async def guess(self, client: httpx.AsyncClient, count: int, forwarded: str = "") -> list[int]:
        seen = []
        for number in range(count):
            headers = {"authorization": f"Bearer guess-{number}"}
            headers |= {"x-forwarded-for": forwarded} if forwarded else {}
            seen.append((await client.get("/api/v1/runs", headers=headers)).status_code)
        return seen

    async def test_guesses_are_limited_whatever_header_they_carry(self, migrated_sqlite_url: str):
        async with self.serving(migrated_sqlite_url, logins_per_minute=3) as client:
            seen = [(await self.guess(client, 1, f"192.0.2.{n}"))[0] for n in range(5)]

            assert seen == [401] * 3 + [429] * 2
            headers = {"authorization": "Bearer adas-token"}
            refused = await client.get("/api/v1/runs", headers=headers)
            assert (refused.status_code, int(refused.headers["retry-after"]) > 0) == (429, True)

    async def test_behind_a_trusted_proxy_each_client_counts_for_itself(self, migrated_sqlite_url: str):
        trusted = ["127.0.0.1/32"]
        async with self.serving(migrated_sqlite_url, logins_per_minute=3, trusted_proxies=trusted) as client:
            assert await self.guess(client, 5, "192.0.2.1") == [401] * 3 + [429] * 2
            assert await self.guess(client, 5, "192.0.2.2") == [401] * 3 + [429] * 2
            assert await self.guess(client, 5) == [401] * 5

    async def test_public_url_and_the_token_of_metrics_are_in_force(self, migrated_sqlite_url: str):
        async with self.serving(
            migrated_sqlite_url, public_url="https://jobs.acme.com", metrics_top_orgs=3
        ) as client:
            page = await client.get("/")
            assert page.headers["set-cookie"].startswith("__Host-orgworker_login=")
            assert (await client.get("/metrics")).status_code == 401
            headers = {"authorization": "Bearer adas-token"}
            assert (await client.get("/metrics", headers=headers)).status_code == 200

    async def test_where_no_api_is_served_the_metrics_know_operators(self):
        settings = Settings.model_validate({"web": {"listen": "", "operators": [self.OPERATOR]}})
        health = Health(Metrics(version="1.0", top_orgs=3))
        alone = httpx.ASGITransport(build_health(health))
        async with (
            with_console(settings, health).serving(),
            httpx.AsyncClient(transport=alone, base_url="http://127.0.0.1:8471") as client,
        ):
            headers = {"authorization": "Bearer adas-token"}
            assert (await client.get("/metrics", headers=headers)).status_code == 200
            assert (await client.get("/metrics")).status_code == 401
