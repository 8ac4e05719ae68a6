"""The provider's M2M applications, one for each org, and the ways in which it can be told to misbehave."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

FLAG_TYPES = {bool: "b", int: "i", float: "i"}


@dataclass(slots=True)
class Application:
    """An M2M application of one org.

    `properties` and `flags` are plain values; the token shows them in Kinde's
    shape. `lifetime` of its tokens is in seconds.
    """

    org_code: str
    client_id: str
    client_secret: str = field(repr=False)
    scopes: tuple[str, ...] = ()
    audiences: tuple[str, ...] = ()
    properties: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    lifetime: int = 86400
    enabled: bool = True

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """An application from its JSON form; an unknown key or a missing one is a ValueError."""
        check_names(cls, data)
        try:
            app = cls(**data)
        except TypeError as error:
            raise ValueError(str(error)) from None
        app.scopes, app.audiences = tuple(app.scopes), tuple(app.audiences)
        return app

    def accepts(self, client_secret: str) -> bool:
        return self.enabled and secrets.compare_digest(self.client_secret.encode(), client_secret.encode())

    def as_claims(self) -> dict[str, Any]:
        """Org, properties and flags as a Kinde token has them."""
        return {
            "org_code": self.org_code,
            "application_properties": {
                name: {"v": as_property(value)} for name, value in self.properties.items()
            },
            "feature_flags": {
                name: {"t": FLAG_TYPES.get(type(value), "s"), "v": value}
                for name, value in self.flags.items()
            },
        }


def as_property(value: Any) -> str | bool:
    """A property's value as Kinde can hold it: text or a boolean, so 1000 becomes "1000"."""
    return value if isinstance(value, bool) else str(value)


@dataclass(frozen=True, slots=True)
class Fault:
    """How the token endpoint misbehaves towards a client; what is left out behaves well.

    `replace` and `drop` change claims just before signing (another org, issuer or
    audience; no org). `age` issues the token that many seconds ago, so that it may
    have expired. `forged` signs with an unpublished key under a known kid.
    `status`, with `headers` and `body`, answers without a token. `delay` is in
    seconds. `times` is for how many requests the fault lasts, None for ever.
    """

    replace: Mapping[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    age: int = 0
    lifetime: int | None = None
    forged: bool = False
    typ: str = "JWT"
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str | None = None
    delay: float = 0.0
    times: int | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        check_names(cls, data)
        return cls(**{**data, "drop": tuple(data.get("drop", ()))})


def check_names(kind: type, data: Mapping[str, Any]) -> None:
    """Raise ValueError where the data has a key that the dataclass has not."""
    known = {item.name for item in fields(kind)}
    if unknown := sorted(set(data) - known):
        raise ValueError(f"unknown keys: {', '.join(unknown)}; known are {', '.join(sorted(known))}")
