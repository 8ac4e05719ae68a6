"""An org's credentials: add a generation, rotate to it without a failed run, retire the old one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from worker.clock import Clock
from worker.definitions.units import format_duration
from worker.errors import (
    Busy,
    ConfigurationError,
    Conflict,
    CredentialsRejected,
    IssuerUnavailable,
    NotFound,
    UsageError,
)
from worker.ids import OrgId, new_id
from worker.operations.check_orgs import Checks, Report
from worker.store import audit, credentials, orgs
from worker.store.database import Database
from worker.store.lists import orgs as org_lists
from worker.telemetry.masking import masker
from worker.tokens.credentials import REFERENCE_FIX, Credential, CredentialKind, Secret, fault_of_reference

Row = dict[str, Any]


class Sealer(Protocol):
    """The key ring, as far as it is needed here."""

    def seal(self, secret: str, *, org_id: str, credential_id: str) -> tuple[bytes, str]:
        """The sealed secret, bound to its row, and the id of the key that sealed it."""
        ...


def add_credential(
    database: Database,
    sealer: Sealer | None,
    org: str,
    *,
    client_id: str,
    actor: str,
    secret: str | None = None,
    reference: str | None = None,
    secrets_dir: Path | None = None,
    kind: str = "client_secret",
) -> Row:
    """Add a generation, which is tried first from now on; the ones before stay until they are retired.

    Either `secret` (a client secret, or a private key in PEM with `kind` private_key),
    which `sealer` seals, or `reference`, the name of a file in `secrets_dir`. Where that
    folder is given, the file is looked at too: it may be no link to another secret.
    Returns the row of `credentials list`.

    Raises:
        NotFound: there is no such org.
        Conflict: the org was removed.
        UsageError: no client id, not exactly one of secret and reference, or a reference to
            the key ring, to a setting's secret or out of `secrets_dir`.
    """
    check_client(client_id, secret, reference, secrets_dir)
    with database.transaction() as connection:
        row = orgs.require(connection, org, lock=True)
        if row["state"] == "removed":
            raise Conflict(f"org {org} was removed", fix="`orgs add` brings it back")
        now = database.now(connection)
        generation = credentials.last_generation(connection, row["id"]) + 1
        new = credential_row(
            sealer,
            row["id"],
            generation,
            client_id=client_id,
            secret=secret,
            reference=reference,
            kind=kind,
        ) | {"created_at": now, "created_by": actor}
        credentials.insert_for_all_orgs(connection, [new])
        entry = audit.Entry(
            row["id"], "credential.add", f"{org} {generation}", {"client_id": client_id, "kind": kind}
        )
        audit.record(connection, [entry], at=now, actor=actor)
        return org_lists.credentials(connection, org)[0]


def retire_credential(database: Database, org: str, generation: int, *, actor: str, now: bool = False) -> Row:
    """End one generation: no token is asked for with it any more. Returns its row.

    Workers drop what they hold of it within two seconds. With `now` it has leaked:
    its secret is destroyed here too, also where it was retired before.

    Raises:
        NotFound: there is no such org or generation.
        Conflict: it is retired already.
    """
    with database.transaction() as connection:
        row = orgs.require(connection, org, lock=True)
        found = credentials.find(connection, row["id"], generation)
        if found is None:
            raise NotFound(
                f"org {org} has no credential of generation {generation}",
                fix=f"`credentials list {org}` names them",
            )
        at = database.now(connection)
        has_secret = found["sealed"] is not None or found["reference"] is not None
        retired = credentials.retire(connection, row["id"], generation, at=at)
        if not retired and not (now and has_secret):
            raise Conflict(
                f"generation {generation} of org {org} is retired already",
                fix=f"`credentials list {org} --state active` names those that are not",
            )
        if now:
            credentials.destroy_one(connection, row["id"], generation)
        entry = audit.Entry(row["id"], "credential.retire", f"{org} {generation}", {"now": now})
        audit.record(connection, [entry], at=at, actor=actor)
        return next(
            entry for entry in org_lists.credentials(connection, org) if entry["generation"] == generation
        )


def check_client(
    client_id: str, secret: str | None, reference: str | None, secrets_dir: Path | None = None
) -> None:
    """Refuse what can never work or must not, before anything is written.

    Raises:
        UsageError: no client id, not exactly one of secret and reference, or a reference that
            `fault_of_reference` finds fault with.
    """
    if not client_id or not client_id.isprintable():
        raise UsageError(
            "a credential needs a client id of printable characters",
            fix="copy it from the provider's console",
        )
    if (secret is None) == (reference is None):
        raise UsageError(
            "a credential is either a secret or the name of a file that holds it", fix="give one of the two"
        )
    if reference is not None and (fault := fault_of_reference(reference, secrets_dir)) is not None:
        raise UsageError(f"reference: {reference!r} {fault}", fix=REFERENCE_FIX)
    if secret is not None and not secret.strip():
        raise UsageError("the secret is empty", fix="is the file the right one?")


def credential_row(
    sealer: Sealer | None,
    org_id: OrgId,
    generation: int,
    *,
    client_id: str,
    secret: str | None,
    reference: str | None = None,
    kind: str = "client_secret",
) -> Row:
    """A row of `credentials` without its creation, the secret sealed for this row alone."""
    credential_id = new_id()
    sealed, key_id = None, None
    if secret is not None:
        if sealer is None:
            raise UsageError("a secret needs a key ring", fix="`keys generate` makes one")
        masker.register(secret)
        sealed, key_id = sealer.seal(secret, org_id=org_id, credential_id=credential_id)
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


# Workers read the active generations anew every two seconds, and a request lasts at most ten.
QUIET = timedelta(seconds=15)
TIMEOUT = timedelta(minutes=10)
LOOK = 0.5


class Ring(Sealer, Protocol):
    """The key ring: to see whether the secret is stored already, it must open them as well."""

    def unseal(self, sealed: bytes, key_id: str, *, org_id: str, credential_id: str) -> str: ...


class Rotation:
    """One org's change to a new secret; `tell` gets a sentence a step.

    Each step can be seen in the database, so that the same command again goes on
    where it was interrupted: the secret is verified and added once, the older
    generations are watched until nobody has used one for `quiet`, and then retired.
    """

    def __init__(
        self,
        database: Database,
        ring: Ring,
        checks: Checks,
        org: str,
        *,
        actor: str,
        clock: Clock,
        tell: Callable[[str], None],
    ) -> None:
        self._database = database
        self._ring = ring
        self._checks = checks
        self._org = org
        self._actor = actor
        self._clock = clock
        self._tell = tell

    async def run(
        self,
        client_id: str,
        secret: str,
        kind: CredentialKind = "client_secret",
        *,
        quiet: timedelta = QUIET,
        timeout: timedelta = TIMEOUT,
    ) -> list[Row]:
        """Verify, add, watch, retire; the rows of `credentials list` afterwards.

        Raises:
            NotFound: there is no such org.
            CredentialsRejected: no good token comes for the new secret; nothing was changed.
            IssuerUnavailable: the issuer cannot say; nothing was changed.
            Busy: an older generation was still used after `timeout`; none is retired yet.
        """
        check_client(client_id, secret, None)
        generation = self._stored(client_id, secret)
        await self._verify(client_id, secret, kind, generation)
        if generation is None:
            row = add_credential(
                self._database,
                self._ring,
                self._org,
                client_id=client_id,
                secret=secret,
                kind=kind,
                actor=self._actor,
            )
            generation = int(row["generation"])
            self._tell(f"added as generation {generation}, tried first from now on")
        else:
            self._tell(f"it is generation {generation} already")
        await self._watch(generation, quiet, timeout)
        for row in self._older(generation):
            retire_credential(self._database, self._org, row["generation"], actor=self._actor)
            self._tell(f"generation {row['generation']} is retired")
        return self._rows()

    def _stored(self, client_id: str, secret: str) -> int | None:
        """The newest active generation, if it is this very secret."""
        with self._database.autocommit() as connection:
            org_id = orgs.require(connection, self._org)["id"]
            newest = next(iter(credentials.active(connection, org_id)), None)
        if newest is None or newest["client_id"] != client_id or newest["sealed"] is None:
            return None
        try:
            same = secret == self._ring.unseal(
                newest["sealed"], newest["key_id"], org_id=org_id, credential_id=newest["id"]
            )
        except ConfigurationError:
            return None
        return int(newest["generation"]) if same else None

    async def _verify(
        self, client_id: str, secret: str, kind: CredentialKind, generation: int | None
    ) -> None:
        if generation is not None:
            report = await self._checks.verify(self._org, generation)
        else:
            # Before it is stored: a wrong secret must not become the one that workers try first.
            org, needs = self._checks.read(self._org)
            number = max((row["generation"] for row in self._rows()), default=0) + 1
            candidate = Credential("", org.org.id, self._org, number, client_id, Secret(secret), kind)
            report = await self._checks.look(org, needs, candidate, counts=False)
        if not report.ok:
            raise failure(report)
        self._tell("the issuer gives a good token for it")

    async def _watch(self, newest: int, quiet: timedelta, timeout: timedelta) -> None:
        """Return once no older generation has been used for `quiet`, by the database's clock."""
        give_up_at = self._clock.monotonic() + timeout.total_seconds()
        told = ""
        while older := self._older(newest):
            now = self._now()
            since = max(self._last_use(row, newest) for row in older)
            if now - since >= quiet:
                return
            used = ", ".join(f"{row['generation']}: {row['uses']} uses" for row in older)
            if used != told:
                told = used
                self._tell(f"waiting until nobody has used an older generation for {_text(quiet)} ({used})")
            if self._clock.monotonic() >= give_up_at:
                raise Busy(
                    f"an older generation of org {self._org} was used {_text(now - since)} ago ({used});"
                    " nothing is retired yet",
                    fix="the same command again goes on from here; if the new secret is rejected at times,"
                    f" `credentials list {self._org}` shows it in last_error",
                )
            await self._clock.sleep(LOOK)

    def _last_use(self, row: Row, newest: int) -> datetime:
        """When an older generation may last have been used: workers knew no other before the new one came."""
        began: datetime = next(each["created_at"] for each in self._rows() if each["generation"] == newest)
        last: datetime = row["last_used_at"] or began
        return max(began, last)

    def _older(self, newest: int) -> Sequence[Row]:
        return [row for row in self._rows() if row["state"] == "active" and row["generation"] < newest]

    def _rows(self) -> list[Row]:
        with self._database.autocommit() as connection:
            return org_lists.credentials(connection, self._org)

    def _now(self) -> datetime:
        with self._database.autocommit() as connection:
            return self._database.now(connection)


def failure(report: Report) -> CredentialsRejected | IssuerUnavailable:
    """A report's first problem as an error."""
    first = report.problems()[0]
    if report.transient:
        return IssuerUnavailable(first.detail, fix=first.fix)
    return CredentialsRejected(first.detail, fix=first.fix)


def _text(span: timedelta) -> str:
    return format_duration(timedelta(seconds=round(span.total_seconds())))
