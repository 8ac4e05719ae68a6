"""Evidence: what an attempt keeps of the claims it acted under, enough to explain it later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from worker.claims.claims import Claims
from worker.clock import to_text
from worker.runs.outcome import Trail

# Claims are shared by all runs of a token: what they come to is kept for the newest so many.
BOUND = 10_000


@dataclass(frozen=True, slots=True)
class _Noted:
    """What stands in the row of an attempt made under these claims."""

    claims: Claims
    flags: Mapping[str, Any]
    shown: Mapping[str, Any]
    fingerprint: str


_noted: dict[int, _Noted] = {}


def note(trail: Trail, claims: Claims, at: datetime) -> None:
    """Note a token's claims: of properties only names and types, since a value may be a secret."""
    noted = _noted.get(id(claims))
    if noted is None or noted.claims is not claims:
        noted = _noted[id(claims)] = _note(claims)
        if len(_noted) > BOUND:
            del _noted[next(iter(_noted))]
    trail.token_ready_at = at
    trail.jti = claims.jti
    trail.flags = noted.flags
    trail.claims = noted.shown
    trail.claims_hash = noted.fingerprint


def _note(claims: Claims) -> _Noted:
    return _Noted(
        claims=claims,
        flags={name: flag.value for name, flag in claims.flags.items()},
        shown={
            "org_code": claims.org_code,
            "client_id": claims.client_id,
            "scopes": sorted(claims.scopes),
            "properties": {name: type(value).__name__ for name, value in sorted(claims.properties.items())},
            "issued_at": to_text(claims.issued_at),
            "expires_at": to_text(claims.expires_at),
        },
        fingerprint=fingerprint(claims),
    )


def fingerprint(claims: Claims) -> str:
    """Equal for claims that configure alike: of properties, flags and scopes, not of lifetimes."""
    content = {
        "scopes": sorted(claims.scopes),
        "properties": claims.properties,
        "flags": {name: flag.value for name, flag in claims.flags.items()},
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
