"""Provisioning: makes an application at the provider for each org without a working credential.

Each step is safe to repeat, and what is about to be made is a row first: after an interruption the same call
adopts what it finds at the provider, by the name of the row, and makes nothing twice. The steps of one org:

    making  → the application is at the provider, its secret is sealed in a pending credential
    made    → it has the scopes of the org's definitions, and those and the properties of the application that
              it replaces; a token is verified
    active  → runs use the credential
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy import Connection

from worker.clock import Clock
from worker.diagnosis.check_orgs import Checks
from worker.errors import (
    Busy,
    Conflict,
    CredentialsRejected,
    ForeignApplication,
    ProviderRefused,
    Unclear,
    WorkerError,
)
from worker.features.provisioning.application_rights import Rights, name_of
from worker.features.provisioning.application_steps import Steps
from worker.features.provisioning.management.contract import (
    ListedApplication,
    Management,
    OrgApplication,
)
from worker.ids import ALL_ORGS, OrgId
from worker.kit.walks import for_each, rows_of
from worker.model.provider import ApplicationName
from worker.operations.credentials import credential_row
from worker.operations.installation import Ownership, lock_of
from worker.store import applications, audit, credentials, installation
from worker.store.database import Database
from worker.store.dialect import Row
from worker.telemetry.events import emit
from worker.telemetry.masking import masker

if TYPE_CHECKING:
    from worker.tokens.sealing import KeyRing

# Rows that are begun in one transaction.
BATCH = 500
# Passes over the orgs whose application may or may not have been made.
PASSES = 5
# Seconds before it looks for what an unclear request has made: it may still be on its way.
SETTLES = 2.0


@dataclass(frozen=True, slots=True)
class Provisioned:
    """What became of one org; `error` if it failed, `warning` if its definitions still need something."""

    org: str
    client_id: str | None = None
    error: WorkerError | None = None
    warning: str = ""


@contextmanager
def exclusive(ownership: Ownership, issuer: str) -> Iterator[None]:
    """Be the only provisioner of an issuer within the block.

    Raises:
        Busy: another process is.
        InstallationMismatch: the applications of the rows may be another installation's.
    """
    # A process that is refused takes no lock, which would keep `adopt` out.
    ownership.require()
    with ownership.database.exclusively(lock_of(issuer)) as held:
        if not held:
            raise Busy(
                f"another process provisions the orgs of issuer {issuer}",
                fix="try again in a moment; `python -m worker provision` is one, and does the same by itself",
            )
        # Again under the lock, without which nothing is adopted.
        ownership.require()
        yield


@dataclass(slots=True, repr=False)
class Provisioner:
    """Makes, verifies and activates the applications of one issuer's orgs; call it within `exclusive`."""

    ownership: Ownership
    ring: KeyRing
    management: Management
    checks: Checks
    issuer: str
    actor: str
    clock: Clock
    concurrency: int = 8
    report: Callable[[int, int], None] = lambda done, total: None

    @property
    def database(self) -> Database:
        return self.ownership.database

    async def provision(self, org: str | None = None) -> list[Provisioned]:
        """Give each active org without a working credential one, or only `org`; one result per org.

        Raises:
            ProviderUnavailable, ProviderRefused, ConfigurationError: the applications of an earlier call
                cannot be listed; nothing was made.
        """
        fresh, earlier = await self.database.run(self._begin, org)
        return await self.complete(fresh, earlier)

    async def provision_next(self, after: str, limit: int) -> tuple[list[Provisioned], str | None]:
        """As `provision`, for the next `limit` orgs by code; also the last one's code, None at the end."""
        fresh, earlier, last = await self.database.run(self._begin_next, after, limit)
        return await self.complete(fresh, earlier), last

    async def complete(
        self, fresh: Sequence[Row], earlier: Sequence[Row] = (), *, announce: timedelta | None = None
    ) -> list[Provisioned]:
        """Take rows of `applications` to `active`; `earlier` ones may be at the provider already.

        With `announce` only to `announced`, to be used when that has passed. A row whose application is
        gone at the provider, or whose credential was retired by hand, is replaced by another. An org that
        fails leaves its row where it is, for the next call, and stops no other org.

        Raises:
            ProviderUnavailable, ProviderRefused, ConfigurationError: as `provision`.
        """
        results: dict[str, Provisioned] = {}
        doubtful = [row for row in earlier if row["state"] == "making"]
        rows = [*fresh, *(row for row in earlier if row["state"] != "making")]
        for _ in range(PASSES):
            there = {str(name): found async for name, found in self.listed()} if doubtful else {}
            outcomes = await self._complete_all([*rows, *doubtful], there, announce)
            results |= {row["org"]: outcome for row, outcome in outcomes}
            doubtful = [row for row, outcome in outcomes if isinstance(outcome.error, Unclear)]
            lost = [row for row, outcome in outcomes if isinstance(outcome.error, _Lost)]
            rows = await self.database.run(self._begin_again, lost)
            if not doubtful and not rows:
                break
            if doubtful:
                await self.clock.sleep(SETTLES)
        for result in results.values():
            if result.error is not None:
                emit("provisioning.failed", org=result.org, issuer=self.issuer, error=result.error.code)
        return list(results.values())

    def lacking(self, org: str | None = None) -> list[str]:
        """The codes of the orgs without a working credential."""

        def read(connection: Connection, after: str, limit: int) -> list[Row]:
            return applications.orgs_without_credential(
                connection, self.issuer, after=after, limit=limit, org=org
            )

        return [row["code"] for row in rows_of(self.database, read, limit=BATCH, key="code")]

    @property
    def steps(self) -> Steps:
        return Steps(self.database, self.issuer, self.actor)

    @property
    def rights(self) -> Rights:
        return Rights(
            self.database, self.ring, self.management, self.checks, self.issuer, self.clock, self.steps
        )

    def begin(self, connection: Connection, orgs: Sequence[tuple[OrgId, str]]) -> list[Row]:
        """Insert the rows of applications that are about to be made for these orgs (id and code)."""
        self.ownership.check(connection)
        ids = applications.add(
            connection,
            orgs,
            issuer=self.issuer,
            installation=installation.key_of(connection),
            actor=self.actor,
            at=self.database.now(connection),
        )
        return [row for row_id in ids if (row := applications.find(connection, row_id)) is not None]

    def _begin(self, org: str | None) -> tuple[list[Row], list[Row]]:
        """The rows of all orgs without a working credential: new ones, and those of earlier calls."""
        fresh: list[Row] = []
        earlier: list[Row] = []
        last: str | None = ""
        while last is not None:
            new, old, last = self._begin_next(last, BATCH, org)
            fresh += new
            earlier += old
        return fresh, earlier

    def _begin_next(
        self, after: str, limit: int, org: str | None = None
    ) -> tuple[list[Row], list[Row], str | None]:
        """As `_begin`, for the next orgs by code; also the last one's code, None if there are no more."""
        # Before the orgs: the last transaction of a dead process may be committed in between.
        unfinished = applications_in(self.database, self.issuer, applications.UNFINISHED)
        begun = {row["org_id"]: row for row in unfinished}
        with self.database.transaction() as connection:
            page = applications.orgs_without_credential(
                connection, self.issuer, org=org, after=after, limit=limit
            )
            if not page:
                return [], [], None
            new = [(OrgId(row["id"]), row["code"]) for row in page if row["id"] not in begun]
            earlier = [begun[row["id"]] for row in page if row["id"] in begun]
            return self.begin(connection, new), earlier, page[-1]["code"]

    def _begin_again(self, lost: Sequence[Row]) -> list[Row]:
        """The rows that replace those whose applications are lost."""
        if not lost:
            return []
        with self.database.transaction() as connection:
            now = [applications.find(connection, row["id"]) or row for row in lost]
            orgs = [(OrgId(row["org_id"]), row["org"]) for row in now if row["org_state"] != "removed"]
            return self.begin(connection, orgs)

    async def listed(self) -> AsyncIterator[tuple[ApplicationName, ListedApplication]]:
        """The applications of this installation at the provider; raises InstallationMismatch."""
        with self.database.transaction() as connection:
            self.ownership.check(connection)
            key = installation.key_of(connection)
        async for page in self.management.applications():
            for each in page:
                if each.made_as is not None and each.made_as.installation == key:
                    yield each.made_as, each

    async def _complete_all(
        self, rows: Sequence[Row], there: Mapping[str, ListedApplication], announce: timedelta | None
    ) -> list[tuple[Row, Provisioned]]:
        """The result of each row, `concurrency` at a time."""
        results: list[tuple[Row, Provisioned]] = []

        async def complete(row: Row) -> None:
            results.append((row, await self._complete(row, there.get(row["name"]), announce)))
            self.report(len(results), len(rows))

        await for_each(rows, complete, concurrency=self.concurrency)
        return results

    async def _complete(
        self, row: Row, found: ListedApplication | None, announce: timedelta | None
    ) -> Provisioned:
        org, row_id, warning = row["org"], row["id"], ""
        try:
            row = await self.database.run(self.steps.read, row_id)
            if row["state"] == "making":
                await self._make(row, found)
                row = await self.database.run(self.steps.read, row_id)
            if row["state"] in ("made", "announced") and row["credential_state"] != "pending":
                await self.database.run(self.steps.abandon, row_id)
                raise _Lost(f"the new credential of org {org} was retired before it was used")
            if row["state"] == "made":
                warning = await self.rights.give(row)
            if announce is None:
                await self.database.run(self.steps.activate, row_id)
            else:
                await self.database.run(self.steps.announce, row_id, announce)
        except WorkerError as error:
            failed = error
            if isinstance(error, ProviderRefused | CredentialsRejected) and await self._is_gone(row):
                await self.database.run(self.steps.gone, row_id)
                failed = _Lost(f"the new application of org {org} is gone at the provider")
            else:
                await self.database.run(self.steps.note_error, row_id, error)
            return Provisioned(org, row["client_id"], error=failed)
        return Provisioned(org, row["client_id"], warning=warning)

    async def _is_gone(self, row: Row) -> bool:
        """Whether the provider says that it has no such application any more."""
        if row["state"] != "made":
            return False
        try:
            name = name_of(row)
            return await self.management.application(row["application_id"], org=row["org"], name=name) is None
        except WorkerError:
            return False

    async def _make(self, row: Row, found: ListedApplication | None) -> Row:
        """Make the application, or adopt the one that an earlier call has made; returns the row."""
        name = name_of(row)
        application = None
        if found is not None:
            application = await self.management.application(found.id, org=row["org"], name=name)
            if application is None:
                # Another one would be a second one, if the list is right.
                raise Unclear(
                    f"the provider lists application {found.id} of org {row['org']}, and does not know it"
                )
        if application is None:
            application = await self.management.make(name)
        return await self.database.run(self._made, row, application)

    def _made(self, row: Row, application: OrgApplication) -> Row:
        """Seal its secret in a pending credential. Refuses an application that another org has."""
        org_id, org, issuer = OrgId(row["org_id"]), row["org"], self.issuer
        secret = application.secret.reveal()
        masker.register(secret, org_id)
        with self.database.transaction() as connection:
            row = applications.find(connection, row["id"], lock=True) or row
            other = applications.owner_of_client(connection, issuer, application.client_id, but=org_id)
            if other is not None or applications.known_ids(connection, issuer, [application.id]):
                raise ForeignApplication(
                    f"the provider responded for org {org} with the application of another; it is not used",
                    fix=f"look for {application.client_id} at the provider and in `credentials list`",
                )
            if row["org_state"] == "removed":
                raise Conflict(f"org {org} was removed", fix="`orgs sync --orphans --delete` cleans up")
            at = self.database.now(connection)
            credential = credential_row(
                self.ring,
                org_id,
                credentials.last_generations(connection, [org_id])[org_id] + 1,
                client_id=application.client_id,
                secret=secret,
            ) | {"created_at": at, "created_by": self.actor}
            credentials.insert_pending(connection, credential)
            values = {
                "state": "made",
                "application_id": application.id,
                "client_id": application.client_id,
                "credential_id": credential["id"],
            }
            applications.change(connection, row["id"], values, at=at)
            detail = {"client_id": application.client_id}
            audit.note(connection, org_id, "application.make", org, detail, at=at, actor=self.actor)
            emit("application.made", org=org, issuer=issuer, client=application.client_id)
            return row | values


class _Lost(Conflict):
    """An application that is never going to be used: it is gone, or its credential was retired."""


async def orphans(provisioner: Provisioner, org: str | None = None, *, delete: bool) -> list[Row]:
    """The applications of this installation that no org uses, or only those of `org`; deletes them if asked.

    Each has `id` and `name` at the provider, `org`, `deleted`, and `error` if it could not be deleted.

    Raises:
        ProviderUnavailable, ProviderRefused, ConfigurationError: as `Provisioner.provision`.
    """
    there = [found async for found in provisioner.listed()]
    used = await provisioner.database.run(_used, provisioner)
    rows: list[Row] = []
    for name, found in there:
        # A provider may have two of one name. The one that an org uses is in its row.
        if used.get(str(name), "") in (None, found.id) or org not in (None, name.org):
            continue
        row = {"id": found.id, "name": found.name, "org": name.org, "deleted": False, "error": None}
        rows.append(row)
        if delete:
            try:
                await provisioner.management.delete(found.id, org=name.org, name=name)
                await provisioner.database.run(_note_deleted, provisioner, found)
                row["deleted"] = True
            except WorkerError as error:
                row["error"] = error.message
    return rows


def applications_in(database: Database, issuer: str, states: Sequence[str]) -> Iterator[Row]:
    """The rows of an issuer's applications in these states."""
    return rows_of(
        database,
        lambda connection, after, limit: applications.in_states(
            connection, ALL_ORGS, issuer, states, after=after, limit=limit
        ),
        limit=BATCH,
    )


def _used(provisioner: Provisioner) -> dict[str, str | None]:
    """The applications that an org uses, will use, or uses until its overlap has ended.

    By name the id; None while the application is being made.
    """
    rows = applications_in(provisioner.database, provisioner.issuer, applications.USED)
    return {row["name"]: row["application_id"] for row in rows if row["org_state"] != "removed"}


def _note_deleted(provisioner: Provisioner, found: ListedApplication) -> None:
    """Store that an application is deleted, if there is a row of it."""
    database = provisioner.database
    with database.transaction() as connection:
        at = database.now(connection)
        row = applications.by_name(connection, found.name)
        if row is not None and row["application_id"] in (None, found.id):
            applications.change(connection, row["id"], {"state": "deleted"}, at=at)
        org_id = None if row is None else OrgId(row["org_id"])
        actor, detail = provisioner.actor, {"id": found.id}
        audit.note(connection, org_id, "application.delete", found.name, detail, at=at, actor=actor)
