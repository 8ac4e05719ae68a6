"""Bindings: which origins and headers a secret can be bound to, and what a run gets in its place."""

from __future__ import annotations

import pytest

from worker.model.bindings import (
    RESERVED,
    Binding,
    OrgSecret,
    bound_secrets,
    check_sendable,
    given_texts,
    parse_bound_origin,
    parse_header,
)
from worker.model.egress import BoundSecret, placeholder_of


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("https://api.openai.com", "https://api.openai.com"),
        ("HTTPS://API.OpenAI.com/", "https://api.openai.com"),
        ("https://api.openai.com:443", "https://api.openai.com"),
        ("https://api.openai.com:8443/", "https://api.openai.com:8443"),
        ("http://localhost:80", "http://localhost"),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("http://[::1]:8080", "http://[::1]:8080"),
        ("https://[2001:db8::1]", "https://[2001:db8::1]"),
    ],
)
def test_an_origin_has_one_stored_form(text: str, stored: str) -> None:
    assert parse_bound_origin(text) == stored
    assert parse_bound_origin(stored) == stored


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "api.openai.com",
            "https://",
            "//api.openai.com",
            "ftp://api.openai.com",
            "api",
            "public",
            "open",
        ),
        *("https://api.openai.com/v1", "https://api.openai.com?a=b", "https://api.openai.com#a"),
        *("https://*.openai.com", "https://*", "http://api.openai.com", "http://127.0.0.1.nip.io"),
        *("https://api.openai.com:0", "https://api.openai.com:65536", "https://api.openai.com:x"),
        *("https://a.com https://b.com", "https://a.com,https://b.com", "https://a.com\n", " https://a.com"),
        *("https://a.com@evil.com", "https://a.com\\@evil.com", "https://ａ.com", "https://a%2ecom"),
    ],
)
def test_what_is_not_one_encrypted_origin_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="https"):
        parse_bound_origin(text)


def test_a_password_in_a_refused_origin_is_not_quoted() -> None:
    with pytest.raises(ValueError) as error:
        parse_bound_origin("https://me:canary-password@api.openai.com")
    assert "canary" not in str(error.value)


def test_a_header_is_a_field_name_in_lower_case() -> None:
    assert parse_header("X-API-Key") == "x-api-key"
    assert parse_header("authorization") == "authorization"


@pytest.mark.parametrize(
    "text",
    [
        *("", "x api key", "x-api-key:", ":authority", "x-api-key\r\nhost", "x\0", "schlüssel", "x" * 101),
        *("Host", "Content-Length", "Transfer-Encoding", "Connection", "TE", "Upgrade", "Trailer", "Expect"),
        *sorted(RESERVED),
    ],
)
def test_a_header_that_frames_or_routes_a_request_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="header"):
        parse_header(text)


@pytest.mark.parametrize("value", ["sk-0123456789", "Bearer sk-0123456789", "!~!~!~!~"])
def test_a_value_that_a_header_carries(value: str) -> None:
    check_sendable(value)


@pytest.mark.parametrize(
    "value",
    [
        *(
            "",
            " sk-1",
            "sk-1 ",
            "sk\r\nhost: evil",
            "sk\n1",
            "sk-1\n",
            "sk\r1",
            "sk\0",
            "sk\t1",
            "sk\x7f",
            "sk-ü",
        ),
        *("sk\u2028", "sk\x85"),
    ],
)
def test_a_value_that_no_header_carries_is_refused_and_not_quoted(value: str) -> None:
    with pytest.raises(ValueError, match="a header cannot carry it") as error:
        check_sendable(value)
    assert not value.strip() or value not in str(error.value)


def test_a_run_gets_placeholders_and_the_broker_what_is_bound() -> None:
    secrets = {
        "mail": OrgSecret("mail-canary"),
        "openai": OrgSecret("sk-canary", Binding("https://api.openai.com", "x-api-key")),
    }

    given, bound = given_texts("run", secrets), bound_secrets("run", secrets)

    place = placeholder_of("run", "openai")
    assert given == {"mail": "mail-canary", "openai": place}
    assert bound == (BoundSecret("openai", "sk-canary", "https://api.openai.com", "x-api-key", place),)
    assert given == given_texts("run", secrets) != given_texts("another run", secrets)
    assert "canary" not in repr(secrets) + repr(bound)
