"""AccessToken: the token's text behind `.reveal()`, with no readable form of its own."""

from __future__ import annotations

from datetime import datetime
from typing import NoReturn


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
