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
    """The org that the token is for; equal to `ctx.org.code`."""
    client_id: str
    """The machine-to-machine application that the token was made for."""
    scopes: frozenset[str]
    """What the token allows."""
    properties: Mapping[str, Any]
    """Each property's plain value by its name."""
    flags: Mapping[str, Flag]
    """Each feature flag by its name: `type` and `value`. `ctx.flag()` is shorter."""
    issued_at: datetime
    """When the token was made."""
    expires_at: datetime
    """When it ends."""
    issuer: str = ""
    """Who made it."""
    jti: str | None = None
    """The token's own id, where it has one."""
