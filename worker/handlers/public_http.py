"""The network of `ctx.public_http`: resolves a host once and connects to an address that it has checked.

A URL from params may lead anywhere: to the worker's own ports, to a cloud's metadata
service, or to a name that resolves differently between check and connection. The check
is therefore part of each connection, and so covers every redirect.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

import httpcore
import httpx

from worker.handlers.http import Origin, origin_of, tls_context
from worker.handlers.results import PermanentError

# Seconds that an address has to accept a connection while there is another one to try.
NEXT_ADDRESS = 3.0
MOST_ADDRESSES = 4

# (host, port) -> its addresses, the best first; raises OSError or ValueError.
Resolve = Callable[[str, int], Awaitable[list[str]]]
BlockingResolve = Callable[[str, int], list[str]]
SocketOptions = Iterable[httpcore.SOCKET_OPTION] | None

# What is not public, by IANA's registries of special-purpose addresses (RFC 6890). The first match counts.
_IPV4 = [
    (IPv4Network("169.254.169.254"), "metadata"),  # most clouds
    (IPv4Network("169.254.170.2"), "metadata"),  # AWS: containers
    (IPv4Network("169.254.170.23"), "metadata"),  # AWS: pods
    (IPv4Network("100.100.100.200"), "metadata"),  # Alibaba
    (IPv4Network("192.0.0.192"), "metadata"),  # Oracle
    (IPv4Network("168.63.129.16"), "metadata"),  # Azure; lies in a public range
    (IPv4Network("0.0.0.0/8"), "unspecified"),
    (IPv4Network("10.0.0.0/8"), "private"),
    (IPv4Network("100.64.0.0/10"), "private"),  # behind a carrier's NAT, and in cloud networks
    (IPv4Network("127.0.0.0/8"), "loopback"),
    (IPv4Network("169.254.0.0/16"), "link-local"),
    (IPv4Network("172.16.0.0/12"), "private"),
    (IPv4Network("192.0.0.0/24"), "reserved"),
    (IPv4Network("192.0.2.0/24"), "reserved"),
    (IPv4Network("192.88.99.0/24"), "reserved"),
    (IPv4Network("192.168.0.0/16"), "private"),
    (IPv4Network("198.18.0.0/15"), "private"),
    (IPv4Network("198.51.100.0/24"), "reserved"),
    (IPv4Network("203.0.113.0/24"), "reserved"),
    (IPv4Network("224.0.0.0/4"), "multicast"),
    (IPv4Network("240.0.0.0/4"), "reserved"),
]
_IPV6 = [
    (IPv6Network("fd00:ec2::254"), "metadata"),  # AWS
    (IPv6Network("fd00:ec2::23"), "metadata"),  # AWS: pods
    (IPv6Network("fd20:ce::254"), "metadata"),  # Google
    (IPv6Network("::"), "unspecified"),
    (IPv6Network("::1"), "loopback"),
    (IPv6Network("fc00::/7"), "private"),
    (IPv6Network("fe80::/10"), "link-local"),
    (IPv6Network("fec0::/10"), "private"),
    (IPv6Network("ff00::/8"), "multicast"),
    (IPv6Network("2001::/23"), "reserved"),  # Teredo is in it: a tunnel to any IPv4 address
    (IPv6Network("2001:db8::/32"), "reserved"),
    (IPv6Network("2002::/16"), "reserved"),  # 6to4: the same
    (IPv6Network("3fff::/20"), "reserved"),
]
_PUBLIC_IPV6 = IPv6Network("2000::/3")
# Their last 32 bits are an IPv4 address: mapped, and NAT64, by which an IPv6-only network reaches IPv4.
_WITH_IPV4 = (IPv6Network("::ffff:0:0/96"), IPv6Network("64:ff9b::/96"))


class AddressRefused(PermanentError):
    """The host of a URL has an address that is not public; no connection was made."""

    def __init__(self, url: httpx.URL, kind: str) -> None:
        origin = _written(origin_of(url))
        super().__init__(
            f"{url.host} has a {kind} address, and this request reaches public addresses only; to allow it, "
            f'add "{origin}" to [execution] private_origins of worker.toml, or to api_origins '
            "if it may have the org's token"
        )


class _NotPublic(Exception):
    """The kind of an address that is not public."""


def kind_of(address: str) -> str | None:
    """What an address is in one word, such as loopback; None if it is public."""
    try:
        found = ip_address(address)
    except ValueError:
        return "unreadable"
    if isinstance(found, IPv6Address) and any(found in network for network in _WITH_IPV4):
        found = IPv4Address(int(found) & 0xFFFF_FFFF)
    if isinstance(found, IPv4Address):
        return next((kind for network, kind in _IPV4 if found in network), None)
    otherwise = None if found in _PUBLIC_IPV6 else "reserved"
    return next((kind for network, kind in _IPV6 if found in network), otherwise)


def check_addresses(url: httpx.URL, addresses: Iterable[str]) -> None:
    """Check where a URL leads.

    Raises:
        AddressRefused: an address is not public. One is enough, since the next answer may have only that one.
    """
    try:
        _check(addresses)
    except _NotPublic as error:
        raise AddressRefused(url, str(error)) from None


class PublicTransport(httpx.AsyncBaseTransport):
    """Connects to public addresses only, but anywhere for `trusted` origins; ignores proxy variables."""

    def __init__(
        self,
        trusted: Iterable[str],
        *,
        resolve: Resolve | None = None,
        network: httpcore.AsyncNetworkBackend | None = None,
    ) -> None:
        network = network or httpcore.AnyIOBackend()
        self._trusted = frozenset(origin_of(origin) for origin in trusted)
        self._anywhere = _Transport(network)
        self._public = _Transport(_PublicNetwork(network, resolve or addresses_of))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        trusted = origin_of(request.url) in self._trusted
        try:
            return await (self._anywhere if trusted else self._public).handle_async_request(request)
        except _NotPublic as error:
            raise AddressRefused(request.url, str(error)) from None

    async def aclose(self) -> None:
        await self._anywhere.aclose()
        await self._public.aclose()


class BlockingPublicTransport(httpx.BaseTransport):
    """The same for a handler that blocks."""

    def __init__(
        self,
        trusted: Iterable[str],
        *,
        resolve: BlockingResolve | None = None,
        network: httpcore.NetworkBackend | None = None,
    ) -> None:
        network = network or httpcore.SyncBackend()
        self._trusted = frozenset(origin_of(origin) for origin in trusted)
        self._anywhere = _BlockingTransport(network)
        self._public = _BlockingTransport(_BlockingPublicNetwork(network, resolve or blocking_addresses_of))

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        trusted = origin_of(request.url) in self._trusted
        try:
            return (self._anywhere if trusted else self._public).handle_request(request)
        except _NotPublic as error:
            raise AddressRefused(request.url, str(error)) from None

    def close(self) -> None:
        self._anywhere.close()
        self._public.close()


async def addresses_of(host: str, port: int) -> list[str]:
    """The addresses of a host as the system resolves it, also of such forms as 0x7f.1 and 2130706433."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def blocking_addresses_of(host: str, port: int) -> list[str]:
    """The same for a handler that blocks."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class _PublicNetwork(httpcore.AsyncNetworkBackend):
    """Resolves a host, checks its addresses and connects to one of them.

    The TLS layer above still knows the host by its name, for SNI and the certificate.
    """

    def __init__(self, network: httpcore.AsyncNetworkBackend, resolve: Resolve) -> None:
        self._network = network
        self._resolve = resolve

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: SocketOptions = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            async with asyncio.timeout(timeout):
                addresses = await self._resolve(host, port)
        except TimeoutError:
            raise httpcore.ConnectTimeout(f"{host} was not resolved in time") from None
        except (OSError, ValueError) as error:
            raise _unresolved(host, error) from None
        _check(addresses)
        failure: Exception = _unresolved(host, "it has no address")
        for address, seconds in _turns(addresses, timeout):
            try:
                return await self._network.connect_tcp(address, port, seconds, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


class _BlockingPublicNetwork(httpcore.NetworkBackend):
    """The same for a handler that blocks; the system alone limits how long resolving takes."""

    def __init__(self, network: httpcore.NetworkBackend, resolve: BlockingResolve) -> None:
        self._network = network
        self._resolve = resolve

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: SocketOptions = None,
    ) -> httpcore.NetworkStream:
        try:
            addresses = self._resolve(host, port)
        except (OSError, ValueError) as error:
            raise _unresolved(host, error) from None
        _check(addresses)
        failure: Exception = _unresolved(host, "it has no address")
        for address, seconds in _turns(addresses, timeout):
            try:
                return self._network.connect_tcp(address, port, seconds, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


class _Transport(httpx.AsyncHTTPTransport):
    """httpx's own, over a given network: it takes none, so its pool is replaced."""

    def __init__(self, network: httpcore.AsyncNetworkBackend) -> None:
        super().__init__(verify=tls_context(), trust_env=False)
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=tls_context(), keepalive_expiry=5.0, network_backend=network
        )


class _BlockingTransport(httpx.HTTPTransport):
    """The same for a handler that blocks."""

    def __init__(self, network: httpcore.NetworkBackend) -> None:
        super().__init__(verify=tls_context(), trust_env=False)
        self._pool = httpcore.ConnectionPool(
            ssl_context=tls_context(), keepalive_expiry=5.0, network_backend=network
        )


def _check(addresses: Iterable[str]) -> None:
    for address in addresses:
        kind = kind_of(address)
        if kind is not None:
            raise _NotPublic(kind)


def _turns(addresses: Iterable[str], timeout: float | None) -> Iterator[tuple[str, float | None]]:
    """Each address once with the seconds that it has; the last one has the whole timeout."""
    each = list(dict.fromkeys(addresses))[:MOST_ADDRESSES]
    soon = NEXT_ADDRESS if timeout is None else min(NEXT_ADDRESS, timeout)
    yield from ((address, soon) for address in each[:-1])
    yield from ((address, timeout) for address in each[-1:])


def _unresolved(host: str, why: object) -> httpcore.ConnectError:
    return httpcore.ConnectError(f"{host} cannot be resolved: {why}")


def _written(origin: Origin) -> str:
    scheme, host, port = origin
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
