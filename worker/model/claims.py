"""Enforced: a token that was verified and enforced, the only one that leaves `tokens`; how long it serves.

Also what its runs store of its claims, and which of them a pool requires. The record is JSON text that is
made once for each token. Of properties it has names, types and keyed digests, which name what changed: a
value may be a secret, or so short that its plain hash could be guessed. The key comes from the key ring; the
org is part of what is hashed, so that equal values of two orgs have different digests.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, Self

from worker.clock import Clock, to_text
from worker.errors import TokenRefused
from worker.guard.claims import Claims
from worker.model.orgs import TokenWant
from worker.secret import AccessToken

# The form of all stored JSON.
_to_json: Callable[[Any], str] = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class ClaimsRecord:
    """`claims` and `flags` as JSON text; `fingerprint` is equal for tokens that configure a handler alike."""

    claims: str
    flags: str
    jti: str | None
    fingerprint: str

    @classmethod
    def of(cls, claims: Claims, digests: Digests | None) -> ClaimsRecord:
        flags = {name: flag.value for name, flag in claims.flags.items()}
        scopes = sorted(claims.scopes)
        shown: dict[str, Any] = {
            "org_code": claims.org_code,
            "client_id": claims.client_id,
            "scopes": scopes,
            "properties": {name: type(value).__name__ for name, value in sorted(claims.properties.items())},
            "issued_at": to_text(claims.issued_at),
            "expires_at": to_text(claims.expires_at),
        }
        if digests is not None:
            shown[DIGESTS] = digests.of(claims)
        # Without lifetimes.
        content = {"scopes": scopes, "properties": claims.properties, "flags": flags}
        text = sorted_json(content)
        if digests is not None:
            fingerprint = digests.digest(text)
        else:
            fingerprint = hashlib.sha256(text.encode()).hexdigest()[:32]
        # Most orgs have the same flags.
        return cls(_to_json(shown), sys.intern(_to_json(flags)), claims.jti, fingerprint)


# Equal values have equal text. Made once: an encoder costs as much as what it encodes here.
sorted_json: Callable[[object], str] = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), default=str
).encode
DIGITS = 16
DIGESTS = "digests"
Kind = Literal["scope", "property", "flag"]
Change = Literal["added", "removed", "changed", "unknown"]


@dataclass(frozen=True, slots=True)
class Digests:
    """Makes the digests of one key; `key_id` names it."""

    key_id: str
    key: bytes = field(repr=False)

    def of(self, claims: Claims) -> dict[str, Any]:
        """`key`, and the digests of `properties` and `flags` by name."""
        org = claims.org_code
        properties = {
            name: self.digest([org, "property", name, value])
            for name, value in sorted(claims.properties.items())
        }
        flags = {
            name: self.digest([org, "flag", name, flag.type, flag.value])
            for name, flag in sorted(claims.flags.items())
        }
        return {"key": self.key_id, "properties": properties, "flags": flags}

    def digest(self, content: object) -> str:
        """The digest of a value that JSON can express, else of its text."""
        text = sorted_json(content)
        return hmac.digest(self.key, text.encode(), "sha256").hex()[:DIGITS]


@dataclass(frozen=True, slots=True)
class ClaimChange:
    """A scope, property or flag that differs; `unknown` if only its value could tell."""

    kind: Kind
    name: str
    change: Change


def compare(before: Mapping[str, Any], now: Claims, digests: Digests | None) -> list[ClaimChange]:
    """What differs between the redacted claims of a run and a token; `digests` are those of the run's key.

    Without them, or without digests in the run's claims, a value that may have changed is `unknown`.
    """
    scopes = frozenset(before.get("scopes", ()))
    changes = [ClaimChange("scope", name, "added") for name in sorted(now.scopes - scopes)]
    changes += [ClaimChange("scope", name, "removed") for name in sorted(scopes - now.scopes)]
    stored = before.get(DIGESTS)
    is_comparable = digests is not None and stored is not None and stored["key"] == digests.key_id
    made = digests.of(now) if digests is not None and is_comparable else None
    had: Mapping[str, Mapping[str, Any]] = stored or {"properties": before.get("properties", {})}
    changes += _compare("property", had["properties"], now.properties, made and made["properties"])
    if "flags" in had:
        changes += _compare("flag", had["flags"], now.flags, made and made["flags"])
    else:
        # A run of an earlier release, or without a key ring: its claims do not name the flags.
        changes += [ClaimChange("flag", name, "unknown") for name in sorted(now.flags)]
    return changes


def _compare(
    kind: Kind, old: Mapping[str, Any], now: Mapping[str, Any], made: Mapping[str, str] | None
) -> Iterator[ClaimChange]:
    for name in sorted(old.keys() | now.keys()):
        if name not in old:
            yield ClaimChange(kind, name, "added")
        elif name not in now:
            yield ClaimChange(kind, name, "removed")
        elif made is None:
            yield ClaimChange(kind, name, "unknown")
        elif made[name] != old[name]:
            yield ClaimChange(kind, name, "changed")


def without_digests(claims: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Redacted claims for people, without the digests."""
    return None if claims is None else {name: value for name, value in claims.items() if name != DIGESTS}


_TYPES = {
    **{"str": "text", "bool": "true or false", "int": "number", "float": "number", "list": "list"},
    **{"dict": "table", "NoneType": "null"},
}


def claims_in_words(claims: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """As `without_digests`, the types of properties in words: `text, hidden`."""
    found = without_digests(claims)
    if found is None or not isinstance(found.get("properties"), Mapping):
        return found
    types = {name: f"{_TYPES.get(str(kind), kind)}, hidden" for name, kind in found["properties"].items()}
    return found | {"properties": types}


# The smallest `max_claims_age` of a definition, in seconds.
MIN_CLAIMS_AGE = 60.0
# Seconds. An API that answers every token with 401 must not use up the budget of all orgs.
MINTED_SERVES = 2.0
# The last part of a token's life is not handed out: a share of it, and a maximum in seconds.
MARGIN_SHARE = 0.2
MAX_MARGIN = 30.0


def usable_life(lifetime: float) -> float:
    """The part of a token's life in which it is handed out; both in seconds."""
    return lifetime - min(MAX_MARGIN, MARGIN_SHARE * lifetime)


@dataclass(slots=True)
class Enforced:
    """A token that was verified and whose org, client and scopes were enforced; its times are monotonic.

    `minted` if a caller insisted on a new one. `record` is what its first run stored of its claims.
    """

    token: AccessToken
    claims: Claims = field(repr=False)
    credential_id: str
    received_at: float
    renew_at: float
    usable_until: float
    expires_at: float
    minted: bool
    record: ClaimsRecord | None = None

    @classmethod
    def of(
        cls,
        text: str,
        claims: Claims,
        clock: Clock,
        *,
        received_at: float | None = None,
        expires_in: float | None = None,
        credential_id: str = "",
        renewed_at_share: float = 1.0,
        minted: bool = False,
    ) -> Self:
        """A token received at a monotonic time, or now, to be renewed at a share of its usable life.

        `expires_in` is what the issuer said, in seconds from then; the earlier of it and the claims counts.
        """
        if received_at is None:
            received_at = clock.monotonic()
        now, age = clock.now(), clock.monotonic() - received_at
        left = (claims.expires_at - now).total_seconds()
        if expires_in is not None:
            left = min(left, expires_in - age)
        lifetime = age + left
        usable = usable_life(lifetime)
        return cls(
            token=AccessToken(text, now + timedelta(seconds=left)),
            claims=claims,
            credential_id=credential_id,
            received_at=received_at,
            renew_at=received_at + usable * renewed_at_share,
            usable_until=received_at + usable,
            expires_at=received_at + lifetime,
            minted=minted,
        )

    def is_alive(self, clock: Clock) -> bool:
        """Whether it has not expired on either clock: the monotonic one stops while a machine sleeps."""
        return clock.monotonic() < self.expires_at and clock.now() < self.token.expires_at

    def serves(self, want: TokenWant, now: float) -> bool:
        """Whether one that is alive is usable for long enough, and as new as required."""
        if want.fresh:
            return self.minted and now - self.received_at < MINTED_SERVES
        if want.max_age is not None:
            max_age = max(want.max_age.total_seconds(), MIN_CLAIMS_AGE)
            return now - self.received_at < max_age and now < self.usable_until
        return now < self.usable_until


# Of each pool the properties that a token must have, with their values.
Rules = Mapping[str, Mapping[str, Any]]


def pool_mismatch(pool: str, claims: Claims, rules: Rules) -> str | None:
    """The first property that the pool requires and the token lacks or has with another value, else None."""
    for name, expected in rules.get(pool, {}).items():
        if name not in claims.properties or not _is(claims.properties[name], expected):
            return name
    return None


def _is(value: Any, expected: Any) -> bool:
    """Whether a property has the value that a rule expects: texts may hold true, false and numbers."""
    text = _text(value)
    return text is not None and text == _text(expected)


def _text(value: Any) -> str | None:
    """A value as a property of text has it; None for lists, tables and null, which match nothing."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, str | int | float) else None


def as_texts(rules: Rules) -> Rules:
    """The same rules with all values as texts, as they are stored and compared."""
    return {
        pool: {name: _text(value) for name, value in required.items()} for pool, required in rules.items()
    }


class PoolRules:
    """The rules that a worker enforces: those of its own configuration, and those stored for all workers.

    Both hold. While they differ for a pool, the worker takes no run of that pool: a worker that started
    later has other rules, and this one must restart with them.
    """

    def __init__(self, own: Rules | None = None, stored: Rules | None = None) -> None:
        self.own = as_texts(own or {})
        self.stored: Rules = stored or {}

    def enforce(self, pool: str, claims: Claims) -> None:
        """Raise TokenRefused if the token may not be used for a run in this pool."""
        for rules in (self.own, self.stored):
            if pool in rules and (missing := pool_mismatch(pool, claims, rules)) is not None:
                raise TokenRefused("pool_mismatch", missing)

    @property
    def differing(self) -> frozenset[str]:
        """The pools of the configuration whose stored rules are others."""
        return frozenset(pool for pool, rules in self.own.items() if rules != self.stored.get(pool))

    def usable(self, pools: Collection[str]) -> tuple[str, ...]:
        """Those of these pools that the worker may take runs of."""
        differing = self.differing
        return tuple(pool for pool in pools if pool not in differing)
