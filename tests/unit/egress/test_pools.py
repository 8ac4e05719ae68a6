"""Connections that are kept for the next request of their org."""

from __future__ import annotations

import ssl
from types import SimpleNamespace
from typing import Any

import httpcore
import pytest

from tests.fakes.network import OK
from worker.connections import Sockets
from worker.features.egress.attempts import Totals
from worker.features.egress.network import Pools
from worker.features.egress.pacing import Slot
from worker.features.egress.streams import _Exchange, _Sending
from worker.guard.urls import Origin


async def test_a_request_that_takes_longer_than_a_look_keeps_its_connection_where_it_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Meanwhile the org has no idle connection. One that no pool has would stay open."""

    class Answer(httpcore.AsyncMockStream):
        async def read(self, *args: Any, **kwargs: Any) -> bytes:
            await pools.tidy()
            return await super().read(*args, **kwargs)

    async def connect(self: Sockets, *args: Any, **kwargs: Any) -> Answer:
        return Answer([OK])

    async def resolve(host: str, port: int) -> list[str]:
        return [host]

    async def admit(attempt: object, origin: Origin) -> Slot:
        return Slot(0.0, lambda: True, lambda: None)

    async def passed(self: _Exchange, sending: Any, response: httpcore.Response, totals: Any) -> None:
        await response.aread()

    async def no_body(self: _Exchange, totals: Any) -> Any:
        return
        yield b""

    monkeypatch.setattr(Sockets, "connect_tcp", connect)
    monkeypatch.setattr(_Exchange, "_passed", passed)
    monkeypatch.setattr(_Exchange, "_counted", no_body)
    pools = Pools(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), lambda: True, resolve)
    broker: Any = SimpleNamespace(pools=pools, admit=admit, may_send=lambda: True)
    attempt: Any = SimpleNamespace(org="acme", stopped=False, checks_address=lambda request: False)
    url = httpcore.URL("http://192.0.2.1/")
    request: Any = SimpleNamespace(
        method="GET", url=lambda: url, origin=Origin("http", "192.0.2.1", 80), timeout={}, target=b"/"
    )
    run: Any = SimpleNamespace(write_now=lambda data: None)

    sending = _Sending(request, [(b"Host", b"192.0.2.1")], masked=False, authorized=False)
    assert await _Exchange(broker, attempt, run)._sent(sending, Totals()) == 200

    assert (await pools.of("acme", checked=False).take(url)).is_idle()
