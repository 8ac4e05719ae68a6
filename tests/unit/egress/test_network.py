"""Whose connections begin next."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from typing import Any

import httpcore
import pytest

from worker.connections import Sockets
from worker.features.egress.network import Pools


async def test_an_org_that_opens_many_connections_keeps_no_other_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []

    async def refused(self: Sockets, host: str, port: int, timeout: float | None = None) -> Any:
        order.append(host)
        raise httpcore.ConnectError("refused")

    async def resolve(host: str, port: int) -> list[str]:
        return [host]

    async def connect(org: str, address: str) -> None:
        pool = pools.of(org, checked=False)
        with suppress(httpcore.ConnectError):
            await pool._backend.connect_tcp(address, 443)

    monkeypatch.setattr(Sockets, "connect_tcp", refused)
    pools = Pools(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), lambda: True, resolve)

    await asyncio.gather(*(connect("many", "192.0.2.1") for _ in range(100)), connect("few", "192.0.2.2"))

    assert order.index("192.0.2.2") < 10
    # The control: in its own org it is the last.
    order.clear()
    await asyncio.gather(*(connect("many", "192.0.2.1") for _ in range(100)), connect("many", "192.0.2.2"))
    assert order.index("192.0.2.2") == 100
