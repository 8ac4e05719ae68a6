"""Signature, issuer, audience, lifetime and form of an access token: RFC 7519, 8725 and 9068."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from worker.clock import Clock
from worker.errors import TokenRefused
from worker.tokens.issuer import Issuer
from worker.tokens.jws import MAX_KID, Key, Parsed, invalid, parse

# Parameters that change what is signed or how, or that bring a key along (RFC 8725, sections 3.1 and 3.10).
FORBIDDEN = {
    "crit": "crit",
    "b64": "b64",
    "zip": "zip",
    "cty": "nested",
    "enc": "encrypted",
    "jwk": "embedded_key",
    "jku": "embedded_key",
    "x5u": "embedded_key",
    "x5c": "embedded_key",
}
LAST_INSTANT = 253_402_300_799  # the end of the year 9999


class Keys(Protocol):
    """Where the key of a kid comes from."""

    async def find(self, kid: str) -> Key: ...


async def verify(text: str, *, issuer: Issuer, audience: str, keys: Keys, clock: Clock) -> Mapping[str, Any]:
    """The payload of a token of this issuer for exactly this audience, if everything about it is in order.

    What costs nothing is refused first, so that a token of a stranger never causes a
    request for keys.

    Raises:
        TokenRefused: token_invalid; `detail` says what is wrong with it.
        IssuerUnavailable: the key it is signed with cannot be had yet, so there is no verdict.
    """
    parsed = parse(text)
    algorithm, kid = _check_header(parsed, issuer)
    _check_claims(parsed.payload, issuer, audience, clock.now().timestamp())
    key = await keys.find(kid)
    if algorithm not in key.algorithms:
        raise invalid("key_algorithm", "its algorithm is not one of its key's")
    if not key.signed(parsed.signed, parsed.signature, algorithm):
        raise invalid("signature", "its signature is not its key's")
    return parsed.payload


def _check_header(parsed: Parsed, issuer: Issuer) -> tuple[str, str]:
    header, profile = parsed.header, issuer.profile
    for name, code in FORBIDDEN.items():
        if name in header:
            raise invalid(code, f"its header has {name}")
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in profile.algorithms:
        raise invalid("algorithm", "its algorithm is not one of the issuer's")
    kind = header.get("typ")
    if kind is None and not profile.type_required and "typ" not in header:
        pass
    elif not isinstance(kind, str) or kind.lower().removeprefix("application/") not in profile.types:
        raise invalid("type", "its typ is not that of an access token")
    kid = header.get("kid")
    if not isinstance(kid, str) or not 0 < len(kid) <= MAX_KID:
        raise invalid("kid", "it does not name its key")
    return algorithm, kid


def _check_claims(payload: Mapping[str, Any], issuer: Issuer, audience: str, now: float) -> None:
    if payload.get("iss") != issuer.iss:
        raise invalid("issuer", "it is of another issuer")
    _check_audience(payload.get("aud"), audience)
    profile = issuer.profile
    expires_at, issued_at = _seconds(payload, "exp"), _seconds(payload, "iat")
    leeway = profile.leeway.total_seconds()
    # Half-open on purpose, and without leeway: a token that expires at this very second is refused.
    if expires_at <= now:
        raise invalid("expired", "it has expired")
    if issued_at > now + leeway:
        raise invalid("issued_in_future", "it is issued in the future")
    if not 0 < expires_at - issued_at <= profile.max_lifetime.total_seconds():
        raise invalid("lifetime", "its lifetime is longer than this provider's can be, or none")
    if "nbf" in payload and _seconds(payload, "nbf") > now + leeway:
        raise invalid("not_yet_valid", "it is not valid yet")


def _check_audience(claim: Any, audience: str) -> None:
    if claim is None:
        raise invalid("audience_missing", "it has no audience")
    audiences = [claim] if isinstance(claim, str) else claim
    if not isinstance(audiences, list) or audience not in audiences:
        raise invalid("audience", "it is for another audience")
    if len(audiences) > 1:
        # Whoever else it is for could use it here, or be attacked with it.
        raise invalid("audience_wider", "it is for other audiences as well")


def _seconds(payload: Mapping[str, Any], name: str) -> float:
    value = payload.get(name)
    if value is None:
        raise _time_fault(name, "missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _time_fault(name, "type")
    if not 0 <= value <= LAST_INSTANT:
        raise _time_fault(name, "range")
    return float(value)


def _time_fault(name: str, fault: str) -> TokenRefused:
    return invalid(f"{name}_{fault}", f"its {name} is no instant")
