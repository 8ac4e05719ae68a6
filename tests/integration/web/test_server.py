"""The server in the worker's loop: it leaves signals alone, waits for its port, and cannot end the worker."""

from __future__ import annotations

import asyncio
import signal
import socket
from typing import Any

import httpx
import pytest

from tests.fakes.ports import free_port
from worker.clock import SystemClock
from worker.errors import Busy, ConfigurationError
from worker.settings.sections import WebSettings
from worker.telemetry.metrics import Metrics
from worker.web import server as module
from worker.web.access import Access
from worker.web.app import build
from worker.web.health import Health
from worker.web.server import WebServer, bind
from worker.wiring.web import Web

NOTHING: Any = None


def serve(listen: str, listener: socket.socket | None) -> WebServer:
    access = Access([], {}, NOTHING, org_role="viewer")
    app = build(Health(Metrics(version="1.0")), NOTHING, access, SystemClock())
    return WebServer(app, listen, listener, SystemClock())


async def wait_for(url: str) -> int:
    async with asyncio.timeout(10), httpx.AsyncClient() as client:
        while True:
            try:
                return (await client.get(url)).status_code
            except httpx.TransportError:
                await asyncio.sleep(0.02)


@pytest.mark.anyio
async def test_it_serves_leaves_signals_alone_and_ends_at_once_with_a_connection_open():
    listen = f"127.0.0.1:{free_port()}"
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    async with asyncio.timeout(5), httpx.AsyncClient() as client, serve(listen, bind(listen)).serving():
        assert (await client.get(f"http://{listen}/livez")).status_code == 200
        assert {number: signal.getsignal(number) for number in before} == before

    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*listen.split(":"))


@pytest.mark.anyio
async def test_a_port_that_is_taken_is_waited_for(monkeypatch, emitted):
    monkeypatch.setattr(module, "AGAIN", 0.05)
    listen = f"127.0.0.1:{free_port()}"
    other = bind(listen)
    async with serve(listen, None).serving():
        await asyncio.sleep(0.3)
        assert [one.event.name for one in emitted] == ["web.unavailable"]
        other.close()

        assert await wait_for(f"http://{listen}/livez") == 200


@pytest.mark.anyio
async def test_a_server_that_cannot_start_or_dies_is_started_again(monkeypatch, emitted):
    monkeypatch.setattr(module, "AGAIN", 0.05)
    faults: list[BaseException] = [SystemExit(1), OSError("broken"), RuntimeError("broken")]
    startup = module._Server.startup

    async def faulty(self: Any, sockets: Any = None) -> None:
        if faults:
            raise faults.pop()
        await startup(self, sockets=sockets)

    monkeypatch.setattr(module._Server, "startup", faulty)
    listen = f"127.0.0.1:{free_port()}"
    async with serve(listen, bind(listen)).serving():
        assert await wait_for(f"http://{listen}/livez") == 200

    assert [one.fields["loop"] for one in emitted if one.event.name == "loop.failed"] == ["web"] * 3


def test_an_address_is_bound_or_refused_with_what_to_do():
    with bind("127.0.0.1:0") as listener:
        port = listener.getsockname()[1]
        with pytest.raises(Busy, match=f"another process has 127.0.0.1:{port}") as caught:
            bind(f"127.0.0.1:{port}")
    assert caught.value.exit_code == 75
    with pytest.raises(ConfigurationError, match=r"192\.0\.2\.1:8470 cannot be listened on"):
        bind("192.0.2.1:8470")
    with pytest.raises(ConfigurationError, match="cannot be listened on"):
        bind("no-such-host.invalid:8470")


def test_only_a_port_that_was_asked_for_ends_the_worker(monkeypatch):
    """Two workers of one machine on PostgreSQL need no [web] in their worker.toml."""

    class Said:
        def __init__(self, web: WebSettings) -> None:
            self.web = web

    health = Health(Metrics(version="1.0"))
    with bind("127.0.0.1:0") as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(Busy):
            Web(Said(WebSettings(listen=taken)), SystemClock(), health).bind()  # type: ignore[arg-type]
        default = WebSettings.model_construct(listen=taken, metrics_top_orgs=0)
        default.model_fields_set.clear()
        worker = Web(Said(default), SystemClock(), health)  # type: ignore[arg-type]
        worker.bind()
        with pytest.raises(Busy):
            worker.bind(needed=True)
