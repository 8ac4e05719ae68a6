"""Addresses: only a trusted proxy is believed, and of what it says the rightmost address that is not one."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.requests import HTTPConnection

from worker.kit.web.clients import Addresses, Client

PROXIES = ("10.0.0.0/8", "fd00::/8", "192.0.2.7/32")


def asked(peer: str | None, *forwarded: str, trusted: Any = PROXIES, **headers: str) -> Client:
    return Addresses(trusted).client_of(connection(peer, *forwarded, **headers))


def connection(peer: str | None, *forwarded: str, **headers: str) -> HTTPConnection:
    given = [("x-forwarded-for", value) for value in forwarded]
    given += [(name.replace("_", "-"), value) for name, value in headers.items()]
    raw = [(name.encode(), value.encode()) for name, value in given]
    client = None if peer is None else (peer, 40000)
    scope = {"type": "http", "scheme": "http", "path": "/", "headers": raw, "client": client}
    return HTTPConnection(scope | {"server": ("127.0.0.1", 8470), "query_string": b""})


@pytest.mark.parametrize(
    ("peer", "forwarded", "key"),
    [
        # Nobody but a trusted proxy is believed.
        ("203.0.113.9", [], "203.0.113.9"),
        ("203.0.113.9", ["198.51.100.1"], "203.0.113.9"),
        ("11.0.0.1", ["198.51.100.1"], "11.0.0.1"),
        # The proxy adds the address that it saw at the right; what is before it anybody may have written.
        ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["1.2.3.4, 198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["1.2.3.4", "198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["1.2.3.4, 198.51.100.1, 10.9.9.9, 192.0.2.7"], "198.51.100.1"),
        ("::ffff:10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["::ffff:198.51.100.1"], "198.51.100.1"),
        # A client within the trusted networks.
        ("10.0.0.1", ["10.3.3.3"], "10.3.3.3"),
        ("10.0.0.1", ["10.3.3.3, 10.4.4.4"], "10.3.3.3"),
        # With a port, as some proxies write it.
        ("10.0.0.1", ["198.51.100.1:4711"], "198.51.100.1"),
        ("10.0.0.1", ["[2001:db8::1]:4711"], "2001:db8::/64"),
        ("fd00::1", ["2001:db8::1"], "2001:db8::/64"),
        # An IPv6 client has a whole network.
        ("2001:db8:1:2:3:4:5:6", [], "2001:db8:1:2::/64"),
        # Nonsense is no address of anybody, and ends what can be believed.
        ("10.0.0.1", ["198.51.100.1, nonsense"], "unknown"),
        ("10.0.0.1", [""], "unknown"),
        (None, [], "unknown"),
        ("testclient", [], "unknown"),
    ],
)
def test_the_client_is_the_rightmost_address_that_is_no_proxy(
    peer: str | None, forwarded: list[str], key: str
):
    assert asked(peer, *forwarded).key == key


def test_only_a_proxy_that_asks_for_itself_is_exempt():
    assert asked("10.0.0.1").is_proxy
    assert not asked("10.0.0.1", "198.51.100.1").is_proxy
    assert not asked("10.0.0.1", "10.3.3.3").is_proxy
    assert not asked("10.0.0.1", "nonsense").is_proxy
    assert not asked("203.0.113.9").is_proxy
    assert not asked("127.0.0.1", trusted=()).is_proxy


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_this_machine_is_local_unless_a_proxy_on_it_speaks_for_another(peer: str):
    assert asked(peer).is_local
    assert not asked(peer, "198.51.100.1").is_local
    assert not asked(peer, forwarded="for=198.51.100.1").is_local
    assert not asked(peer, "198.51.100.1", trusted=("127.0.0.0/8", "::1/128")).is_local
    # An untrusted proxy's word that it speaks for this machine is worth nothing.
    assert not asked(peer, "127.0.0.1").is_local
    assert asked(peer, "127.0.0.1", trusted=("127.0.0.0/8", "::1/128")).is_local


def test_https_is_what_a_trusted_proxy_says():
    addresses = Addresses(PROXIES)

    assert addresses.is_https(connection("10.0.0.1", x_forwarded_proto="https"))
    assert not addresses.is_https(connection("10.0.0.1"))
    assert not addresses.is_https(connection("203.0.113.9", x_forwarded_proto="https"))


def test_a_peer_is_trusted_by_its_network():
    addresses = Addresses(PROXIES)

    assert [addresses.trusts(host) for host in ("10.1.2.3", "fd12::1", "192.0.2.7")] == [True] * 3
    assert [addresses.trusts(host) for host in ("192.0.2.8", "::1", "", None)] == [False] * 4
