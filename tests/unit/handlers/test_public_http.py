"""`ctx.public_http`: each connection goes to an address that was checked, and to public ones only."""

from __future__ import annotations

import asyncio
import ipaddress
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.network import OK, BlockingNetwork, Names, ScriptedNetwork
from worker import PermanentError, addresses
from worker.addresses import MAX_ADDRESSES, kind_of
from worker.handlers import public_http
from worker.handlers.public_http import (
    AddressRefused,
    BlockingPublicTransport,
    PublicTransport,
)

PUBLIC = "93.184.216.34"
OTHER_PUBLIC = "2606:2800:220:1::1"


class Caller:
    """Sends through either transport over a network that answers by itself."""

    def __init__(
        self,
        kind: str,
        names: Names,
        *,
        trusted: tuple[str, ...] = (),
        answer: bytes = OK,
        refuses: tuple[str, ...] = (),
    ) -> None:
        self.names = names
        self.dialled = network = ScriptedNetwork(answer, refuses)
        self._client: Any
        if kind == "async":
            transport = PublicTransport(trusted, resolve=names.resolve, network=network)
            self._client = httpx.AsyncClient(transport=transport)
        else:
            blocking = BlockingNetwork(network)
            blocking_transport = BlockingPublicTransport(trusted, resolve=names.blocking, network=blocking)
            self._client = httpx.Client(transport=blocking_transport)

    async def get(self, url: str, **options: Any) -> httpx.Response:
        response = self._client.get(url, **options)
        return await response if isinstance(self._client, httpx.AsyncClient) else response


@pytest.fixture(params=["async", "blocking"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("127.0.0.1", "loopback"),
        ("127.255.255.254", "loopback"),
        ("0.0.0.0", "unspecified"),
        ("0.1.2.3", "unspecified"),
        ("10.0.0.1", "private"),
        ("172.16.0.1", "private"),
        ("172.31.255.255", "private"),
        ("192.168.0.1", "private"),
        ("100.64.0.1", "private"),
        ("198.18.0.1", "private"),
        ("169.254.0.1", "link-local"),
        ("169.254.169.254", "metadata"),
        ("169.254.170.2", "metadata"),
        ("169.254.170.23", "metadata"),
        ("100.100.100.200", "metadata"),
        ("192.0.0.192", "metadata"),
        ("168.63.129.16", "metadata"),
        ("192.0.0.1", "reserved"),
        ("192.0.2.1", "reserved"),
        ("192.88.99.1", "reserved"),
        ("198.51.100.1", "reserved"),
        ("203.0.113.1", "reserved"),
        ("224.0.0.1", "multicast"),
        ("240.0.0.1", "reserved"),
        ("255.255.255.255", "reserved"),
        ("::", "unspecified"),
        ("::1", "loopback"),
        ("fe80::1", "link-local"),
        ("fe80::1%2", "link-local"),
        ("fec0::1", "private"),
        ("fc00::1", "private"),
        ("fd00:ec2::254", "metadata"),
        ("fd00:ec2::23", "metadata"),
        ("fd20:ce::254", "metadata"),
        ("ff02::1", "multicast"),
        ("::ffff:127.0.0.1", "loopback"),
        ("::ffff:169.254.169.254", "metadata"),
        ("::ffff:10.0.0.1", "private"),
        ("::127.0.0.1", "reserved"),
        ("::ffff:0:127.0.0.1", "reserved"),
        ("64:ff9b::127.0.0.1", "loopback"),
        ("64:ff9b::169.254.169.254", "metadata"),
        ("64:ff9b:1::10.0.0.1", "reserved"),
        ("2001::1", "reserved"),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", "reserved"),
        ("2001:db8::1", "reserved"),
        ("2002:7f00:1::", "reserved"),
        ("3fff::1", "reserved"),
        ("100::1", "reserved"),
        ("4000::1", "reserved"),
        ("not an address", "unreadable"),
        ("", "unreadable"),
        ("93.184.216.34", None),
        ("8.8.8.8", None),
        ("172.32.0.1", None),
        ("100.63.255.255", None),
        ("2606:2800:220:1::1", None),
        ("::ffff:8.8.8.8", None),
        ("64:ff9b::8.8.8.8", None),
    ],
)
def test_an_address_is_public_or_has_a_kind(address: str, kind: str | None) -> None:
    assert kind_of(address) == kind


@given(st.ip_addresses())
def test_no_address_is_public_that_the_standard_library_knows_as_special(address: Any) -> None:
    if kind_of(str(address)) is None:
        inner = getattr(address, "ipv4_mapped", None)
        if address.version == 6 and address in ipaddress.IPv6Network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
        address = inner or address
        assert address.is_global
        assert not (address.is_multicast or address.is_reserved or address.is_link_local)


async def test_a_host_is_resolved_once_and_the_address_that_was_checked_is_connected_to(kind: str) -> None:
    names = Names({"api.test": [[PUBLIC], ["127.0.0.1"]]})
    caller = Caller(kind, names)

    response = await caller.get("http://api.test:8080/")

    assert response.text == "ok"
    assert names.asked == ["api.test"]
    assert caller.dialled.addresses == [(PUBLIC, 8080)]


async def test_tls_knows_the_host_by_its_name(kind: str) -> None:
    caller = Caller(kind, Names({"api.test": [PUBLIC]}))

    await caller.get("https://api.test/")

    assert caller.dialled.addresses == [(PUBLIC, 443)]
    assert caller.dialled.tls_names == ["api.test"]


@pytest.mark.parametrize("addresses", [["127.0.0.1"], [PUBLIC, "10.0.0.5"], [OTHER_PUBLIC, "::1"]])
async def test_one_address_that_is_not_public_is_enough_to_be_refused(kind: str, addresses: Any) -> None:
    caller = Caller(kind, Names({"api.test": addresses}))

    with pytest.raises(AddressRefused):
        await caller.get("http://api.test/")

    assert caller.dialled.addresses == []


async def test_what_is_refused_is_not_tried_again_and_says_what_to_set(kind: str) -> None:
    caller = Caller(kind, Names({"reports.internal": ["10.0.0.5"]}))

    with pytest.raises(PermanentError, match="reports.internal has a private address") as caught:
        await caller.get("http://reports.internal:8080/secret?key=1")

    assert 'add "http://reports.internal:8080" to [execution] private_origins' in str(caught.value)
    assert "10.0.0.5" not in str(caught.value)
    assert "key=1" not in str(caught.value)


async def test_a_listed_origin_is_reached_and_no_other_of_the_same_host(kind: str) -> None:
    trusted = ("http://127.0.0.1:8080", "https://reports.internal", "http://[::1]:80")
    caller = Caller(kind, Names({"reports.internal": ["10.0.0.5"]}), trusted=trusted)

    await caller.get("http://127.0.0.1:8080/")
    await caller.get("https://reports.internal/")
    await caller.get("http://[::1]/")
    for url in ("http://127.0.0.1:8081/", "http://reports.internal/", "https://127.0.0.1:8080/"):
        with pytest.raises(AddressRefused):
            await caller.get(url)

    # A listed host is resolved by the network itself, as by any client.
    assert caller.dialled.addresses == [("127.0.0.1", 8080), ("reports.internal", 443), ("::1", 80)]


async def test_every_redirect_is_checked(kind: str) -> None:
    moved = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:19555/\r\nContent-Length: 0\r\n\r\n"
    caller = Caller(kind, Names({"api.test": [PUBLIC]}), answer=moved)

    with pytest.raises(AddressRefused, match="127.0.0.1 has a loopback address"):
        await caller.get("http://api.test/", follow_redirects=True)

    assert caller.dialled.addresses == [(PUBLIC, 80)]


async def test_a_connection_is_used_again_for_its_own_host_only(kind: str) -> None:
    kept = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    names = Names({"one.test": [[PUBLIC], ["10.0.0.5"]], "two.test": [PUBLIC]})
    caller = Caller(kind, names, answer=kept * 2)

    for _ in range(2):
        await caller.get("https://one.test/")
    await caller.get("https://two.test/")

    assert caller.dialled.tls_names == ["one.test", "two.test"]


async def test_the_next_address_is_tried_where_one_does_not_answer(kind: str) -> None:
    names = Names({"api.test": [OTHER_PUBLIC, PUBLIC, PUBLIC]})
    caller = Caller(kind, names, refuses=(OTHER_PUBLIC,))

    await caller.get("http://api.test/")

    assert caller.dialled.addresses == [(OTHER_PUBLIC, 80), (PUBLIC, 80)]


async def test_a_name_with_very_many_addresses_holds_nobody_up(kind: str) -> None:
    many = tuple(f"93.184.216.{number}" for number in range(1, 100))
    caller = Caller(kind, Names({"api.test": many}), refuses=many)

    with pytest.raises(httpx.ConnectError):
        await caller.get("http://api.test/")

    assert len(caller.dialled.addresses) == MAX_ADDRESSES


@pytest.mark.parametrize("host", ["nowhere.test", "empty.test", "a..test"])
async def test_a_name_without_an_address_may_be_tried_again(kind: str, host: str) -> None:
    caller = Caller(kind, Names({"empty.test": []}))

    with pytest.raises(httpx.ConnectError, match="cannot be resolved"):
        await caller.get(f"http://{host}/")

    assert caller.dialled.addresses == []


async def test_resolving_takes_no_longer_than_the_timeout_to_connect() -> None:
    async def never(host: str, port: int) -> list[str]:
        await asyncio.Event().wait()
        raise AssertionError("not reached")

    transport = PublicTransport((), resolve=never, network=ScriptedNetwork())
    async with httpx.AsyncClient(transport=transport) as client:
        with pytest.raises(httpx.ConnectTimeout):
            await client.get("http://api.test/", timeout=0.01)


async def test_a_proxy_of_the_environment_is_ignored(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:3128")
    caller = Caller(kind, Names({"api.test": [PUBLIC]}), trusted=("http://trusted.test",))

    await caller.get("http://api.test/")
    await caller.get("http://trusted.test/")

    assert caller.dialled.addresses == [(PUBLIC, 80), ("trusted.test", 80)]


async def test_the_systems_own_resolver_reads_other_forms_of_an_address() -> None:
    for host in ("2130706433", "0x7f.1", "0177.0.0.1", "127.1", "127.0.0.1"):
        assert set(await addresses.addresses_of(host, 80)) == {"127.0.0.1"}
        assert set(public_http.blocking_addresses_of(host, 80)) == {"127.0.0.1"}


async def test_without_the_check_the_same_client_reaches_what_is_refused(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: it is the check that refuses, and nothing else on the way.

    It also fails if a release of httpx no longer sends through the replaced pool.
    """
    monkeypatch.setattr(addresses, "kind_of", lambda address: None)
    caller = Caller(kind, Names({"api.test": ["127.0.0.1"]}))

    response = await caller.get("http://api.test/")

    assert response.text == "ok"
    assert caller.dialled.addresses == [("127.0.0.1", 80)]
