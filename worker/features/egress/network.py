"""The broker's connections: names are resolved once, addresses checked, nothing leaves without a lease."""

from __future__ import annotations

import os
import ssl
from asyncio import selector_events, sslproto
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import httpcore

from worker.addresses import Resolve, addresses_of, connect_checked, resolved
from worker.connections import IdleConnections, Sockets
from worker.pacing import Turns

# Bytes that are read of a connection at a time, and that may have arrived before reading pauses.
READ = 16 * 1024
# Connections that begin in one turn of the loop, of all orgs; a TLS handshake takes a millisecond of it.
AT_ONCE = 4


class BrokerSockets(Sockets):
    """Connects to an address of the host, to public ones only if `checked`; the `turns` are by org."""

    def __init__(
        self, may_send: Callable[[], bool], resolve: Resolve, turns: Turns, org: str, *, checked: bool
    ) -> None:
        super().__init__(may_send, unread=READ, next_address=None)
        self._turns = turns
        self._org = org
        self._resolve = resolve
        self._checked = checked

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """As `Sockets.connect_tcp`; TLS still gets the host's name. Raises NotPublic too."""
        opened = super().connect_tcp

        async def resolve() -> list[str]:
            return await resolved(self._resolve, host.strip("[]"), port, timeout)

        async def connect(address: str, seconds: float | None) -> httpcore.AsyncNetworkStream:
            await self._turns.take(1, self._org)
            return await opened(address, port, seconds)

        return await connect_checked(host, timeout, resolve, connect, public=self._checked)


_shared = memoryview(bytearray(READ))


class _TlsProtocol(sslproto.SSLProtocol):
    """Has no buffer of its own: the loop empties it in the same step in which it fills it."""

    max_size = READ

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._ssl_buffer, self._ssl_buffer_view = _shared.obj, _shared
        self._set_read_buffer_limits(READ)  # type: ignore[attr-defined]
        self._set_write_buffer_limits(READ)  # type: ignore[attr-defined]


def read_less() -> None:
    """Let asyncio read `READ` bytes at a time: with its 256 KiB each TLS connection takes 250 KB more."""
    sslproto.SSLProtocol = _TlsProtocol  # type: ignore[misc]
    selector_events._SelectorTransport.max_size = READ  # type: ignore[attr-defined]


def tls_context() -> ssl.SSLContext:
    """As httpx makes it, without importing it: certifi's authorities, or those that a variable names."""
    for name, load in (("SSL_CERT_FILE", "cafile"), ("SSL_CERT_DIR", "capath")):
        if path := os.environ.get(name):
            return ssl.create_default_context(**{load: path})  # type: ignore[arg-type]
    import certifi

    return ssl.create_default_context(cafile=certifi.where())


class Pools:
    """Connections of each org, apart from those to addresses that were not checked."""

    def __init__(
        self, context: ssl.SSLContext, may_send: Callable[[], bool], resolve: Resolve = addresses_of
    ) -> None:
        self._context = context
        self._network = partial(BrokerSockets, may_send, resolve, Turns(AT_ONCE))
        self._pools: dict[tuple[str, bool], IdleConnections] = {}

    def of(self, org: str, *, checked: bool) -> IdleConnections:
        pool = self._pools.get((org, checked))
        if pool is None:
            pool = IdleConnections(self._context, backend=self._network(org, checked=checked), kept=4.0)
            self._pools[org, checked] = pool
        return pool

    async def tidy(self) -> None:
        """Close connections that were not used for long, and forget orgs that have none."""
        for key, pool in list(self._pools.items()):
            if not await pool.tidy():
                self._pools.pop(key, None)

    async def close(self) -> None:
        """Close all that are idle."""
        while self._pools:
            await self._pools.popitem()[1].aclose()
