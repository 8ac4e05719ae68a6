"""Secrets and access tokens: texts that appear in no repr, log or pickle."""

from __future__ import annotations

import hmac
from datetime import datetime
from typing import NoReturn


class Secret:
    """A client secret, private key or token. Only `reveal()` shows it; repr, pickle and copies do not."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text; call it only to build the request that needs it."""
        return self._text

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._text.encode(), other._text.encode())

    def __hash__(self) -> int:
        return hash(Secret)

    def __repr__(self) -> str:
        return "<Secret>"

    __str__ = __repr__

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not pickled")


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
