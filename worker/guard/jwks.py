"""JSON Web Key Sets (RFC 7517): read verification keys strictly, and keep the last good set of an issuer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from .clock import Clock
from .decode import invalid
from .endpoints import Endpoints
from .errors import IssuerUnavailable, KeyNotPublished
from .issuer import Issuer
from .profile import ALGORITHMS
from .report import Report, log
from .single_flight import Document
from .verify import MAX_KID, Key, decode_base64url

MAX_KEYS = 100
RSA_BITS = range(2048, 8193)
CURVES: Mapping[str, tuple[str, ec.EllipticCurve]] = {
    "P-256": ("ES256", ec.SECP256R1()),
    "P-384": ("ES384", ec.SECP384R1()),
    "P-521": ("ES512", ec.SECP521R1()),
}
RSA_ALGORITHMS = frozenset(name for name in ALGORITHMS if name[:2] in ("RS", "PS"))

# All in seconds.
COOLDOWN = 10.0  # between two fetches caused by unknown key ids
PUBLICATION = 60.0  # an unknown key id may be published this long after it was first seen
PAUSES = (2.0, 60.0)  # the first and the longest after failed fetches
MAX_REMEMBERED = 1_000


class KeySet:
    """The keys of one issuer, read at its endpoints. Its times are of the monotonic clock.

    Unless it `awaits` keys, it refuses an unknown kid at once: a guard's caller can retry later.
    """

    def __init__(
        self,
        issuer: Issuer,
        client: httpx.AsyncClient,
        *,
        clock: Clock,
        report: Report = log,
        awaits: bool = True,
    ) -> None:
        self.endpoints = Endpoints(issuer, client, clock=clock, report=report)
        self._issuer = issuer
        self._awaits = awaits
        self._clock = clock
        self._report = report
        self.document = Document(self._read, PAUSES, clock=clock, report=report)
        self._next_lookup = 0.0
        self._first_seen: OrderedDict[str, float] = OrderedDict()

    async def find(self, kid: str) -> Key:
        """The key with this id.

        Raises:
            KeyNotPublished: no set has it yet, and it was first seen less than 60 s ago.
            IssuerUnavailable: no set could be read yet; or none has it, and the last read failed.
            TokenRefused: token_invalid(unknown_kid).
        """
        self.document.refresh_if_old()
        keys = self.document.content
        just_read = keys is None
        if keys is None:
            keys = await self.document.fetch()
        if keys is None:
            raise self._unreadable()
        if kid not in keys:
            keys = await self._look_for(kid, keys, just_read)
        self._first_seen.pop(kid, None)
        return keys[kid]

    def known(self, kid: str) -> Key | None:
        """The key if it is in the set that was read last; fetches nothing, and any thread may ask."""
        return (self.document.content or {}).get(kid)

    def adopt(self, other: KeySet) -> None:
        """Start with the keys of another set of this issuer."""
        self.document.content, self.document.read_at = other.document.content, other.document.read_at

    async def close(self) -> None:
        """Cancel reads of the keys and of the endpoints."""
        await self.document.close()
        await self.endpoints.close()

    async def _look_for(self, kid: str, keys: dict[str, Key], just_read: bool) -> dict[str, Key]:
        """A newer set that has the kid; raises as `find` does."""
        document = self.document
        first_seen = self._first_seen.setdefault(kid, self._clock.monotonic())
        while len(self._first_seen) > MAX_REMEMBERED:
            self._first_seen.popitem(last=False)
        if not just_read and self._may_look():
            # If this fails, the last good set stays in use; only this kid has no verdict.
            keys = await document.fetch() or keys
        if kid in keys:
            return keys
        is_open = document.read_at < first_seen + PUBLICATION if self._awaits else bool(document.fault)
        if is_open and document.fault:
            raise self._unreadable()
        if is_open:
            raise KeyNotPublished(
                f"issuer {self._issuer.name} signed with a key that it does not publish yet",
                retry_after=self._retry_after,
            )
        raise invalid("unknown_kid", "it is signed with a key that the issuer does not publish")

    @property
    def _retry_after(self) -> float:
        return max(self.document.retry_after, self._next_lookup - self._clock.monotonic())

    def _unreadable(self) -> IssuerUnavailable:
        return IssuerUnavailable(
            f"the keys of issuer {self._issuer.name} cannot be read", retry_after=self._retry_after
        )

    def _may_look(self) -> bool:
        """Whether an unknown kid may start a fetch, or join one in progress."""
        if self.document.is_reading:
            return True
        if self._clock.monotonic() < self._next_lookup or not self.document.may_read:
            return False
        self._next_lookup = self._clock.monotonic() + COOLDOWN
        return True

    async def _read(self) -> dict[str, Key] | str:
        """The keys, or a code for what is wrong: an empty set never replaces a good one."""
        keys = await self.endpoints.read_keys()
        if not isinstance(keys, str):
            entries = keys.get("keys")
            if isinstance(entries, list) and len(entries) <= MAX_KEYS:
                keys = read_keys(entries, self._issuer.profile.algorithms) or "no_key"
            else:
                keys = "key_set"
        if isinstance(keys, str):
            self._report("keys.failed", issuer=self._issuer.name, error=keys)
        else:
            self._report("keys.fetched", issuer=self._issuer.name, keys=len(keys))
        return keys


def read_keys(entries: Iterable[Any], wanted: frozenset[str]) -> dict[str, Key]:
    """The usable keys of a set by their `kid`, for the wanted algorithms.

    Unusable entries are ignored (RFC 7517, section 5), and so is a kid that two different keys share.
    """
    keys: dict[str, Key] = {}
    ambiguous: set[str] = set()
    for entry in entries:
        key = read_key(entry, wanted)
        if key is not None and keys.setdefault(key.kid, key).public != key.public:
            ambiguous.add(key.kid)
    return {kid: key for kid, key in keys.items() if kid not in ambiguous}


def read_key(entry: Any, wanted: frozenset[str]) -> Key | None:
    """One entry of a key set, or None if it cannot verify a token's signature."""
    if not isinstance(entry, dict) or entry.get("use", "sig") != "sig":
        return None
    kid, operations = entry.get("kid"), entry.get("key_ops", ["verify"])
    if not isinstance(kid, str) or not 0 < len(kid) <= MAX_KID:
        return None
    if not isinstance(operations, list) or "verify" not in operations:
        return None
    try:
        public, algorithms = _read_public(entry)
    except ValueError:
        return None
    if "alg" in entry:
        algorithms &= {entry["alg"]} if isinstance(entry["alg"], str) else frozenset()
    algorithms &= wanted
    return Key(kid, algorithms, public) if algorithms else None


def _read_public(entry: dict[str, Any]) -> tuple[PublicKeyTypes, frozenset[str]]:
    """The key and the algorithms of its kind; raises ValueError for an unknown, weak or costly key."""
    match entry.get("kty"), entry.get("crv"):
        case "RSA", _:
            modulus, exponent = _number(entry, "n"), _number(entry, "e")
            if modulus.bit_length() in RSA_BITS and 3 <= exponent < 2**32:
                return rsa.RSAPublicNumbers(exponent, modulus).public_key(), RSA_ALGORITHMS
        case "EC", str(name) if name in CURVES:
            algorithm, curve = CURVES[name]
            numbers = ec.EllipticCurvePublicNumbers(_number(entry, "x"), _number(entry, "y"), curve)
            return numbers.public_key(), frozenset({algorithm})
        case "OKP", "Ed25519":
            return ed25519.Ed25519PublicKey.from_public_bytes(_bytes(entry, "x")), frozenset({"EdDSA"})
    raise ValueError("unsupported public key")


def _bytes(entry: dict[str, Any], name: str) -> bytes:
    value = entry.get(name)
    raw = decode_base64url(value) if isinstance(value, str) else None
    if not raw:
        raise ValueError(f"{name} is not base64url")
    return raw


def _number(entry: dict[str, Any], name: str) -> int:
    return int.from_bytes(_bytes(entry, name), "big")
