"""Evidence: what an attempt keeps of the claims it acted under, enough to explain it later."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime

from worker.claims.claims import Claims
from worker.clock import to_text
from worker.runs.outcome import Trail


def note(trail: Trail, claims: Claims, at: datetime) -> None:
    """Note a token's claims: of properties only names and types, since a value may be a secret."""
    trail.token_ready_at = at
    trail.jti = claims.jti
    trail.flags = {name: flag.value for name, flag in claims.flags.items()}
    trail.claims = {
        "org_code": claims.org_code,
        "client_id": claims.client_id,
        "scopes": sorted(claims.scopes),
        "properties": {name: type(value).__name__ for name, value in sorted(claims.properties.items())},
        "issued_at": to_text(claims.issued_at),
        "expires_at": to_text(claims.expires_at),
    }
    trail.claims_hash = fingerprint(claims)


def fingerprint(claims: Claims) -> str:
    """Equal for claims that configure alike: of properties, flags and scopes, not of lifetimes."""
    content = {
        "scopes": sorted(claims.scopes),
        "properties": claims.properties,
        "flags": {name: flag.value for name, flag in claims.flags.items()},
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
