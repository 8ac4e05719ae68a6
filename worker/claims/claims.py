"""Claims: what a verified token says, the token itself, and conditions on its feature flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn, Protocol, TypeVar


class AccessToken:
    """A bearer token (RFC 6750). Only `reveal()` gives its text; repr, str, pickle and copies do not."""

    __slots__ = ("_text", "expires_at")

    def __init__(self, text: str, expires_at: datetime) -> None:
        self._text = text
        self.expires_at = expires_at

    def reveal(self) -> str:
        """The token's text, for an Authorization header and nothing else."""
        return self._text

    def __repr__(self) -> str:
        return f"<AccessToken expires_at={self.expires_at.isoformat()}>"

    __str__ = __repr__

    def __reduce__(self) -> NoReturn:
        raise TypeError("an access token is not pickled")


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


class FlagCondition(Protocol):
    """A flag and the value that counts as on."""

    @property
    def name(self) -> str: ...

    @property
    def equals(self) -> Any: ...


class Variant(Protocol):
    """Another handler for the orgs whose flag is on."""

    @property
    def flag(self) -> FlagCondition: ...


V = TypeVar("V", bound=Variant)


def flag_value(claims: Claims, name: str, default: Any = False) -> Any:
    """The value of a flag, else of the property of that name, else the default.

    Kinde's flags in M2M tokens are the same for every org of an environment, so an
    org of its own is switched by a property; a property `"true"` is true.
    """
    if name in claims.flags:
        return claims.flags[name].value
    value = claims.properties.get(name, default)
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    return value


def is_on(claims: Claims, condition: FlagCondition) -> bool:
    """Whether the flag has exactly the value that the condition names.

    An absent flag is off, so `false` is its value; one of a type that this worker
    does not know has no value that could be compared.
    """
    flag = claims.flags.get(condition.name)
    if flag is not None and flag.type not in ("boolean", "string", "number"):
        return False
    value = flag_value(claims, condition.name, False)
    wanted = condition.equals
    if isinstance(value, str) and _is_number(wanted) and flag is None:
        # Properties hold text only: a number arrives as its digits.
        try:
            value = float(value)
        except ValueError:
            return False
    if isinstance(value, bool) or isinstance(wanted, bool):
        # 1 == True in Python, and a flag of the number 1 is not on.
        return value is wanted
    return bool(value == wanted)


def choose_variant(variants: Sequence[V], claims: Claims) -> V | None:
    """The first variant whose flag is on, or None for the definition's own handler."""
    return next((variant for variant in variants if is_on(claims, variant.flag)), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
