"""What a run says of a request is a claim: whatever is not one plain request to one origin is refused."""

from __future__ import annotations

from typing import Any

import pytest

from worker.features.egress.requests import LONGEST_TIMEOUT, RequestRefused, RunRequest, read_request
from worker.guard.urls import Origin


def read(**fields: Any) -> RunRequest:
    common: dict[str, Any] = {
        "method": "GET",
        "scheme": "https",
        "host": "api.example.com",
        "port": 443,
        "target": "/v1/things?x=1",
        "headers": [],
        "timeout": {},
        "public": False,
        "fresh": False,
    }
    return read_request(common | fields)


def sent(*headers: tuple[str, str]) -> list[tuple[bytes, bytes]]:
    return read(headers=list(headers)).headers


HOSTILE = {
    "method with a space": {"method": "GET /x HTTP/1.1\r\nA: b"},
    "lower case": {"method": "trace"},
    "TRACE": {"method": "TRACE"},
    "TRACK": {"method": "TRACK"},
    "CONNECT": {"method": "CONNECT"},
    "no method": {"method": ""},
    "a list": {"method": ["GET"]},
    "scheme": {"scheme": "ftp"},
    "upper scheme": {"scheme": "HTTPS"},
    "user": {"host": "api.example.com@evil.example"},
    "host with a port": {"host": "evil.example:80"},
    "host with a path": {"host": "evil.example/"},
    "host with a line": {"host": "evil.example\r\nA: b"},
    "host with a zero": {"host": "evil.example\0.api.example.com"},
    "host in Unicode": {"host": "\uff41pi.example.com"},
    "host in Cyrillic": {"host": "\u0430pi.example.com"},
    "host with a zone": {"host": "fe80::1%eth0"},
    "percent": {"host": "api%2eexample.com"},
    "empty host": {"host": ""},
    "brackets only": {"host": "[]"},
    "long host": {"host": "a" * 254},
    "no text": {"host": 7},
    "port 0": {"port": 0},
    "high port": {"port": 65_536},
    "port of text": {"port": "443"},
    "port that is true": {"port": True},
    "part of a port": {"port": 443.5},
    "absolute target": {"target": "https://evil.example/"},
    "no slash": {"target": "@evil.example/"},
    "target with a space": {"target": "/a HTTP/1.1"},
    "target with a line": {"target": "/a\r\nHost: evil.example"},
    "target in Unicode": {"target": "/\u010d\u010a"},
    "long target": {"target": "/" + "a" * 65_536},
    "headers of text": {"headers": "ab"},
    "headers that are none": {"headers": None},
    "a header of three": {"headers": [("a", "b", "c")]},
    "a header of numbers": {"headers": [(1, 2)]},
    "many headers": {"headers": [("a", "b")] * 201},
    "timeouts in a list": {"timeout": [1]},
    "a timeout of text": {"timeout": {"read": "soon"}},
    "NaN": {"timeout": {"read": float("nan")}},
    "NaN in a text": {"timeout": {"read": "nan"}},
    "infinity": {"timeout": {"connect": float("inf")}},
    "a huge number": {"timeout": {"connect": 10**400}},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_head_is_refused(what: str) -> None:
    with pytest.raises(RequestRefused):
        read(**HOSTILE[what])


@pytest.mark.parametrize(
    "field", ["method", "scheme", "host", "port", "target", "headers", "timeout", "public"]
)
def test_a_head_that_lacks_a_field_is_refused(field: str) -> None:
    fields = {
        "method": "GET",
        "scheme": "https",
        "host": "a.example",
        "port": 443,
        "target": "/",
        "headers": [],
        "timeout": {},
        "public": False,
        "fresh": False,
    }
    del fields[field]
    with pytest.raises(RequestRefused):
        read_request(fields)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("A\r\nB", "c"),
            ("A B", "c"),
            ("A:", "c"),
            ("", "c"),
            ("A", "b\r\nC: d"),
            ("A", "b\nC: d"),
            ("A", "b\0"),
        ),
        *(
            ("A", "b\rC"),
            ("A", "\x7f"),
            ("\u010a", "c"),
            ("A", "\u010d\u010aB: c"),
            ("A" * 257, "b"),
            (" A", "b"),
        ),
        *(
            ("Content-Length", "-1"),
            ("Content-Length", "+1"),
            ("Content-Length", "1,1"),
            ("Content-Length", "0x1"),
        ),
        *(
            ("Content-Length", " 1"),
            ("Content-Length", "\u0661"),
            ("Content-Length", "9" * 19),
            ("Host", "evil.example"),
        ),
        *(
            ("Host", "api.example.com, evil.example"),
            ("Upgrade", "WebSocket"),
            ("Host", "api.example.com:8443"),
        ),
    ],
)
def test_a_header_that_could_smuggle_is_refused(name: str, value: str) -> None:
    with pytest.raises(RequestRefused):
        sent((name, value))


def test_lengths_that_differ_are_refused_and_equal_ones_are_one() -> None:
    with pytest.raises(RequestRefused):
        sent(("Content-Length", "1"), ("content-length", "2"))
    assert sent(("Content-Length", "05"), ("content-length", "5"))[1:] == [(b"Content-Length", b"5")]


def test_the_framing_and_the_host_are_the_brokers() -> None:
    found = sent(
        ("Transfer-Encoding", "chunked"),
        ("Transfer-Encoding", "xchunked"),
        ("Connection", "keep-alive, X-Key"),
        ("Keep-Alive", "1"),
        ("Upgrade", "h2c"),
        ("HTTP2-Settings", "AAMAAABkAAQAAP__"),
        ("Expect", "100-continue"),
        ("TE", "trailers"),
        ("Trailer", "X-Key"),
        ("Proxy-Connection", "close"),
        ("host", "API.example.com"),
        ("HOST", "api.example.com:443"),
        ("Kept", " \t yes "),
    )
    assert found == [(b"Host", b"api.example.com"), (b"Kept", b"yes")]


@pytest.mark.parametrize(
    "host", ["api.example.com.", "api.example.com..", "xapi.example.com", "example.com", "127.1"]
)
def test_a_name_that_only_looks_like_a_listed_one_is_another_origin(host: str) -> None:
    assert read(host=host).origin != Origin("https", "api.example.com", 443)
    assert read(host="API.EXAMPLE.COM").origin == Origin("https", "api.example.com", 443)


def test_times_have_limits() -> None:
    found = read(timeout={"connect": -5, "read": 1e300, "write": None}).timeout
    assert found == {
        "connect": 0.001,
        "read": LONGEST_TIMEOUT,
        "write": LONGEST_TIMEOUT,
        "pool": LONGEST_TIMEOUT,
    }


def test_what_is_refused_is_not_repeated_in_the_error() -> None:
    with pytest.raises(RequestRefused) as raised:
        sent(("A", "a secret value\r\n"))
    assert "secret" not in str(raised.value)
