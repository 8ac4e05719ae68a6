"""Keyed digests of a token's properties and flags: they name what changed, and no value is stored.

A value can be short, so that its plain hash could be guessed. The key comes from the key ring; the org is
part of what is hashed, so that equal values of two orgs have different digests.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from worker.guard.claims import Claims

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
