"""An org's credentials: its generations newest first, their secrets without a readable form."""

from __future__ import annotations

import hmac
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn, Protocol

from worker.clock import Clock
from worker.errors import ConfigurationError, CredentialsRejected, Unavailable
from worker.ids import OrgId
from worker.orgs.org import OrgRef
from worker.tokens.single_flight import SingleFlight

CredentialKind = Literal["client_secret", "private_key"]
READ_AGAIN = 2.0  # seconds
UNUSABLE_PAUSE = 60.0
MAX_ORGS = 50_000


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


class Generations:
    """The active credentials of each org, read at most every two seconds and once for all who ask.

    So an edit, such as a generation that is retired, is seen within two seconds.
    """

    def __init__(self, source: CredentialSource, *, clock: Clock) -> None:
        self._source = source
        self._clock = clock
        self._known: OrderedDict[OrgId, tuple[float, tuple[Credential, ...]]] = OrderedDict()
        self._reading: SingleFlight[OrgId, tuple[Credential, ...]] = SingleFlight()

    async def of(self, org: OrgRef, *, newest: bool = False) -> tuple[Credential, ...]:
        """The org's active generations, newest first; with `newest`, as they are now.

        Raises:
            CredentialsRejected: it has none, or their secrets do not open.
            Unavailable: they were never read, and cannot be now.
        """
        known = self._known.get(org.id)
        if known is not None and not newest and self._clock.monotonic() - known[0] < READ_AGAIN:
            return known[1]
        try:
            return await self._reading.join(org.id, lambda: self._read(org))
        except Unavailable:
            if known is None:
                raise
            return known[1]

    def forget(self, org_id: OrgId) -> None:
        """Read the org's credentials anew before the next use."""
        self._known.pop(org_id, None)

    async def close(self) -> None:
        """End what is being read."""
        await self._reading.close()

    async def _read(self, org: OrgRef) -> tuple[Credential, ...]:
        try:
            credentials = tuple(await self._source.active(org.id))
        except ConfigurationError as fault:
            raise _unusable(fault.message, fault.fix) from None
        if not credentials:
            raise _unusable(
                f"org {org.code} has no active credential",
                f"add one: `python -m worker credentials add {org.code} --client-id ID --secret-file FILE`",
            )
        self._known[org.id] = (self._clock.monotonic(), credentials)
        self._known.move_to_end(org.id)
        while len(self._known) > MAX_ORGS:
            self._known.popitem(last=False)
        return credentials


def _unusable(message: str, fix: str) -> CredentialsRejected:
    rejected = CredentialsRejected(message, fix=fix)
    rejected.detail = "no_credential"
    rejected.retry_after = UNUSABLE_PAUSE
    return rejected
