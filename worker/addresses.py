"""Addresses of hosts: which are public (RFC 6890, by IANA's registries), and how to connect to those only."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TypeVar

import httpcore

T = TypeVar("T")

# Seconds to wait for one address to accept a connection before trying the next.
NEXT_ADDRESS = 3.0
MAX_ADDRESSES = 4

# (host, port) -> its addresses, the best first; raises OSError or ValueError.
Resolve = Callable[[str, int], Awaitable[list[str]]]

# Addresses that are not public, by IANA's registries (RFC 6890), one kind a line. The first match counts.
_SPECIAL = [
    ("metadata", "169.254.169.254 168.63.129.16"),  # most clouds; Azure, in a public range
    ("metadata", "169.254.170.2 169.254.170.23 fd00:ec2::254 fd00:ec2::23"),  # AWS: containers, pods
    ("metadata", "100.100.100.200 192.0.0.192 fd20:ce::254"),  # Alibaba, Oracle, Google
    ("unspecified", "0.0.0.0/8 ::"),
    ("loopback", "127.0.0.0/8 ::1"),
    ("private", "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 198.18.0.0/15 fc00::/7 fec0::/10"),
    ("private", "100.64.0.0/10"),  # behind a carrier's NAT, and in cloud networks
    ("link-local", "169.254.0.0/16 fe80::/10"),
    ("multicast", "224.0.0.0/4 ff00::/8"),
    ("reserved", "192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 198.51.100.0/24 203.0.113.0/24 240.0.0.0/4"),
    ("reserved", "2001:db8::/32 3fff::/20"),
    ("reserved", "2001::/23 2002::/16"),  # Teredo and 6to4: tunnels to any IPv4 address
]
_NETWORKS = [(ip_network(text), kind) for kind, texts in _SPECIAL for text in texts.split()]
_PUBLIC_IPV6 = IPv6Network("2000::/3")
# Their last 32 bits are an IPv4 address: mapped, and NAT64, by which an IPv6-only network reaches IPv4.
_WITH_IPV4 = (IPv6Network("::ffff:0:0/96"), IPv6Network("64:ff9b::/96"))


def kind_of(address: str) -> str | None:
    """The kind of an address, such as loopback, or None if it is public."""
    try:
        found = ip_address(address)
    except ValueError:
        return "unreadable"
    if isinstance(found, IPv6Address) and any(found in network for network in _WITH_IPV4):
        found = IPv4Address(int(found) & 0xFFFF_FFFF)
    otherwise = None if isinstance(found, IPv4Address) or found in _PUBLIC_IPV6 else "reserved"
    return next((kind for network, kind in _NETWORKS if found in network), otherwise)


def first_kind(addresses: Iterable[str]) -> str | None:
    """The kind of the first address that is not public, or None; the next answer may have only that one."""
    return next((kind for address in addresses if (kind := kind_of(address))), None)


class NotPublic(Exception):
    """The kind of an address that is not public."""


async def connect_checked(
    host: str,
    timeout: float | None,
    resolve: Callable[[], Awaitable[list[str]]],
    connect: Callable[[str, float | None], Awaitable[T]],
    *,
    public: bool = True,
) -> T:
    """A connection to one of a host's addresses, which are resolved once.

    The check is part of each connection, and so covers every redirect.

    Args:
        host: For errors.
        timeout: Seconds for the last address; the others have `NEXT_ADDRESS` at most.
        connect: (address, seconds) -> a connection.
        public: Whether every address has to be public.

    Raises:
        NotPublic: One address is not, and nothing was connected to: the next answer may have only that one.
        httpcore.ConnectError, httpcore.ConnectTimeout
    """
    try:
        addresses = await resolve()
    except (OSError, ValueError) as error:
        raise httpcore.ConnectError(f"{host} cannot be resolved: {error}") from None
    if public and (kind := first_kind(addresses)):
        raise NotPublic(kind)
    failure: Exception = httpcore.ConnectError(f"{host} cannot be resolved: it has no address")
    addresses = list(dict.fromkeys(addresses))[:MAX_ADDRESSES]
    soon = NEXT_ADDRESS if timeout is None else min(NEXT_ADDRESS, timeout)
    for number, address in enumerate(addresses, start=1):
        try:
            return await connect(address, timeout if number == len(addresses) else soon)
        except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
            failure = error
    raise failure


async def resolved(resolve: Resolve, host: str, port: int, timeout: float | None) -> list[str]:
    """The addresses that `resolve` finds in time.

    Raises:
        httpcore.ConnectTimeout, OSError, ValueError
    """
    try:
        async with asyncio.timeout(timeout):
            return await resolve(host, port)
    except TimeoutError:
        raise httpcore.ConnectTimeout(f"{host} was not resolved in time") from None


async def addresses_of(host: str, port: int) -> list[str]:
    """The addresses of a host as the system resolves it, including forms such as 0x7f.1 and 2130706433."""
    with suppress(ValueError):
        return [str(ip_address(host))]
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]
