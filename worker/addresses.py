"""Addresses of hosts: which are public, by IANA's registries (RFC 6890). Pure."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

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
