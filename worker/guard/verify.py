"""Verify an access token: form (RFC 7515), signature, issuer, audience, lifetime (RFC 7519, 8725, 9068)."""

from __future__ import annotations

import base64
import math
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from jwt.algorithms import get_default_algorithms

from .clock import Clock
from .decode import invalid
from .issuer import Issuer
from .profile import ALGORITHMS, is_texts
from .strict_json import MalformedJson, loads

MAX_TOKEN = 16 * 1024
MAX_KID = 256
# Header parameters that change what is signed or how, or that carry a key (RFC 8725, sections 3.1 and 3.10).
FORBIDDEN = {
    **{"crit": "crit", "b64": "b64", "zip": "zip", "cty": "nested", "enc": "encrypted"},
    **dict.fromkeys(("jwk", "jku", "x5u", "x5c"), "embedded_key"),
}
YEAR_9999 = 253_402_300_799  # its last second, in Unix time
_BASE64URL = re.compile(r"[A-Za-z0-9_-]*")
_LETTERS = f"{string.ascii_uppercase}{string.ascii_lowercase}{string.digits}-_"
# The bits of the last letter that belong to no byte, by the number of letters after the last four.
_LEFTOVER = {2: 0b1111, 3: 0b11}
_SIGNATURES = {name: made for name, made in get_default_algorithms().items() if name in ALGORITHMS}


@dataclass(frozen=True, slots=True)
class Key:
    """A public key, and the algorithms that it may be used with."""

    kid: str
    algorithms: frozenset[str]
    public: PublicKeyTypes = field(repr=False, compare=False)

    def signed(self, message: bytes, signature: bytes, algorithm: str) -> bool:
        """Whether this key made the signature; False if the algorithm does not fit the key."""
        if algorithm not in self.algorithms:
            return False
        return _SIGNATURES[algorithm].verify(message, self.public, signature)


class Keys(Protocol):
    async def find(self, kid: str) -> Key: ...


@dataclass(frozen=True, slots=True, repr=False)
class Unverified:
    """A token whose form and claims are acceptable, before its signature is verified."""

    kid: str
    _algorithm: str
    _payload: Mapping[str, Any]
    _signed: bytes
    _signature: bytes

    def verified_by(self, key: Key) -> Mapping[str, Any]:
        """The payload if the key made the signature; raises TokenRefused(token_invalid)."""
        if self._algorithm not in key.algorithms:
            raise invalid("key_algorithm", "its algorithm does not fit its key")
        if not key.signed(self._signed, self._signature, self._algorithm):
            raise invalid("signature", "its signature does not match its key")
        return self._payload


def read(
    text: str, *, issuer: Issuer, audience: str, clock: Clock, beside: frozenset[str] = frozenset()
) -> Unverified:
    """All checks of `verify` but the signature; raises as it does."""
    header, payload, signed, signature = _parse(text)
    algorithm, kid = _check_header(header, issuer)
    _check_claims(payload, issuer, audience, beside, clock.now().timestamp())
    return Unverified(kid, algorithm, payload, signed, signature)


async def verify(
    text: str,
    *,
    issuer: Issuer,
    audience: str,
    keys: Keys,
    clock: Clock,
    beside: frozenset[str] = frozenset(),
) -> Mapping[str, Any]:
    """The payload of a valid token of this issuer for exactly this audience.

    `beside` are audiences that it may have as well: some providers put themselves into ID tokens.

    The key is looked up last, so that a forged token rarely causes a request for keys.

    Raises:
        TokenRefused: token_invalid; `detail` is the code of the check that failed.
        IssuerUnavailable: the signing key cannot be read or is not published yet, so there is no verdict.
    """
    token = read(text, issuer=issuer, audience=audience, clock=clock, beside=beside)
    return token.verified_by(await keys.find(token.kid))


async def verify_message(
    text: str, *, issuer: Issuer, keys: Keys, check: Callable[[Mapping[str, Any]], object]
) -> Mapping[str, Any]:
    """The payload of a message that this issuer signed but that is not a token, such as a webhook.

    `check` must refuse all payloads that are not such messages, above all tokens: only the
    signature says who made it. It is called before the key is looked up.

    Raises as `verify` and `check` do.
    """
    header, payload, signed, signature = _parse(text)
    algorithm, kid = _check_header(header, issuer)
    if str(header.get("typ", "jwt")).lower().removeprefix("application/") != "jwt":
        raise invalid("type", "its typ is that of a token, not of a message")
    check(payload)
    return Unverified(kid, algorithm, payload, signed, signature).verified_by(await keys.find(kid))


def _parse(text: str) -> tuple[Mapping[str, Any], Mapping[str, Any], bytes, bytes]:
    """Header, payload, signed bytes and signature of a JWS of two JSON objects; nothing is verified."""
    if len(text) > MAX_TOKEN:
        raise invalid("oversize", "it is larger than 16 KiB")
    parts = text.split(".")
    if len(parts) != 3:
        raise invalid("parts", "it does not have three parts")
    header, payload, signature = map(decode_base64url, parts)
    if header is None or payload is None or signature is None:
        raise invalid("base64url", "a part of it is not unpadded base64url")
    if not signature:
        raise invalid("signature_missing", "it is not signed")
    signed = text.rpartition(".")[0].encode("ascii")
    return _json_object(header, "header"), _json_object(payload, "payload"), signed, signature


def decode_base64url(text: str) -> bytes | None:
    """The bytes of unpadded base64url (RFC 7515, section 2), or None.

    Leftover bits must be zero, else one token could be written in several ways.
    """
    left = len(text) % 4
    if left == 1 or not _BASE64URL.fullmatch(text):
        return None
    if left and _LETTERS.index(text[-1]) & _LEFTOVER[left]:
        return None
    return base64.urlsafe_b64decode(text + "=" * (-left % 4))


def _json_object(raw: bytes, part: str) -> Mapping[str, Any]:
    try:
        value = loads(raw)
    except MalformedJson as malformed:
        raise invalid(malformed.code, f"its {part} is not acceptable JSON") from None
    if not isinstance(value, dict):
        raise invalid(part, f"its {part} is not a JSON object")
    return value


def _check_header(header: Mapping[str, Any], issuer: Issuer) -> tuple[str, str]:
    """The algorithm and key id of an acceptable header."""
    for name, code in FORBIDDEN.items():
        if name in header:
            raise invalid(code, f"its header has {name}")
    algorithm, kid, profile = header.get("alg"), header.get("kid"), issuer.profile
    if not isinstance(algorithm, str) or algorithm not in profile.algorithms:
        raise invalid("algorithm", "its algorithm is not one of the issuer's")
    if "typ" in header or profile.type_required:
        kind = header.get("typ")
        if not isinstance(kind, str) or kind.lower().removeprefix("application/") not in profile.types:
            raise invalid("type", "its typ is not that of an access token")
    if not isinstance(kid, str) or not 0 < len(kid) <= MAX_KID:
        raise invalid("kid", "it does not name its key")
    return algorithm, kid


def _check_claims(
    payload: Mapping[str, Any], issuer: Issuer, audience: str, beside: frozenset[str], now: float
) -> None:
    if payload.get("iss") != issuer.iss:
        raise invalid("issuer", "another issuer made it")
    _check_audience(payload.get("aud"), audience, beside)
    profile = issuer.profile
    expires_at, issued_at = _seconds(payload, "exp"), _seconds(payload, "iat")
    leeway = profile.leeway.total_seconds()
    # Half-open, and without leeway: a token that expires this second has already expired.
    if expires_at <= now:
        raise invalid("expired", "it has expired")
    if issued_at > now + leeway:
        raise invalid("issued_in_future", "it is issued in the future")
    if not 0 < expires_at - issued_at <= profile.max_lifetime.total_seconds():
        raise invalid("lifetime", "its lifetime is not between 0 and the provider's maximum")
    if "nbf" in payload and _seconds(payload, "nbf") > now + leeway:
        raise invalid("not_yet_valid", "it is not valid yet")


def _check_audience(claim: Any, audience: str, beside: frozenset[str]) -> None:
    if claim is None:
        raise invalid("audience_missing", "it has no audience")
    audiences = [claim] if isinstance(claim, str) else claim
    if not is_texts(audiences) or audience not in audiences:
        raise invalid("audience", "it is for another audience")
    if len([entry for entry in audiences if entry not in beside]) > 1:
        # Any other audience could replay the token here, or be attacked with it.
        raise invalid("audience_wider", "it is for other audiences as well")


def _seconds(payload: Mapping[str, Any], name: str) -> float:
    value = payload.get(name)
    if value is None:
        fault = "missing"
    elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        fault = "type"
    elif not 0 <= value <= YEAR_9999:
        fault = "range"
    else:
        return float(value)
    raise invalid(f"{name}_{fault}", f"its {name} is not a Unix time")
