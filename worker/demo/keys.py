"""The provider's signing keys: made at start, rotated on request, published as a JWKS (RFC 7517)."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
