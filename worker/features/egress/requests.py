"""Requests of runs, as the broker reads and sends them: what a run says is a claim.

A run chooses method, URL, headers and body. Here they are read strictly, so that the service sees one
request, for the origin that was checked. The rest (the framing, Host and the connection) is the broker's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpcore

from worker.features.egress.injection import Headers
from worker.guard.urls import Origin

# Headers of a request, bytes of a target, and seconds that a request may wait for one step.
MAX_HEADERS = 200
MAX_TARGET = 64 * 1024
LONGEST_TIMEOUT = 3600.0
_METHOD = re.compile(r"[A-Z][A-Z-]{0,31}")
_HOST = re.compile(r"[a-z0-9._-]{1,253}|[0-9a-f:.]{2,45}")
_TARGET = re.compile(r"/[\x21-\x7e]*")
# RFC 9110, 5.1 and 5.5: a name is a token, and a value has no control characters.
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}")
_VALUE = re.compile(rb"[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?|")
# They describe a connection (RFC 9110, 7.6.1), which is the broker's own.
_OF_CONNECTION = frozenset(
    [
        *(b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding"),
        *(b"upgrade", b"http2-settings", b"expect"),
    ]
)
# The answer to these repeats the request, or is not one.
_REFUSED_METHODS = ("TRACE", "TRACK", "CONNECT")
_STEPS = ("connect", "read", "write", "pool")


# The code of an answer of a worker, behind a host, that does not know a call.
UNKNOWN_CALL = "unknown_call"
NO_LEASE = "the worker's lease does not hold now; nothing was sent"


class RequestRefused(Exception):
    """A request that is not sent; `kind` as in `handlers.brokered`. `retry_after` is in seconds."""

    def __init__(self, kind: str, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after = retry_after


@dataclass(slots=True)
class RunRequest:
    """A request that was read; `public` if its addresses must be public, `fresh` if its token must be new."""

    method: str
    origin: Origin
    target: bytes
    headers: Headers
    timeout: Mapping[str, float]
    public: bool
    fresh: bool

    def url(self) -> httpcore.URL:
        scheme, host, port = self.origin
        name = f"[{host}]" if ":" in host else host
        return httpcore.URL(scheme=scheme.encode(), host=name.encode(), port=port, target=self.target)


def read_request(fields: Mapping[str, Any]) -> RunRequest:
    """The request in the head of a run. Raises RequestRefused."""
    try:
        method, target = str(fields["method"]), str(fields["target"])
        if method in _REFUSED_METHODS:
            raise RequestRefused("refused", f"{method} is refused: its answer would repeat the headers")
        if _METHOD.fullmatch(method) is None:
            raise RequestRefused("refused", "the method is not one of HTTP")
        if len(target) > MAX_TARGET or _TARGET.fullmatch(target) is None:
            raise RequestRefused("refused", "the path is not encoded as in RFC 3986, or too long")
        origin = _origin(fields["scheme"], fields["host"], fields["port"])
        headers = _headers(fields["headers"], origin)
        timeout = {step: _seconds(fields["timeout"].get(step)) for step in _STEPS}
        flags = fields["public"] is True, fields["fresh"] is True
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise RequestRefused("refused", "the request is not as a client of ctx sends it") from error
    return RunRequest(method, origin, target.encode(), headers, timeout, *flags)


def _origin(scheme: Any, host: Any, port: Any) -> Origin:
    if scheme not in ("http", "https"):
        raise RequestRefused("UnsupportedProtocol", "a URL must begin with http:// or https://")
    if not isinstance(host, str) or _HOST.fullmatch(host.lower().strip("[]")) is None:
        raise RequestRefused("refused", "the host is not a name or an address")
    if type(port) is not int or not 0 < port < 65536:
        raise RequestRefused("refused", "the port is not a number from 1 to 65535")
    return Origin(scheme, host.lower().strip("[]"), port)


def _headers(given: Any, origin: Origin) -> Headers:
    """The headers to send. A body's length stays, and httpcore holds the body to it."""
    if len(given) > MAX_HEADERS:
        raise RequestRefused("refused", f"more than {MAX_HEADERS} headers")
    headers: Headers = [(b"Host", host_of(origin))]
    lengths = set()
    for name_text, value_text in given:
        name, value = name_text.encode("latin-1"), value_text.encode("latin-1")
        if _NAME.fullmatch(name) is None or _VALUE.fullmatch(value.strip(b" \t")) is None:
            raise RequestRefused("LocalProtocolError", "HTTP does not allow this name or value of a header")
        lower = name.lower()
        if lower == b"host":
            if value.lower() not in (host_of(origin), host_of(origin, with_port=True)):
                raise RequestRefused("refused", "the header Host names another host than the URL")
        elif lower == b"content-length":
            lengths.add(int(value) if value.isdigit() and len(value) < 19 else -1)
        elif lower == b"upgrade" and b"websocket" in value.lower():
            raise RequestRefused("refused", "WebSocket is not possible by the broker")
        elif lower not in _OF_CONNECTION:
            headers.append((name, value.strip(b" \t")))
    if len(lengths) > 1 or -1 in lengths:
        raise RequestRefused("LocalProtocolError", "Content-Length is not one number")
    headers += [(b"Content-Length", b"%d" % length) for length in lengths]
    return headers


def host_of(origin: Origin, *, with_port: bool = False) -> bytes:
    """The value of Host: without the port that the scheme has."""
    name = f"[{origin.host}]" if ":" in origin.host else origin.host
    usual = {"http": 80, "https": 443}[origin.scheme] == origin.port
    return (name if usual and not with_port else f"{name}:{origin.port}").encode()


def _seconds(given: Any) -> float:
    if given is None:
        return LONGEST_TIMEOUT
    seconds = float(given)
    if not math.isfinite(seconds):  # a timer of NaN would delay those of others
        raise ValueError("a time that is not finite")
    return min(max(seconds, 0.001), LONGEST_TIMEOUT)


def shown(origin: Origin) -> str:
    """An origin as people write it."""
    return f"{origin.scheme}://{host_of(origin).decode()}"
