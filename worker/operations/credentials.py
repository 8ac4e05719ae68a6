"""An org's credentials: add a generation, rotate to it without a failed run, retire an old one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from worker.clock import Clock
from worker.errors import (
    Busy,
    ConfigurationError,
    Conflict,
    CredentialsRejected,
    Diagnostic,
    IssuerUnavailable,
    NotFound,
    UsageError,
)
from worker.ids import OrgId, new_id
from worker.model.definitions.units import format_duration
from worker.operations.installation import Ownership
from worker.secret import Secret
from worker.store import audit, credentials, orgs
from worker.store.database import Database
from worker.store.dialect import Row
from worker.store.lists import CREDENTIALS
from worker.store.lists.read import read
from worker.store.lists.rows import CredentialRow
from worker.telemetry.masking import masker
from worker.tokens.credentials import REFERENCE_FIX, Credential, CredentialKind, fault_of_reference

if TYPE_CHECKING:
    from worker.tokens.sealing import KeyRing


# `Rotation`: how long older generations must be unused, when it gives up, and the seconds between checks.
# Workers read the active generations every two seconds, and a request lasts at most ten.
QUIET = timedelta(seconds=15)
TIMEOUT = timedelta(minutes=10)
POLL = 0.5


def add_credential(
    database: Database,
    ring: KeyRing | None,
    org: str,
    *,
    client_id: str,
    actor: str,
    secret: str | None = None,
    reference: str | None = None,
    secrets_dir: Path | None = None,
    kind: str = "client_secret",
) -> CredentialRow:
    """Add a generation, which is tried first; older ones stay until retired. Returns its row of the list.

    Give either `secret` (with `kind` private_key a PEM), which `ring` seals, or `reference`,
    a file name in `secrets_dir`. If that folder is given, the file must not link to
    another secret.

    Raises:
        NotFound: no such org.
        Conflict: the org was removed.
        UsageError: see `check_client`.
    """
    check_client(client_id, secret, reference, secrets_dir)
    with database.transaction() as connection:
        row = orgs.require(connection, org, lock=True)
        if secret is not None:
            masker.register(secret, OrgId(row["id"]))
        if row["state"] == "removed":
            raise Conflict(f"org {org} was removed", fix="`orgs add` brings it back")
        now = database.now(connection)
        generation = credentials.last_generations(connection, [row["id"]])[row["id"]] + 1
        new = credential_row(
            ring, row["id"], generation, client_id=client_id, secret=secret, reference=reference, kind=kind
        ) | {"created_at": now, "created_by": actor}
        credentials.add(connection, [new])
        subject, detail = f"{org} {generation}", {"client_id": client_id, "kind": kind}
        audit.note(connection, row["id"], "credential.add", subject, detail, at=now, actor=actor)
        return read(connection, CREDENTIALS, org)[0]


def retire_credential(
    database: Database, org: str, generation: int, *, actor: str, now: bool = False
) -> CredentialRow:
    """Retire one generation, so that no token is requested with it; returns its row.

    Workers drop its tokens within two seconds. `now`, for a leaked secret, also destroys
    the secret, even of a generation that was retired before.

    Raises:
        NotFound: no such org or generation.
        Conflict: it is retired already.
    """
    with database.transaction() as connection:
        row = orgs.require(connection, org, lock=True)
        if not credentials.has_generation(connection, row["id"], generation):
            raise NotFound(
                f"org {org} has no credential of generation {generation}",
                fix=f"`credentials list {org}` lists them",
            )
        at = database.now(connection)
        retired = credentials.retire(connection, row["id"], generation, at=at)
        destroyed = now and credentials.destroy_one(connection, row["id"], generation)
        if not (retired or destroyed):
            raise Conflict(
                f"generation {generation} of org {org} is retired already",
                fix=f"`credentials list {org} --state active` lists those that are not",
            )
        subject = f"{org} {generation}"
        audit.note(connection, row["id"], "credential.retire", subject, {"now": now}, at=at, actor=actor)
        rows = read(connection, CREDENTIALS, org)
        return next(row for row in rows if row["generation"] == generation)


def check_client(
    client_id: str, secret: str | None, reference: str | None, secrets_dir: Path | None = None
) -> None:
    """Refuse an invalid credential before anything is written.

    Raises:
        UsageError: no client id, not exactly one of secret and reference, or a reference to
            the key ring, to a setting's secret or out of `secrets_dir`.
    """
    if not client_id or not client_id.isprintable():
        raise UsageError(
            "a credential needs a client id of printable characters",
            fix="copy it from the provider's console",
        )
    if (secret is None) == (reference is None):
        raise UsageError("a credential is either a secret or the name of its file", fix="give one of the two")
    if reference is not None and (fault := fault_of_reference(reference, secrets_dir)) is not None:
        raise UsageError(f"reference: {reference!r} {fault}", fix=REFERENCE_FIX)
    if secret is not None and not secret.strip():
        raise UsageError("the secret is empty", fix="check that it is the right file")


def credential_row(
    ring: KeyRing | None,
    org_id: OrgId,
    generation: int,
    *,
    client_id: str,
    secret: str | None,
    reference: str | None = None,
    kind: str = "client_secret",
) -> Row:
    """A row of `credentials` without `created_*`; the secret is sealed for this row alone.

    The caller registers the secret at the masker.
    """
    credential_id = new_id()
    sealed, key_id = None, None
    if secret is not None:
        if ring is None:
            raise UsageError("a secret needs a key ring", fix="`keys generate` makes one")
        sealed, key_id = ring.seal(secret, org_id=org_id, credential_id=credential_id)
    return {
        "id": credential_id,
        "org_id": org_id,
        "generation": generation,
        "client_id": client_id,
        "sealed": sealed,
        "reference": reference,
        "key_id": key_id,
        "kind": kind,
    }


def is_stored(ring: KeyRing, row: Row, client_id: str, secret: str) -> bool:
    """Whether a row of `credentials` has this client id and this sealed secret."""
    if row["client_id"] != client_id or row["sealed"] is None:
        return False
    try:
        stored = ring.unseal(row["sealed"], row["key_id"], org_id=row["org_id"], credential_id=row["id"])
    except ConfigurationError:
        # Its key is lost; storing the secret again is the fix.
        return False
    return stored == secret


class Verified(Protocol):
    """What a token that was requested with a credential showed."""

    @property
    def ok(self) -> bool: ...

    @property
    def transient(self) -> bool:
        """Whether the issuer gave no response that says anything about the org."""

    def problems(self) -> list[Diagnostic]: ...


class TokenChecks(Protocol):
    """Requests tokens; implemented by `diagnosis.check_orgs`."""

    async def verify(self, code: str, generation: int | None = None) -> Verified: ...

    async def try_out(self, code: str, candidate: Callable[[OrgId], Credential]) -> Verified: ...


@dataclass(slots=True, repr=False)
class Rotation:
    """Moves one org to a new secret; calls `report` with a sentence for each step.

    The state is in the database, so that the same command again continues after an
    interruption: verify and add the secret once, wait until the older generations are
    unused for `quiet`, then retire them.
    """

    ownership: Ownership
    ring: KeyRing
    checks: TokenChecks
    org: str
    actor: str
    clock: Clock
    report: Callable[[str], None]

    @property
    def database(self) -> Database:
        return self.ownership.database

    async def run(
        self,
        client_id: str,
        secret: str,
        kind: CredentialKind = "client_secret",
        *,
        quiet: timedelta = QUIET,
        timeout: timedelta = TIMEOUT,
    ) -> list[CredentialRow]:
        """Verify, add, wait, retire; returns the rows of `credentials list`.

        Raises:
            NotFound: no such org.
            CredentialsRejected: the new secret gives no valid token; nothing was changed.
            IssuerUnavailable: the issuer does not respond; nothing was changed.
            Busy: an older generation was still used after `timeout`; none was retired.
            InstallationMismatch: the org may be another installation's.
        """
        self.ownership.require()
        check_client(client_id, secret, None)
        generation = self._stored(client_id, secret)
        await self._verify(client_id, secret, kind, generation)
        if generation is None:
            row = add_credential(
                self.database,
                self.ring,
                self.org,
                client_id=client_id,
                secret=secret,
                kind=kind,
                actor=self.actor,
            )
            generation = int(row["generation"])
            self.report(f"added as generation {generation}, which is now tried first")
        else:
            self.report(f"it is generation {generation} already")
        await self._wait_until_unused(generation, quiet, timeout)
        self.ownership.require()
        for row in self._older(generation, self._rows()):
            retire_credential(self.database, self.org, row["generation"], actor=self.actor)
            self.report(f"generation {row['generation']} is retired")
        return self._rows()

    def _stored(self, client_id: str, secret: str) -> int | None:
        """The newest active generation, if it has this secret."""
        with self.database.autocommit() as connection:
            org_id = orgs.require(connection, self.org)["id"]
            newest = next(iter(credentials.active(connection, org_id)), None)
        if newest is None or not is_stored(self.ring, newest, client_id, secret):
            return None
        return int(newest["generation"])

    async def _verify(
        self, client_id: str, secret: str, kind: CredentialKind, generation: int | None
    ) -> None:
        if generation is not None:
            report = await self.checks.verify(self.org, generation)
        else:
            # Before it is stored: workers must not try a wrong secret first.
            number = max((row["generation"] for row in self._rows()), default=0) + 1

            def candidate(org_id: OrgId) -> Credential:
                return Credential("", org_id, self.org, number, client_id, Secret(secret), kind)

            report = await self.checks.try_out(self.org, candidate)
        if not report.ok:
            raise _failure(report)
        self.report("the issuer gives a valid token for it")

    async def _wait_until_unused(self, newest: int, quiet: timedelta, timeout: timedelta) -> None:
        """Return once no older generation has been used for `quiet`, by the database's clock."""
        give_up_at = self.clock.monotonic() + timeout.total_seconds()
        reported = ""
        while True:
            with self.database.autocommit() as connection:
                rows, now = read(connection, CREDENTIALS, self.org), self.database.now(connection)
            older = self._older(newest, rows)
            # Until the new one was there, workers knew no other.
            added_at = next(row["created_at"] for row in rows if row["generation"] == newest)
            used_at = [max(added_at, row["last_used_at"] or added_at) for row in older]
            if not older or now - max(used_at) >= quiet:
                return
            used = ", ".join(f"{row['generation']}: {row['uses']} uses" for row in older)
            if used != reported:
                reported = used
                self.report(f"waiting until older generations are unused for {_text(quiet)} ({used})")
            if self.clock.monotonic() >= give_up_at:
                ago = _text(now - max(used_at))
                raise Busy(
                    f"an older generation of org {self.org} was used {ago} ago ({used}); none was retired",
                    fix="the same command continues from here; if the issuer sometimes rejects the new"
                    f" secret, `credentials list {self.org}` shows it in last_error",
                )
            await self.clock.sleep(POLL)

    def _older(self, newest: int, rows: Sequence[CredentialRow]) -> list[CredentialRow]:
        return [row for row in rows if row["state"] == "active" and row["generation"] < newest]

    def _rows(self) -> list[CredentialRow]:
        with self.database.autocommit() as connection:
            return read(connection, CREDENTIALS, self.org)


def _failure(report: Verified) -> CredentialsRejected | IssuerUnavailable:
    """The first problem of a report as an error."""
    first = report.problems()[0]
    if report.transient:
        return IssuerUnavailable(first.detail, fix=first.fix)
    return CredentialsRejected(first.detail, fix=first.fix)


def _text(span: timedelta) -> str:
    return format_duration(timedelta(seconds=round(span.total_seconds())))
