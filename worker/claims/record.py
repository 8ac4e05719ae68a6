"""Record: what the runs of a token store of its claims, as JSON text that is made once for each token.

Of properties it has names, types and digests: a value may be a secret.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from worker.claims.digests import DIGESTS, Digests, sorted_json
from worker.clock import to_text
from worker.guard.claims import Claims

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
