"""JSON Web Key Sets (RFC 7517): read verification keys strictly, and keep the last good set of an issuer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from worker.claims.decode import invalid
from worker.clock import Clock
from worker.errors import IssuerUnavailable
from worker.providers.profile import ALGORITHMS
from worker.telemetry.events import emit
from worker.tokens.issuer import Endpoints, Issuer
from worker.tokens.single_flight import SingleFlight
from worker.tokens.verify import MAX_KID, Key, decode_base64url

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
MAX_AGE = 3600.0  # an older set is refreshed in the background, which drops withdrawn keys
FAILED_FIRST, FAILED_LAST = 2.0, 60.0  # the pause after a failed fetch, doubling
MAX_REMEMBERED = 1_000


class KeyNotPublished(IssuerUnavailable):
    """No key set has this key id yet, so there is no verdict."""

    code = "key_not_published"


class KeySet:
    """The keys of one issuer. Its times are of the monotonic clock."""

    def __init__(self, issuer: Issuer, endpoints: Endpoints, *, clock: Clock) -> None:
        self._issuer = issuer.name
        self._algorithms = issuer.profile.algorithms
        self._endpoints = endpoints
        self._clock = clock
        self._keys: dict[str, Key] = {}
        self._read_at = 0.0
        self._next_lookup = 0.0
        self._failures = 0
        self._next_try = 0.0
        self._first_seen: OrderedDict[str, float] = OrderedDict()
        self._reading: SingleFlight[str, None] = SingleFlight()

    async def find(self, kid: str) -> Key:
        """The key with this id.

        Raises:
            KeyNotPublished: no set has it yet, and it was first seen less than 60 s ago.
            IssuerUnavailable: no set could be read yet.
            TokenRefused: token_invalid(unknown_kid).
        """
        just_read = not self._keys
        if just_read:
            await self._fetch()
        elif self._clock.monotonic() - self._read_at > MAX_AGE and self._may_read():
            self._reading.start(self._issuer, self._refresh)
        if kid not in self._keys:
            await self._look_for(kid, just_read)
        self._first_seen.pop(kid, None)
        return self._keys[kid]

    async def close(self) -> None:
        """Cancel a fetch in progress."""
        await self._reading.close()

    async def _look_for(self, kid: str, just_read: bool) -> None:
        """Return once the set has the kid, or raise."""
        first_seen = self._first_seen.setdefault(kid, self._clock.monotonic())
        while len(self._first_seen) > MAX_REMEMBERED:
            self._first_seen.popitem(last=False)
        if not just_read and self._may_look():
            # If this fails, the last good set stays in use; only this kid has no verdict.
            with suppress(IssuerUnavailable):
                await self._fetch()
        if kid in self._keys:
            return
        now = self._clock.monotonic()
        if now - first_seen < PUBLICATION or self._read_at < first_seen:
            error = KeyNotPublished(f"issuer {self._issuer} signed with a key that it does not publish yet")
            error.retry_after = max(1.0, max(self._next_lookup, self._next_try) - now)
            raise error
        raise invalid("unknown_kid", "it is signed with a key that the issuer does not publish")

    def _may_look(self) -> bool:
        """Whether an unknown kid may start a fetch, or join one in progress."""
        if self._issuer in self._reading:
            return True
        if self._clock.monotonic() < self._next_lookup or not self._may_read():
            return False
        self._next_lookup = self._clock.monotonic() + COOLDOWN
        return True

    def _may_read(self) -> bool:
        return self._clock.monotonic() >= self._next_try

    async def _fetch(self) -> None:
        """Read the set, or join a fetch in progress.

        Raises:
            IssuerUnavailable: it cannot be read, or the pause after a failure is not over.
        """
        if self._issuer in self._reading or self._may_read():
            await self._reading.join(self._issuer, self._refresh)
            if not self._failures:
                return
        unavailable = IssuerUnavailable(f"the keys of issuer {self._issuer} cannot be read")
        unavailable.retry_after = max(1.0, self._next_try - self._clock.monotonic())
        raise unavailable

    async def _refresh(self) -> None:
        keys = _usable(await self._endpoints.read_keys(), self._algorithms)
        now = self._clock.monotonic()
        if not isinstance(keys, str):
            self._keys, self._read_at = keys, now
            self._failures, self._next_try = 0, 0.0
            emit("keys.fetched", issuer=self._issuer, keys=len(keys))
            return
        self._next_try = now + min(FAILED_FIRST * 2**self._failures, FAILED_LAST)
        self._failures = min(self._failures + 1, 10)
        emit("keys.failed", issuer=self._issuer, error=keys)


def _usable(document: dict[str, Any] | str, algorithms: frozenset[str]) -> dict[str, Key] | str:
    """The keys of a document, or a code for what is wrong: an empty set never replaces a good one."""
    if isinstance(document, str):
        return document
    entries = document.get("keys")
    if not isinstance(entries, list) or len(entries) > MAX_KEYS:
        return "key_set"
    return read_keys(entries, algorithms) or "no_key"


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
