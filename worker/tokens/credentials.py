"""An org's credentials: its generations newest first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from worker.bounded import remember
from worker.clock import Clock
from worker.errors import ConfigurationError, CredentialsRejected, Unavailable
from worker.guard.single_flight import SingleFlight
from worker.ids import OrgId
from worker.model.orgs import OrgRef
from worker.secret import Secret
from worker.telemetry.events import emit

CredentialKind = Literal["client_secret", "private_key"]
# Seconds: how long credentials are cached, and the pause for an org without usable ones.
READ_AGAIN = 2.0
UNUSABLE_PAUSE = 60.0
MAX_ORGS = 200_000
KEYRING = "keyring"
REFERENCE_FIX = (
    "put only the client secret into a file of its own in secrets_dir, without __ in its name; "
    "`config show` prints the folder"
)


@dataclass(frozen=True, slots=True)
class Credential:
    """One generation of an org's credentials; `secret` is a PEM key if `kind` is private_key.

    One `from_file` may change; otherwise the secret of an id never changes.
    """

    id: str
    org_id: OrgId
    org_code: str
    generation: int
    client_id: str
    secret: Secret
    kind: CredentialKind = "client_secret"
    from_file: bool = False


def fault_of_reference(reference: str, secrets_dir: Path | None) -> str | None:
    """Why a reference `file:NAME` may not hold a client secret, or None.

    The file must be in `secrets_dir` itself and hold neither the key ring nor a setting: its content
    is sent to the issuer, whose address someone else may choose. Without `secrets_dir` only the name
    is checked. A missing file is accepted.
    """
    name = reference.removeprefix("file:")
    if not name or Path(name).name != name or name.startswith(".") or not name.isprintable():
        return "is not the bare name of a file in secrets_dir"
    if (fault := _fault_of_name(name)) is not None or secrets_dir is None:
        return fault
    try:
        folder = secrets_dir.resolve()
        # Names in a Kubernetes mount are links to files of a folder in it.
        target = (folder / name).resolve()
        if not target.is_relative_to(folder):
            return "is a link out of secrets_dir"
        if (fault := _fault_of_name(target.name)) is not None:
            return fault
        if target.exists() and target.stat().st_nlink > 1:
            others = [path for path in target.parent.iterdir() if path.samefile(target)]
            return next((fault for path in others if (fault := _fault_of_name(path.name))), None)
    except (OSError, RuntimeError):  # a loop of links, or an unreadable folder: reading reports it
        return None
    return None


def read_reference(reference: str, secrets_dir: Path | None) -> str:
    """The secret in the file of a reference `file:NAME`; raises ConfigurationError."""
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
            fix="put the file into secrets_dir, readable by the worker's user",
        ) from None


def _fault_of_name(name: str) -> str | None:
    if name == KEYRING:
        return "names the key ring"
    return "names the secret of a setting" if "__" in name else None


class CredentialSource(Protocol):
    """Reads and unseals credentials."""

    async def active(self, org_id: OrgId) -> Sequence[Credential]:
        """The active generations of one org, newest first.

        Raises:
            Unavailable: they cannot be read now.
            ConfigurationError: a secret cannot be unsealed with the available keys.
        """

    async def active_of(self, org_ids: Sequence[OrgId]) -> Mapping[OrgId, Sequence[Credential]]:
        """As `active`, of several orgs in one query; those without a usable one are left out."""

    async def active_ids(self, org_ids: Sequence[OrgId]) -> Mapping[OrgId, Sequence[str]]:
        """The ids of the active generations of these orgs, newest first, in one query; raises Unavailable."""

    async def used(self, credential: Credential, error: str | None) -> None:
        """Count one use; `error` is the issuer's error code if it rejected the credential."""


class Generations:
    """The active credentials of each org, cached for two seconds; concurrent reads share one query."""

    def __init__(self, source: CredentialSource, *, clock: Clock) -> None:
        self._source = source
        self._clock = clock
        self._known: OrderedDict[OrgId, tuple[float, tuple[Credential, ...]]] = OrderedDict()
        self._reading: SingleFlight[OrgId, tuple[Credential, ...]] = SingleFlight(report=emit)

    async def of(self, org: OrgRef, *, newest: bool = False) -> tuple[Credential, ...]:
        """The org's active generations, newest first; `newest` bypasses the cache.

        Raises:
            CredentialsRejected: it has none, or they cannot be unsealed.
            Unavailable: they were never read, and cannot be now.
        """
        if not newest and (confirmed := self.confirmed(org)) is not None:
            return confirmed
        known = self._known.get(org.id)
        try:
            return await self._reading.join(org.id, lambda: self._read(org))
        except Unavailable:
            if known is None:
                raise
            return known[1]

    def confirmed(self, org: OrgRef) -> tuple[Credential, ...] | None:
        """The org's active generations, if they were read less than two seconds ago."""
        known = self._known.get(org.id)
        return known[1] if known is not None and self._clock.monotonic() - known[0] < READ_AGAIN else None

    async def load(self, orgs: Sequence[OrgRef]) -> Collection[OrgId]:
        """Confirm in one query what is known of these orgs, and read the others in another.

        What changed or is not usable is left to `of`. Returns the orgs of which nothing was known.
        """
        asked_at = self._clock.monotonic()
        unknown = {org.id: org for org in orgs if org.id not in self._known}
        known = (org for org in orgs if org.id in self._known)
        old = {org.id: org for org in known if self._known[org.id][0] <= asked_at - READ_AGAIN}
        with suppress(Unavailable):
            if unknown:
                await self._read_all(list(unknown), asked_at)
            if old:
                await self._confirm(old, asked_at)
        return unknown.keys()

    async def _read_all(self, org_ids: Sequence[OrgId], asked_at: float) -> None:
        for org_id, active in (await self._source.active_of(org_ids)).items():
            # Those that were read meanwhile are newer.
            if org_id not in self._known:
                remember(self._known, org_id, (asked_at, tuple(active)), MAX_ORGS)

    async def _confirm(self, old: Mapping[OrgId, OrgRef], asked_at: float) -> None:
        found = await self._source.active_ids(list(old))
        for org in old.values():
            known = self._known.get(org.id)
            if known is not None and _is_same(known[1], found.get(org.id, ()), org.code):
                remember(self._known, org.id, (asked_at, known[1]), MAX_ORGS)

    def forget(self, org_id: OrgId) -> None:
        self._known.pop(org_id, None)

    async def close(self) -> None:
        await self._reading.close()

    async def _read(self, org: OrgRef) -> tuple[Credential, ...]:
        message = f"org {org.code} has no active credential"
        fix = f"add one: `python -m worker credentials add {org.code} --client-id ID --secret-file FILE`"
        try:
            credentials = tuple(await self._source.active(org.id))
        except ConfigurationError as error:
            credentials, message, fix = (), error.message, error.fix
        if not credentials:
            raise CredentialsRejected(message, fix=fix, detail="no_credential", retry_after=UNUSABLE_PAUSE)
        remember(self._known, org.id, (self._clock.monotonic(), credentials), MAX_ORGS)
        return credentials


def _is_same(known: Sequence[Credential], ids: Sequence[str], org_code: str) -> bool:
    """Whether these credentials are still the active ones."""
    return [each.id for each in known] == list(ids) and not any(
        each.from_file or each.org_code != org_code for each in known
    )
