"""The development provider's applications and signing keys."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm


@dataclass(slots=True)
class SigningKey:
    """An RSA key under its kid; an unpublished one signs, but stands in no JWKS yet."""

    kid: str
    private: rsa.RSAPrivateKey
    published: bool = True

    @classmethod
    def make(cls, *, published: bool = True) -> SigningKey:
        private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        return cls(secrets.token_hex(8), private, published)

    def as_jwk(self) -> dict[str, Any]:
        jwk: dict[str, Any] = json.loads(RSAAlgorithm.to_jwk(self.private.public_key()))
        jwk.pop("key_ops", None)
        return jwk | {"kid": self.kid, "use": "sig", "alg": "RS256"}


class KeyRotation:
    """All keys of the provider; the newest signs, the ones before it stay published until retired."""

    def __init__(self) -> None:
        self._keys = [SigningKey.make()]
        self._foreign: SigningKey | None = None

    @property
    def current(self) -> SigningKey:
        return self._keys[-1]

    def rotate(self, *, publish: bool = True, retire: bool = False) -> str:
        """Sign with a new key from now on, and return its kid.

        `publish=False` keeps it out of the JWKS until `publish()`, as a provider
        that publishes late does; `retire` takes the older keys out of the JWKS.
        """
        key = SigningKey.make(published=publish)
        self._keys = [key] if retire else [*self._keys, key]
        return key.kid

    def publish(self) -> None:
        """Put every key into the JWKS."""
        for key in self._keys:
            key.published = True

    def as_jwks(self) -> dict[str, Any]:
        return {"keys": [key.as_jwk() for key in self._keys if key.published]}

    def sign(self, claims: Mapping[str, Any], *, typ: str = "JWT") -> str:
        """The claims as an RS256 token of the current key."""
        return self._encode(claims, self.current.private, typ)

    def forge(self, claims: Mapping[str, Any], *, typ: str = "JWT") -> str:
        """The same under the current kid, but signed by a key that is nobody's."""
        if self._foreign is None:
            self._foreign = SigningKey.make(published=False)
        return self._encode(claims, self._foreign.private, typ)

    def _encode(self, claims: Mapping[str, Any], key: rsa.RSAPrivateKey, typ: str) -> str:
        headers = {"kid": self.current.kid, "typ": typ}
        return jwt.encode(dict(claims), key, algorithm="RS256", headers=headers)


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
