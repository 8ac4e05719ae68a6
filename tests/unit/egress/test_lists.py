"""Egress lists: what looks like a listed origin is another one, and no wildcard has names of strangers."""

from __future__ import annotations

from typing import Any

import pytest

from worker.guard.urls import origin_of
from worker.model.egress import (
    MAX_ITEM,
    MAX_ITEMS,
    TOKEN,
    BoundSecret,
    Egress,
    Gate,
    Owner,
    check_wildcards,
    denial,
    deniers,
    effective,
    not_listed,
    parse_item,
    parse_items,
    placeholder_of,
)

API = ("https://api.example.com",)


def allows(items: list[str] | tuple[str, ...], url: str, *more: tuple[str, ...]) -> bool:
    return Gate([items, *more], API).allows(origin_of(url))


@pytest.mark.parametrize(
    ("item", "url"),
    [
        ("https://api.openai.com", "https://api.openai.com./"),
        ("https://api.openai.com", "https://api.openai.com.evil.example/"),
        ("https://api.openai.com", "https://xapi.openai.com/"),
        ("https://api.openai.com", "https://openai.com/"),
        ("https://api.openai.com", "https://api.openai.com@evil.example/"),
        ("https://api.openai.com", "https://evil.example/https://api.openai.com"),
        ("https://api.openai.com", "http://api.openai.com/"),
        ("https://api.openai.com", "https://api.openai.com:8443/"),
        ("https://*.example.org", "https://example.org/"),
        ("https://*.example.org", "https://xexample.org/"),
        ("https://*.example.org", "https://a.example.org./"),
        ("https://*.example.org", "http://a.example.org/"),
        ("https://*.example.org", "https://a.example.org:8443/"),
        ("https://*.example.org", "https://a.example.org.evil.example/"),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8001/"),
        ("http://127.0.0.1:8000", "http://127.1:8000/"),
        ("http://127.0.0.1:8000", "http://localhost:8000/"),
        ("api", "https://api.example.com:8443/"),
        ("api", "https://example.com/"),
    ],
)
def test_a_look_alike_is_not_allowed(item: str, url: str) -> None:
    assert not allows([item], url)


@pytest.mark.parametrize(
    ("item", "url"),
    [
        ("https://API.openai.com/", "https://api.openai.com/v1"),
        ("https://api.openai.com:443", "https://api.openai.com/"),
        ("https://*.example.org", "https://a.example.org/"),
        ("https://*.example.org", "https://b.a.example.org/"),
        ("https://*.example.org:8443", "https://a.example.org:8443/"),
        ("api", "https://api.example.com/x"),
        ("public", "https://anyone.example/"),
    ],
)
def test_the_control_a_listed_origin_is_allowed(item: str, url: str) -> None:
    assert allows([item], url)


@pytest.mark.parametrize(
    "item",
    [
        *("", " api", "API", "*", "https://*", "https://*.com", "https://*.*.example.org", "https://a.*.org"),
        *(
            "https://*example.org",
            "https://user@api.openai.com",
            "https://user:pw@api.openai.com",
            "ftp://a.b",
        ),
        *(
            "https://api.openai.com/v1",
            "https://api.openai.com?x",
            "https://api.openai.com#x",
            "//a.b",
            "a.b",
        ),
        *(
            "http://api.openai.com",
            "http://*.example.org",
            "https://\u0430pi.openai.com",
            "https://a b",
            None,
            7,
        ),
        *(
            "https://a.b:99999",
            "https://*.example.org:0",
            "https://*.example.org:99999",
            "https://a.b\n",
            "https://",
        ),
        *(
            "https://a.b\\@c.d",
            "https://[::1",
            "https://a%2eb",
            "x" * (MAX_ITEM + 1),
            "https://*.example.org.",
        ),
    ],
)
def test_an_item_that_is_not_one_origin_is_refused(item: Any) -> None:
    with pytest.raises(ValueError):
        parse_item(item)


@pytest.mark.parametrize(
    "name",
    [
        *("co.uk", "github.io", "s3.amazonaws.com", "amazonaws.com", "core.windows.net", "windows.net"),
        *(
            "s3.eu-central-1.amazonaws.com",
            "herokuapp.com",
            "pages.dev",
            "kawasaki.jp",
            "compute.amazonaws.com",
        ),
    ],
)
def test_no_wildcard_has_names_that_anyone_can_have(name: str) -> None:
    with pytest.raises(ValueError, match="public suffix"):
        check_wildcards(["api", f"https://*.{name}"])


@pytest.mark.parametrize("name", ["openai.com", "example.co.uk", "acme.github.io", "bucket.s3.amazonaws.com"])
def test_the_control_a_name_of_one_owner_may_have_a_wildcard(name: str) -> None:
    check_wildcards([f"https://*.{name}", f"https://{name}"])


def test_each_list_must_allow_an_origin() -> None:
    assert allows(["public"], "https://a.example/", ("https://a.example",))
    assert not allows(["public"], "https://b.example/", ("https://a.example",))
    assert not allows(["open"], "https://b.example/", ("api",))
    assert not allows([], "https://api.example.com/")


def test_only_open_lists_are_open_and_an_empty_list_allows_nothing() -> None:
    assert Egress().is_open and Egress((("open",), ("api", "open"))).is_open
    assert not Egress(((),)).is_open and not Egress((("open",), ("api",))).is_open
    assert effective(None, None, None, required=True) == {"handler": ("api",)}
    assert effective([], None, None, required=True) == {"handler": ()}
    both = effective(None, ["open"], ["api"], required=True)
    assert both == {"definition": ("open",), "operator": ("api",)}


def test_what_is_denied_names_the_lists_that_lack_it_and_the_line_to_add():
    lists = (("api", "https://a.acme.test"), ("https://*.acme.test",), ("api",))
    gate = Gate(lists, ["https://api.other.test"], owners=("handler", "definition", "operator"))

    def lacking(origin: str) -> list[Owner]:
        return gate.deniers(origin_of(origin))

    assert lacking("https://api.other.test") == ["definition"]
    assert lacking("https://a.acme.test") == ["operator"]
    assert not_listed("https://a.acme.test", lacking("https://a.acme.test")) == (
        'https://a.acme.test is not in the egress list of this run: add "https://a.acme.test" to [execution] '
        "egress of worker.toml"
    )
    assert denial(lacking("https://a.acme.test")) == "not listed in [execution] egress of worker.toml"
    every = lacking("https://b.example")
    assert deniers(not_listed("https://b.example", every)) == ("handler", "definition", "operator")


def test_http_is_not_proposed_where_it_cannot_be_listed():
    assert not_listed("http://a.test", ["handler"]).endswith("for loopback addresses only: use https")
    assert 'add "http://127.0.0.1:80" to' in not_listed("http://127.0.0.1:80", ["handler"])


def test_lists_of_a_worker_that_did_not_name_their_owners_are_the_handlers():
    gate = Gate((("api",),), [])

    message = not_listed("https://a.test", gate.deniers(origin_of("https://a.test")))
    assert deniers(message) == ("handler",)
    assert denial(gate.deniers(origin_of("https://a.test"))) == "not listed"


def test_listing_an_origin_exempts_it_from_no_check_of_its_address() -> None:
    gate = Gate([["https://a.example", "public", "api"]], API, ["http://10.0.0.5"])
    assert gate.checks_address(origin_of("https://a.example"))
    assert not gate.checks_address(origin_of("https://api.example.com"), public=True)
    assert not gate.checks_address(origin_of("http://10.0.0.5"))
    opened = Gate([], API)
    assert not opened.checks_address(origin_of("https://a.example"))
    assert opened.checks_address(origin_of("https://a.example"), public=True)


def test_lists_have_limits() -> None:
    assert parse_items(["api", "api"]) == ("api",)
    for texts in ("api", 7, None, [f"https://a{number}.example" for number in range(MAX_ITEMS + 1)]):
        with pytest.raises(ValueError):
            parse_items(texts)


def test_a_placeholder_is_one_for_each_run_and_name_and_tells_nothing() -> None:
    found = {placeholder_of(run, name) for run in ("a", "b") for name in ("x", "y", TOKEN)}
    assert len(found) == 6
    assert "value" not in repr(BoundSecret("x", "value", "https://a.example"))
