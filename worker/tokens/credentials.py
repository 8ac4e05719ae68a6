"""An org's credentials: its generations newest first, their secrets without a readable form."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn, Protocol

from worker.ids import OrgId

CredentialKind = Literal["client_secret", "private_key"]


class Secret:
    """A client secret or private key. Only `reveal()` gives its text; repr, str, pickle and copies do not."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text, for the request that needs it and nothing else."""
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


@dataclass(frozen=True, slots=True)
class OrgRef:
    """An org as tokens know it: our id, and the code that its tokens must carry."""

    id: OrgId
    code: str


@dataclass(frozen=True, slots=True)
class Credential:
    """One generation of an org's credentials; `secret` is a PEM private key where `kind` says so."""

    id: str
    org_id: OrgId
    org_code: str
    generation: int
    client_id: str
    secret: Secret
    kind: CredentialKind = "client_secret"
    # The `kid` that the issuer knows a private key by, where it wants one.
    signing_key_id: str | None = None


class CredentialSource(Protocol):
    """Where credentials come from; wiring hands in the one that reads and unseals them."""

    async def active(self, org_id: OrgId) -> Sequence[Credential]:
        """The active generations of one org, newest first; none is an empty sequence.

        Raises:
            Unavailable: they cannot be read now.
            ConfigurationError: a secret does not open with the keys at hand.
        """
        ...

    async def used(self, credential_id: str, error: str | None) -> None:
        """Count one use; `error` is the issuer's error code where it did not accept it."""
        ...
