"""JWS and its keys (RFC 7515, RFC 7517): parse a token strictly, build verification keys from a JWKS."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from jwt.algorithms import get_default_algorithms

from worker.errors import TokenRefused
from worker.providers.profile import ALGORITHMS
from worker.tokens.strict_json import Malformed, loads

MAX_TOKEN = 16 * 1024
_BASE64URL = re.compile(r"[A-Za-z0-9_-]*")


@dataclass(frozen=True, slots=True)
class Parsed:
    """The parts of a token, none of which is verified."""

    header: Mapping[str, Any] = field(repr=False)
    payload: Mapping[str, Any] = field(repr=False)
    signed: bytes = field(repr=False)
    signature: bytes = field(repr=False)


def invalid(code: str, what: str) -> TokenRefused:
    """A token that is refused as invalid, for a reason with a code of its own."""
    return TokenRefused("token_invalid", code, f"token refused: {what} ({code})")


def parse(text: str) -> Parsed:
    """Take a token apart, and refuse what is no plain JWS of two JSON objects.

    Raises:
        TokenRefused: token_invalid, with one of the codes oversize, parts, base64url, signature_missing,
            header, payload, json, duplicate_member, depth, members, number, text.
    """
    if len(text) > MAX_TOKEN:
        raise invalid("oversize", "it is larger than 16 KiB")
    parts = text.split(".")
    if len(parts) != 3:
        raise invalid("parts", "it has not three parts")
    header, payload, signature = (decode_base64url(part) for part in parts)
    if header is None or payload is None or signature is None:
        raise invalid("base64url", "a part of it is no unpadded base64url")
    if not signature:
        raise invalid("signature_missing", "it is not signed")
    return Parsed(
        header=_json_object(header, "header"),
        payload=_json_object(payload, "payload"),
        signed=text.rpartition(".")[0].encode("ascii"),
        signature=signature,
    )


def decode_base64url(text: str) -> bytes | None:
    """The bytes of unpadded base64url (RFC 7515, section 2), or None.

    Each text has one way to be written: leftover bits must be zero, else one token
    would have many texts.
    """
    if not _BASE64URL.fullmatch(text) or len(text) % 4 == 1:
        return None
    decoded = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    return decoded if encode_base64url(decoded) == text else None


def encode_base64url(raw: bytes) -> str:
    """Unpadded base64url (RFC 7515, section 2)."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def _json_object(raw: bytes, part: str) -> Mapping[str, Any]:
    try:
        value = loads(raw)
    except Malformed as fault:
        raise invalid(fault.code, f"its {part} is no JSON that can be trusted") from None
    if not isinstance(value, dict):
        raise invalid(part, f"its {part} is no JSON object")
    return value


MAX_KEYS = 100
MAX_KID = 256
RSA_BITS = range(2048, 8193)
CURVES: Mapping[str, tuple[str, ec.EllipticCurve]] = {
    "P-256": ("ES256", ec.SECP256R1()),
    "P-384": ("ES384", ec.SECP384R1()),
    "P-521": ("ES512", ec.SECP521R1()),
}
RSA_ALGORITHMS = frozenset(name for name in ALGORITHMS if name[:2] in ("RS", "PS"))
_SIGNATURES = {name: made for name, made in get_default_algorithms().items() if name in ALGORITHMS}


@dataclass(frozen=True, slots=True)
class Key:
    """A public key, and the algorithms that it may be used with."""

    kid: str
    algorithms: frozenset[str]
    public: PublicKeyTypes = field(repr=False, compare=False)

    def signed(self, message: bytes, signature: bytes, algorithm: str) -> bool:
        """Whether the signature is this key's; the algorithm must be one of the key's."""
        if algorithm not in self.algorithms:
            return False
        return _SIGNATURES[algorithm].verify(message, self.public, signature)


def read_keys(entries: Iterable[Any], wanted: frozenset[str]) -> dict[str, Key]:
    """The usable keys of a set by their `kid`, for the algorithms wanted.

    An entry that is unusable is passed over, as RFC 7517, section 5, says. A kid that
    two different keys bear is nobody's.
    """
    keys: dict[str, Key] = {}
    ambiguous: set[str] = set()
    for entry in entries:
        key = read_key(entry, wanted)
        if key is None:
            continue
        other = keys.setdefault(key.kid, key)
        if other.public != key.public:
            ambiguous.add(key.kid)
    return {kid: key for kid, key in keys.items() if kid not in ambiguous}


def read_key(entry: Any, wanted: frozenset[str]) -> Key | None:
    """One entry of a key set, or None where it cannot verify a token's signature."""
    if not isinstance(entry, dict) or entry.get("use", "sig") != "sig":
        return None
    kid, operations = entry.get("kid"), entry.get("key_ops", ["verify"])
    if not isinstance(kid, str) or not 0 < len(kid) <= MAX_KID:
        return None
    if not isinstance(operations, list) or "verify" not in operations:
        return None
    try:
        public, fitting = _read_public(entry)
    except ValueError:
        return None
    if "alg" in entry:
        fitting = fitting & {entry["alg"]} if isinstance(entry["alg"], str) else frozenset()
    algorithms = fitting & wanted
    return Key(kid, algorithms, public) if algorithms else None


def _read_public(entry: dict[str, Any]) -> tuple[PublicKeyTypes, frozenset[str]]:
    """The key itself and the algorithms of its kind; a ValueError where it is none of ours or weak."""
    match entry.get("kty"):
        case "RSA":
            modulus, exponent = _number(entry, "n"), _number(entry, "e")
            if modulus.bit_length() not in RSA_BITS or not 3 <= exponent < 2**32:
                raise ValueError("RSA key too weak, or too costly")
            return rsa.RSAPublicNumbers(exponent, modulus).public_key(), RSA_ALGORITHMS
        case "EC":
            name = _text(entry, "crv")
            if name not in CURVES:
                raise ValueError("no curve of ours")
            algorithm, curve = CURVES[name]
            numbers = ec.EllipticCurvePublicNumbers(_number(entry, "x"), _number(entry, "y"), curve)
            return numbers.public_key(), frozenset({algorithm})
        case "OKP" if entry.get("crv") == "Ed25519":
            raw = decode_base64url(_text(entry, "x")) or b""
            return ed25519.Ed25519PublicKey.from_public_bytes(raw), frozenset({"EdDSA"})
    raise ValueError("no public key of ours")


def _text(entry: dict[str, Any], name: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is no text")
    return value


def _number(entry: dict[str, Any], name: str) -> int:
    raw = decode_base64url(_text(entry, name))
    if not raw:
        raise ValueError(f"{name} is no base64url")
    return int.from_bytes(raw, "big")
