"""Claims of a verified token, and the values of its feature flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True, slots=True)
class Flag:
    """A feature flag of a token: `type` is boolean, string, number, or an unknown type code."""

    type: str
    value: Any


@dataclass(frozen=True, slots=True)
class Claims:
    """The decoded claims of one verified token.

    Times are aware UTC.
    """

    org_code: str
    """The org of the token; equal to `ctx.org.code`."""
    client_id: str
    """The machine-to-machine application that requested the token."""
    scopes: frozenset[str]
    """The granted scopes."""
    properties: Mapping[str, Any]
    """Property values by name."""
    flags: Mapping[str, Flag]
    """Feature flags by name, each with `type` and `value`. `ctx.flag()` is shorter."""
    issued_at: datetime
    """When the token was issued."""
    expires_at: datetime
    """When it expires."""
    issuer: str = ""
    """The issuer identifier."""
    jti: str | None = None
    """The token's id, if it has one."""


def flag_value(claims: Claims, name: str, default: Any = False) -> Any:
    """The value of a flag, else of the property of that name, else the default.

    Kinde's flags in M2M tokens are the same for all orgs of an environment, so properties
    replace flags for single orgs; a property `"true"` is true.
    """
    if name in claims.flags:
        return claims.flags[name].value
    value = claims.properties.get(name, default)
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    return value


def flag_is(claims: Claims, name: str, expected: Any) -> bool:
    """Whether the flag has exactly the expected value.

    An absent flag is false; a flag of an unknown type never matches.
    """
    flag = claims.flags.get(name)
    if flag is not None and flag.type not in ("boolean", "string", "number"):
        return False
    value = flag_value(claims, name, False)
    is_number = isinstance(expected, int | float) and not isinstance(expected, bool)
    if isinstance(value, str) and is_number and flag is None:
        # Properties hold text only: a number arrives as digits.
        try:
            value = float(value)
        except ValueError:
            return False
    if isinstance(value, bool) or isinstance(expected, bool):
        # 1 == True in Python, but a flag with the number 1 is not true.
        return value is expected
    return bool(value == expected)
