"""An org's credentials: its generations newest first, their secrets without a readable form."""

from __future__ import annotations

import hmac
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, Protocol

from worker.clock import Clock
from worker.errors import ConfigurationError, CredentialsRejected, Unavailable
from worker.ids import OrgId
from worker.orgs import OrgRef
from worker.tokens.single_flight import SingleFlight

CredentialKind = Literal["client_secret", "private_key"]
READ_AGAIN = 2.0  # seconds
UNUSABLE_PAUSE = 60.0
MAX_ORGS = 50_000
KEYRING = "keyring"
REFERENCE_FIX = (
    "put the client secret alone into a file of secrets_dir, under a name of its own without __ in it; "
    "`config show` says which folder it is"
)


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


def fault_of_reference(reference: str, secrets_dir: Path | None) -> str | None:
    """Why a reference `file:NAME` may not hold a client secret, or None; asked where it is added and read.

    The file must lie in `secrets_dir` itself, and hold neither the key ring nor a setting: its content
    is sent to the issuer, whose address may be another's choice. Without `secrets_dir` only the name is
    judged. A file that is not there yet has no fault.
    """
    name = reference.removeprefix("file:")
    if not name or Path(name).name != name or name.startswith(".") or not name.isprintable():
        return "is no bare name of a file of secrets_dir"
    if (fault := _fault_of_name(name)) is not None or secrets_dir is None:
        return fault
    try:
        folder = secrets_dir.resolve()
        # Also a mount of Kubernetes, whose names are links to files of a folder in it.
        target = (folder / name).resolve()
        if not target.is_relative_to(folder):
            return "is a link out of secrets_dir"
        if (fault := _fault_of_name(target.name)) is not None:
            return fault
        if target.exists() and target.stat().st_nlink > 1:
            others = [path for path in target.parent.iterdir() if path.samefile(target)]
            return next((fault for path in others if (fault := _fault_of_name(path.name))), None)
    except (OSError, RuntimeError):  # links in a circle, or a folder that is closed: reading says which
        return None
    return None


def read_reference(reference: str, secrets_dir: Path | None) -> str:
    """The secret that a reference `file:NAME` names.

    Raises:
        ConfigurationError: it may not be named, it is not there or it cannot be read.
    """
    name = reference.removeprefix("file:")
    fault = "names a file, and secrets_dir is not set" if secrets_dir is None else None
    fault = fault_of_reference(reference, secrets_dir) or fault
    if secrets_dir is None or fault is not None:
        raise ConfigurationError(f"the reference {reference!r} {fault}", fix=REFERENCE_FIX)
    try:
        return (secrets_dir / name).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigurationError(
            f"the secret {name} cannot be read: {why}",
            fix="put the file into secrets_dir, where the worker's user can read it",
        ) from None


def _fault_of_name(name: str) -> str | None:
    if name == KEYRING:
        return "names the key ring"
    return "names the secret of a setting" if "__" in name else None


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
