"""Bindings: a secret that only the broker sends, to one origin and in a header. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from worker.guard.urls import DEFAULT_PORTS, Origin
from worker.model.definitions.origins import parse_origin
from worker.model.egress import BoundSecret, parse_item, placeholder_of
from worker.telemetry.masking import shown_url

# A field name (RFC 9110, section 5.1).
_FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}")
# Fields that frame or route a request, or that the broker sets itself: none of them can carry a secret.
RESERVED = frozenset(
    {
        *("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"),
        *(
            "http2-settings",
            "host",
            "content-length",
            "content-encoding",
            "content-type",
            "accept-encoding",
            "expect",
        ),
        *("proxy-authenticate", "proxy-authorization", "idempotency-key", "traceparent", "tracestate"),
    }
)
# Visible ASCII, with spaces only between (RFC 9110, section 5.5).
_SENDABLE = re.compile(r"[!-~](?:[ -~]*[!-~])?")


@dataclass(frozen=True, slots=True)
class Binding:
    """Where a secret may be sent: to `origin` only; with `header` the broker sets that header itself."""

    origin: str
    header: str | None = None


@dataclass(frozen=True, slots=True)
class OrgSecret:
    """A secret of an org, opened: given in clear, or bound."""

    value: str = field(repr=False)
    binding: Binding | None = None


OrgSecrets = Mapping[str, OrgSecret]


def in_clear(values: Mapping[str, str]) -> OrgSecrets:
    """Secrets without bindings."""
    return {name: OrgSecret(value) for name, value in values.items()}


def given_texts(run_id: str, secrets: OrgSecrets) -> dict[str, str]:
    """What a run gets, by name: the value, or the placeholder of a bound one."""
    return {
        name: each.value if each.binding is None else placeholder_of(run_id, name)
        for name, each in secrets.items()
    }


def bound_secrets(run_id: str, secrets: OrgSecrets) -> tuple[BoundSecret, ...]:
    """What only the broker of a run gets."""
    return tuple(
        BoundSecret(name, each.value, each.binding.origin, each.binding.header, placeholder_of(run_id, name))
        for name, each in secrets.items()
        if each.binding is not None
    )


def parse_bound_origin(text: str) -> str:
    """One origin in the form in which it is stored and compared. Raises ValueError."""
    parse_origin(text)
    try:
        origin = parse_item(text).origin
    except ValueError:
        origin = None
    if origin is None:
        raise ValueError(
            f"{shown_url(text)!r} is not one origin that may get a secret; write https and a host without "
            "a wildcard, such as https://api.openai.com; http is for loopback addresses only"
        )
    return _text_of(origin)


def _text_of(origin: Origin) -> str:
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    port = "" if origin.port == DEFAULT_PORTS[origin.scheme] else f":{origin.port}"
    return f"{origin.scheme}://{host}{port}"


def parse_header(text: str) -> str:
    """The name of a header that the broker may set, in lower case. Raises ValueError."""
    if _FIELD_NAME.fullmatch(text) is None:
        raise ValueError(f"{text[:100]!r} is not the name of a header; write one such as x-api-key")
    name = text.lower()
    if name in RESERVED:
        raise ValueError(f"{name} cannot carry a secret; name the header that the service reads it from")
    return name


# Characters of a bound secret.
LEAST = 8


def check_sendable(value: str) -> None:
    """Raise ValueError for a value that cannot be bound; the message does not quote it.

    A mask tells who guesses a whole value, so a run could find a short one by an echo of its guesses.
    """
    if _SENDABLE.fullmatch(value) is None:
        raise ValueError(
            "a header cannot carry it: it needs visible ASCII characters, in one line, without space around"
        )
    if len(value) < LEAST:
        raise ValueError(f"a bound secret needs at least {LEAST} characters")
