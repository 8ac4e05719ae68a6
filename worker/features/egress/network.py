"""The broker's connections: names are resolved once, addresses checked, nothing leaves without a lease."""

from __future__ import annotations

import asyncio
import socket
import ssl
from asyncio import selector_events, sslproto
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

import httpcore

from worker.addresses import first_kind
from worker.connections import IdleConnections, Sockets
from worker.pacing import Turns

# Seconds to wait for one address before the next is tried, and addresses that are tried.
NEXT_ADDRESS = 3.0
MAX_ADDRESSES = 4
# Bytes that are read of a connection at a time, and that may have arrived before reading pauses.
READ = 16 * 1024
# Connections that begin in one turn of the loop; a TLS handshake takes a millisecond of it.
AT_ONCE = 4
# (host, port) -> its addresses, the best first; raises OSError.
Resolve = Callable[[str, int], Awaitable[list[str]]]


class NotPublic(Exception):
    """The kind of an address that is not public."""


class BrokerSockets(Sockets):
    """Connects to an address of the host, to public ones only if `checked`."""

    _next_address = None

    def __init__(
        self, may_send: Callable[[], bool], resolve: Resolve, turns: Turns, *, checked: bool
    ) -> None:
        super().__init__(may_send, unread=READ)
        self._turns = turns
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
        try:
            async with asyncio.timeout(timeout):
                addresses = await self._resolve(host.strip("[]"), port)
        except TimeoutError:
            raise httpcore.ConnectTimeout(f"{host} was not resolved in time") from None
        except (OSError, ValueError) as error:
            raise httpcore.ConnectError(f"{host} cannot be resolved: {error}") from None
        if self._checked and (kind := first_kind(addresses)):
            raise NotPublic(kind)
        failure: Exception = httpcore.ConnectError(f"{host} cannot be resolved: it has no address")
        await self._turns.take(1)
        addresses = list(dict.fromkeys(addresses))[:MAX_ADDRESSES]
        soon = NEXT_ADDRESS if timeout is None else min(NEXT_ADDRESS, timeout)
        for left, address in zip(reversed(range(len(addresses))), addresses, strict=True):
            try:
                return await super().connect_tcp(address, port, soon if left else timeout)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


async def addresses_of(host: str, port: int) -> list[str]:
    """The addresses of a host as the system resolves it, including forms such as 0x7f.1 and 2130706433."""
    with suppress(ValueError):
        return [str(ip_address(host))]
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


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


class Pools:
    """Connections of each org, apart from those to addresses that were not checked."""

    def __init__(
        self, context: ssl.SSLContext, may_send: Callable[[], bool], resolve: Resolve = addresses_of
    ) -> None:
        self._context = context
        turns = Turns(AT_ONCE)
        self._networks = {
            checked: BrokerSockets(may_send, resolve, turns, checked=checked) for checked in (False, True)
        }
        self._pools: dict[tuple[str, bool], IdleConnections] = {}

    def of(self, org: str, *, checked: bool) -> IdleConnections:
        pool = self._pools.get((org, checked))
        if pool is None:
            pool = IdleConnections(self._context, backend=self._networks[checked], kept=4.0)
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
