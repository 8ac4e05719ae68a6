"""The network of `ctx.public_http`: resolves a host once, checks its addresses and connects to one of them.

A URL from params may lead anywhere: to the worker's own ports, to a cloud's metadata
service, or to a name that resolves differently between check and connection. The check
is therefore part of each connection, and so covers every redirect.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import httpcore
import httpx

from worker.addresses import NotPublic, Resolve, addresses_of, connect_checked, first_kind, resolved
from worker.handlers.blocking import finish
from worker.handlers.http import origin_of, tls_context
from worker.handlers.results import PermanentError

T = TypeVar("T")

# As `Resolve`, for a handler that blocks.
BlockingResolve = Callable[[str, int], list[str]]


class AddressRefused(PermanentError):
    """The host of a URL has an address that is not public; no connection was made."""

    def __init__(self, url: httpx.URL, kind: str) -> None:
        scheme, host, port = origin_of(url)
        origin = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        super().__init__(
            f"{url.host} has a {kind} address, and this request reaches public addresses only; to allow it, "
            f'add "{origin}" to [execution] private_origins of worker.toml, or to api_origins '
            "if it may have the org's token"
        )


def check_addresses(url: httpx.URL, addresses: Iterable[str]) -> None:
    """Raise AddressRefused if one address is not public: the next DNS answer may consist of that one."""
    if kind := first_kind(addresses):
        raise AddressRefused(url, kind)


class _Routes(Generic[T]):
    """Chooses between a transport to any address, for trusted origins, and one to public addresses."""

    def __init__(self, trusted: Iterable[str], anywhere: T, public: T) -> None:
        self._trusted = frozenset(map(origin_of, trusted))
        self.anywhere = anywhere
        self.public = public

    @contextmanager
    def of(self, request: httpx.Request) -> Iterator[T]:
        try:
            yield self.anywhere if origin_of(request.url) in self._trusted else self.public
        except NotPublic as error:
            raise AddressRefused(request.url, str(error)) from None


class PublicTransport(httpx.AsyncBaseTransport):
    """Connects to public addresses, and to any address for `trusted` origins; ignores proxy variables."""

    def __init__(
        self,
        trusted: Iterable[str],
        *,
        resolve: Resolve | None = None,
        network: httpcore.AsyncNetworkBackend | None = None,
    ) -> None:
        network = network or httpcore.AnyIOBackend()
        public = _PublicNetwork(network, resolve or addresses_of)
        self._routes = _Routes(trusted, _transport(network), _transport(public))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        with self._routes.of(request) as transport:
            return await transport.handle_async_request(request)

    async def aclose(self) -> None:
        await self._routes.anywhere.aclose()
        await self._routes.public.aclose()


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
        public = _BlockingPublicNetwork(network, resolve or blocking_addresses_of)
        self._routes = _Routes(trusted, _blocking_transport(network), _blocking_transport(public))

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        with self._routes.of(request) as transport:
            return transport.handle_request(request)

    def close(self) -> None:
        self._routes.anywhere.close()
        self._routes.public.close()


def blocking_addresses_of(host: str, port: int) -> list[str]:
    """As `addresses_of`, for a handler that blocks."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class _PublicNetwork(httpcore.AsyncNetworkBackend):
    """Connects to a checked address. TLS still gets the host's name, for SNI and the certificate."""

    def __init__(self, network: httpcore.AsyncNetworkBackend, resolve: Resolve) -> None:
        self._network = network
        self._resolve = resolve

    async def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, *args: Any, **kwargs: Any
    ) -> httpcore.AsyncNetworkStream:
        async def resolve() -> list[str]:
            return await resolved(self._resolve, host, port, timeout)

        async def connect(address: str, seconds: float | None) -> httpcore.AsyncNetworkStream:
            return await self._network.connect_tcp(address, port, seconds, *args, **kwargs)

        return await connect_checked(host, timeout, resolve, connect)


class _BlockingPublicNetwork(httpcore.NetworkBackend):
    """The same for a handler that blocks; resolving has no timeout but the system's."""

    def __init__(self, network: httpcore.NetworkBackend, resolve: BlockingResolve) -> None:
        self._network = network
        self._resolve = resolve

    def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, *args: Any, **kwargs: Any
    ) -> httpcore.NetworkStream:
        async def resolve() -> list[str]:
            return self._resolve(host, port)

        async def connect(address: str, seconds: float | None) -> httpcore.NetworkStream:
            return self._network.connect_tcp(address, port, seconds, *args, **kwargs)

        return finish(connect_checked(host, timeout, resolve, connect))


def _transport(network: httpcore.AsyncNetworkBackend) -> httpx.AsyncHTTPTransport:
    """httpx's transport over a given network. It has no parameter for one, so its pool is replaced."""
    transport = httpx.AsyncHTTPTransport(verify=tls_context(), trust_env=False)
    transport._pool = httpcore.AsyncConnectionPool(
        ssl_context=tls_context(), keepalive_expiry=5.0, network_backend=network
    )
    return transport


def _blocking_transport(network: httpcore.NetworkBackend) -> httpx.HTTPTransport:
    """The same for a handler that blocks."""
    transport = httpx.HTTPTransport(verify=tls_context(), trust_env=False)
    transport._pool = httpcore.ConnectionPool(
        ssl_context=tls_context(), keepalive_expiry=5.0, network_backend=network
    )
    return transport
