"""Addresses: which client a request comes from, also through proxies that the operator trusts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from starlette.requests import HTTPConnection

Address = IPv4Address | IPv6Address

# Of IPv6 one client has a whole network of this size.
_CLIENT_BITS = 64
_WITH_PORT = re.compile(r"\[([^\]]*)\](?::\d+)?|(\d+\.\d+\.\d+\.\d+):\d+")


@dataclass(frozen=True, slots=True)
class Client:
    """Whoever sent a request; `address` is None where nobody can say."""

    address: Address | None
    is_proxy: bool = False
    """Whether a trusted proxy asks for itself, such as for its health checks."""
    is_local: bool = False
    """Whether it runs on this machine."""

    @property
    def key(self) -> str:
        """What limits count by: the IPv4 address, or the /64 network of an IPv6 address."""
        if isinstance(self.address, IPv6Address):
            return str(ip_network((int(self.address), 128)).supernet(new_prefix=_CLIENT_BITS))
        return str(self.address or "unknown")


class Addresses:
    """Resolves clients; `trusted` are the networks, as CIDR, whose X-Forwarded-For is believed."""

    def __init__(self, trusted: Iterable[str] = ()) -> None:
        self._trusted = [ip_network(network) for network in trusted]

    def trusts(self, host: str | None) -> bool:
        """Whether a peer of this address is a trusted proxy."""
        address = _address(host or "")
        return address is not None and self._is_trusted(address)

    def client_of(self, connection: HTTPConnection) -> Client:
        """The client: the peer, or the rightmost forwarded address that is not a trusted proxy."""
        peer = _address(connection.client.host if connection.client else "")
        forwarded = [
            entry.strip()
            for header in connection.headers.getlist("x-forwarded-for")
            for entry in header.split(",")
        ]
        if peer is None or not self._is_trusted(peer):
            # A proxy that is not trusted may well be on this machine, and its clients elsewhere.
            is_direct = not forwarded and "forwarded" not in connection.headers
            return Client(peer, is_local=is_direct and peer is not None and peer.is_loopback)
        if not forwarded:
            return Client(peer, is_proxy=True, is_local=peer.is_loopback)
        address: Address | None = peer
        for entry in reversed(forwarded):
            address = _address(entry)
            if address is None or not self._is_trusted(address):
                break
        return Client(address, is_local=address is not None and address.is_loopback)

    def is_https(self, connection: HTTPConnection) -> bool:
        """Whether the client speaks https, to this server or to a trusted proxy before it."""
        if connection.client is not None and self.trusts(connection.client.host):
            return connection.headers.get("x-forwarded-proto", "").strip().lower() == "https"
        return connection.url.scheme == "https"

    def _is_trusted(self, address: Address) -> bool:
        return any(address in network for network in self._trusted)


def counted_as(host: str) -> str:
    """What limits count a peer of this address by."""
    return Client(_address(host)).key


def _address(text: str) -> Address | None:
    """An address as proxies write it: perhaps with a port, perhaps an IPv4 address mapped into IPv6."""
    with_port = _WITH_PORT.fullmatch(text)
    if with_port:
        text = with_port[1] or with_port[2]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
