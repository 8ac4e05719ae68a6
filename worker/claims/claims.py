"""Claims: what a verified token says of its org, as the handler sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True, slots=True)
class Flag:
    """A feature flag as the token has it: `type` is boolean, string, number, or the unknown code itself."""

    type: str
    value: Any


@dataclass(frozen=True, slots=True)
class Claims:
    """The decoded claims of one verified token.

    `properties` map a name to its plain value, `flags` a name to its `Flag`.
    Instants are aware UTC.
    """

    org_code: str
    client_id: str
    scopes: frozenset[str]
    properties: Mapping[str, Any]
    flags: Mapping[str, Flag]
    issued_at: datetime
    expires_at: datetime
    issuer: str = ""
    jti: str | None = None
