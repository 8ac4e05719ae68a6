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
    check_wildcards,
    effective,
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
    assert effective(None, None, None, required=True) == (("api",),)
    assert effective([], None, None, required=True) == ((),)
    assert effective(None, ["open"], ["api"], required=True) == (("open",), ("api",))


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
