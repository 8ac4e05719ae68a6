"""The keys that the development provider signs with, and their rotation."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm


def new_private_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


class SigningKey:
    """An RSA key and its kid. An unpublished one signs, but is not in the JWKS yet."""

    def __init__(self, *, published: bool = True) -> None:
        self.kid = secrets.token_hex(8)
        self.published = published
        self.private = new_private_key()
        self.public = self.private.public_key()

    def as_jwk(self) -> dict[str, Any]:
        jwk: dict[str, Any] = json.loads(RSAAlgorithm.to_jwk(self.public))
        jwk.pop("key_ops", None)
        return jwk | {"kid": self.kid, "use": "sig", "alg": "RS256"}


class KeyRotation:
    """All keys of the provider. The newest signs; older ones stay published until retired."""

    def __init__(self) -> None:
        self._keys = [SigningKey()]
        self._foreign: SigningKey | None = None

    def rotate(self, *, publish: bool = True, retire: bool = False) -> str:
        """Sign with a new key from now on, and return its kid.

        `publish=False` keeps it out of the JWKS until `publish()`; `retire` removes the older keys.
        """
        key = SigningKey(published=publish)
        self._keys = [key] if retire else [*self._keys, key]
        return key.kid

    def publish(self) -> None:
        """Add every key to the JWKS."""
        for key in self._keys:
            key.published = True

    def as_jwks(self) -> dict[str, Any]:
        return {"keys": [key.as_jwk() for key in self._keys if key.published]}

    def sign(self, claims: Mapping[str, Any], *, typ: str = "JWT", forged: bool = False) -> str:
        """An RS256 token with these claims and the current kid; a forged one is signed by an unknown key."""
        key = self._keys[-1]
        headers = {"kid": key.kid, "typ": typ}
        if forged:
            key = self._foreign = self._foreign or SigningKey()
        return jwt.encode(dict(claims), key.private, algorithm="RS256", headers=headers)

    def read(self, text: str, *, audience: str) -> dict[str, Any]:
        """The claims of a token signed by one of the keys, expired or not; raises jwt.PyJWTError."""
        kid = jwt.get_unverified_header(text).get("kid")
        for key in self._keys:
            if key.kid == kid:
                return jwt.decode(
                    text,
                    key.public,
                    algorithms=["RS256"],
                    audience=audience,
                    options={"verify_exp": False, "verify_iat": False},
                )
        raise jwt.InvalidKeyError("unknown kid")
