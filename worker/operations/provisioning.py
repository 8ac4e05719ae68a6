"""Provisioning: makes an application at the provider for each org without a working credential.

Each step is safe to repeat, and what is about to be made is a row first: after an interruption the same call
adopts what it finds at the provider, by the name of the row, and makes nothing twice. The steps of one org:

    making  → the application is at the provider, its secret is sealed in a pending credential
    made    → it is authorised, with exactly the scopes of the org's definitions, and a token is verified
    active  → runs use the credential
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy import Connection

from worker.clock import Clock
from worker.errors import (
    Busy,
    ConfigurationError,
    Conflict,
    CredentialsRejected,
    Diagnostic,
    ForeignApplication,
    IssuerUnavailable,
    Unclear,
    WorkerError,
)
from worker.ids import OrgId
from worker.operations.check_orgs import Checks, Report
from worker.operations.credentials import credential_row
from worker.operations.requirements import OrgDefinitions
from worker.providers.management.contract import (
    ApplicationName,
    ListedApplication,
    Management,
    OrgApplication,
)
from worker.secret import Secret
from worker.store import applications, audit, credentials
from worker.store.database import Database
from worker.store.dialect import Row
from worker.telemetry.events import emit
from worker.telemetry.masking import masker
from worker.tokens.credentials import Credential
from worker.tokens.token_probe import Need

if TYPE_CHECKING:
    from worker.tokens.sealing import KeyRing

# Rows that are begun in one transaction.
BATCH = 500
# Passes over the orgs whose application may or may not have been made.
PASSES = 5
# Seconds before it looks for what an unclear request has made: it may still be on its way.
SETTLES = 2.0
# Seconds between the tries for the first token of a new application.
TRIES = (0.5, 2.0, 5.0)
# What must hold of a new application's token. Properties and flags are set later, and belong to definitions.
ESSENTIAL = frozenset({"issuer", "audience", "token", "verification", "key", "org", "client", "scopes"})


@dataclass(frozen=True, slots=True)
class Provisioned:
    """What became of one org; `error` if it failed, `warning` if its definitions still need something."""

    org: str
    client_id: str | None = None
    error: WorkerError | None = None
    warning: str = ""


@contextmanager
def exclusive(database: Database, issuer: str) -> Iterator[None]:
    """Be the only provisioner of an issuer within the block.

    Raises:
        Busy: another process is.
    """
    with database.exclusively(f"provisioning-{issuer}") as held:
        if not held:
            raise Busy(
                f"another process provisions the orgs of issuer {issuer}",
                fix="try again in a moment; `python -m worker provision` is one, and does the same by itself",
            )
        yield


@dataclass(slots=True, repr=False)
class Provisioner:
    """Makes, verifies and activates the applications of one issuer's orgs; call it within `exclusive`."""

    database: Database
    ring: KeyRing
    management: Management
    checks: Checks
    issuer: str
    actor: str
    clock: Clock
    concurrency: int = 8
    report: Callable[[int, int], None] = lambda done, total: None

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

    async def complete(self, fresh: Sequence[Row], earlier: Sequence[Row] = ()) -> list[Provisioned]:
        """Take rows of `applications` to `active`; `earlier` ones may be at the provider already.

        An org that fails leaves its row where it is, for the next call, and stops no other org.

        Raises:
            ProviderUnavailable, ProviderRefused, ConfigurationError: as `provision`.
        """
        results: dict[str, Provisioned] = {}
        doubtful = [row for row in earlier if row["state"] == "making"]
        rows = [*fresh, *(row for row in earlier if row["state"] != "making")]
        for _ in range(PASSES):
            there = await self._applications() if doubtful else {}
            outcomes = await self._complete_all([*rows, *doubtful], there)
            results |= {row["org"]: outcome for row, outcome in outcomes}
            rows, doubtful = [], [row for row, outcome in outcomes if isinstance(outcome.error, Unclear)]
            if not doubtful:
                break
            await self.clock.sleep(SETTLES)
        for result in results.values():
            if result.error is not None:
                emit("provisioning.failed", org=result.org, issuer=self.issuer, error=result.error.code)
        return list(results.values())

    def lacking(self, org: str | None = None) -> list[str]:
        """The codes of the orgs without a working credential."""
        codes: list[str] = []
        while True:
            with self.database.autocommit() as connection:
                page = applications.orgs_without_credential(
                    connection, self.issuer, org=org, after=codes[-1] if codes else "", limit=BATCH
                )
            if not page:
                return codes
            codes += [row["code"] for row in page]

    async def orphans(self, *, delete: bool) -> list[Row]:
        """The applications of this installation that no org uses, and delete them if asked.

        Each has `id` and `name` at the provider, `org` and `deleted`.

        Raises:
            ProviderUnavailable, ProviderRefused, ConfigurationError: as `provision`.
        """
        there = await self._applications()
        used = await self.database.run(self._used_names)
        rows: list[Row] = []
        for name, found in there.items():
            if name in used or found.made_as is None:
                continue
            rows.append({"id": found.id, "name": name, "org": found.made_as.org, "deleted": False})
            if delete:
                await self.management.delete(found.id, org=found.made_as.org, name=found.made_as)
                await self.database.run(self._note_deleted, found)
                rows[-1]["deleted"] = True
        return rows

    def _used_names(self) -> set[str]:
        """The names of applications that an org uses, will use, or uses until its overlap has ended."""
        names: set[str] = set()
        after = ""
        while True:
            with self.database.autocommit() as connection:
                page = applications.in_states(connection, self.issuer, applications.USED, after=after)
            names |= {row["name"] for row in page if row["org_state"] != "removed"}
            if not page:
                return names
            after = page[-1]["id"]

    def _note_deleted(self, found: ListedApplication) -> None:
        """Store that an application is deleted, if there is a row of it."""
        with self.database.transaction() as connection:
            at = self.database.now(connection)
            row = applications.by_name(connection, found.name)
            if row is not None:
                applications.change(connection, row["id"], {"state": "deleted"}, at=at)
            org_id = None if row is None else OrgId(row["org_id"])
            entry = audit.Entry(org_id, "application.delete", found.name, {"id": found.id})
            audit.record(connection, [entry], at=at, actor=self.actor)

    def begin(self, connection: Connection, orgs: Sequence[tuple[OrgId, str]]) -> list[Row]:
        """Insert the rows of applications that are about to be made for these orgs (id and code)."""
        ids = applications.insert_for_all_orgs(
            connection,
            orgs,
            issuer=self.issuer,
            installation=applications.installation_key(connection),
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
        begun = {row["org_id"]: row for row in self._unfinished()}
        with self.database.transaction() as connection:
            page = applications.orgs_without_credential(
                connection, self.issuer, org=org, after=after, limit=limit
            )
            if not page:
                return [], [], None
            new = [(OrgId(row["id"]), row["code"]) for row in page if row["id"] not in begun]
            earlier = [begun[row["id"]] for row in page if row["id"] in begun]
            return self.begin(connection, new), earlier, page[-1]["code"]

    def _unfinished(self) -> Iterator[Row]:
        after = ""
        while True:
            with self.database.autocommit() as connection:
                page = applications.in_states(
                    connection, self.issuer, applications.UNFINISHED, after=after, limit=BATCH
                )
            yield from page
            if len(page) < BATCH:
                return
            after = page[-1]["id"]

    async def _applications(self) -> dict[str, ListedApplication]:
        """The applications of this installation at the provider, by name."""
        with self.database.transaction() as connection:
            installation = applications.installation_key(connection)
        found: dict[str, ListedApplication] = {}
        async for page in self.management.applications():
            found |= {
                each.name: each for each in page if each.made_as and each.made_as.installation == installation
            }
        return found

    async def _complete_all(
        self, rows: Sequence[Row], there: Mapping[str, ListedApplication]
    ) -> list[tuple[Row, Provisioned]]:
        """The result of each row, `concurrency` at a time."""
        left, results = iter(rows), []

        async def complete_next() -> None:
            for row in left:
                results.append((row, await self._complete(row, there.get(row["name"]))))
                self.report(len(results), len(rows))

        async with asyncio.TaskGroup() as group:
            for _ in range(max(1, min(self.concurrency, len(rows)))):
                group.create_task(complete_next())
        return results

    async def _complete(self, row: Row, found: ListedApplication | None) -> Provisioned:
        org, row_id = row["org"], row["id"]
        try:
            row = await self.database.run(self._read, row_id)
            if row["state"] == "making":
                row = await self._make(row, found)
            warning = ""
            if row["state"] == "made":
                warning = await self.verify(row)
            await self.database.run(self._activate, row_id)
        except WorkerError as error:
            await self.database.run(self.note_error, row_id, error)
            return Provisioned(org, row["client_id"], error=error)
        return Provisioned(org, row["client_id"], warning=warning)

    def _read(self, row_id: str) -> Row:
        with self.database.autocommit() as connection:
            row = applications.find(connection, row_id)
        if row is None:
            raise Conflict(f"application {row_id} is gone from the database", fix="call it again")
        return row

    def note_error(self, row_id: str, error: WorkerError) -> None:
        with self.database.transaction() as connection:
            applications.change(
                connection,
                row_id,
                {"last_error": masker.mask(error.message)},
                at=self.database.now(connection),
            )

    async def _make(self, row: Row, found: ListedApplication | None) -> Row:
        """Make the application, or adopt the one that an earlier call has made; returns the row."""
        name = _name_of(row)
        application = None
        if found is not None:
            application = await self.management.application(found.id, org=row["org"], name=name)
        if application is None:
            application = await self.management.make(name)
        return await self.database.run(self._made, row, application)

    def _made(self, row: Row, application: OrgApplication) -> Row:
        """Seal its secret in a pending credential. Refuses an application that another org has."""
        org_id, org, issuer = OrgId(row["org_id"]), row["org"], self.issuer
        secret = application.secret.reveal()
        masker.register(secret)
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
                credentials.last_generation(connection, org_id) + 1,
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
            entry = audit.Entry(org_id, "application.make", org, {"client_id": application.client_id})
            audit.record(connection, [entry], at=at, actor=self.actor)
            emit("application.made", org=org, issuer=issuer, client=application.client_id)
            return row | values

    async def verify(self, row: Row) -> str:
        """Authorise the application of a row in state `made`, and verify a token of it.

        Stores the scopes it was given and the lifetime of the token. Returns what the org's definitions
        still need, for people.

        Raises:
            Unclear, ProviderUnavailable, ProviderRefused: the provider does not authorise it.
            CredentialsRejected, IssuerUnavailable: it gives no token, or one that fails verification.
        """
        org, needs = self.checks.read(row["org"])
        before: Mapping[str, Sequence[str]] = row["scopes"] or {}
        scopes = {need.audience: sorted(need.scopes | need.may) for need in needs}
        for audience, kept in before.items():
            scopes[audience] = sorted({*scopes.get(audience, ()), *kept})
        if not scopes:
            raise ConfigurationError(
                f"issuer {self.issuer} has no audience", fix=f"set audience in [issuers.{self.issuer}]"
            )
        credential = await self.database.run(self.credential_of, row)
        application = OrgApplication(
            row["org"], row["application_id"], row["client_id"], credential.secret, row["name"]
        )
        for audience, names in scopes.items():
            await self.management.authorise(application, audience)
            await self.management.add_scopes(application, audience, names)
        report = await self.confirm(org, needs, credential)
        lifetimes = [
            (probe.claims.expires_at - probe.claims.issued_at).total_seconds()
            for probe in report.probes
            if probe.claims is not None
        ]
        await self.database.run(
            self._note_verified,
            row["id"],
            {"scopes": scopes, "token_seconds": int(max(lifetimes, default=0))},
        )
        return "; ".join(each.detail for each in report.problems())

    async def confirm(self, org: OrgDefinitions, needs: Sequence[Need], credential: Credential) -> Report:
        """The report of an org with new rights, as soon as its token is valid.

        Raises:
            CredentialsRejected, IssuerUnavailable: it gives no token, or one that fails verification.
        """
        report = await self.checks.probe(org, needs, credential, counts=False)
        for seconds in TRIES:
            if not _faults(report):
                break
            # A new client or scope can be unknown to parts of the provider for a moment.
            await self.clock.sleep(seconds)
            report = await self.checks.probe(org, needs, credential, counts=False)
        if faults := _faults(report):
            kind = IssuerUnavailable if report.transient else CredentialsRejected
            raise kind(f"no valid token of the application: {faults[0].detail}", fix=faults[0].fix)
        return report

    def _note_verified(self, row_id: str, values: Row) -> None:
        with self.database.transaction() as connection:
            applications.change(connection, row_id, values, at=self.database.now(connection))

    def credential_of(self, row: Row) -> Credential:
        """The credential of a row, opened."""
        with self.database.autocommit() as connection:
            stored = credentials.by_id(connection, OrgId(row["org_id"]), row["credential_id"])
        if stored is None or stored["sealed"] is None:
            raise Conflict(
                f"the credential of org {row['org']}'s new application was retired",
                fix="`orgs sync --orphans --delete` deletes the application; the next call makes another",
            )
        secret = self.ring.unseal(
            stored["sealed"], stored["key_id"], org_id=stored["org_id"], credential_id=stored["id"]
        )
        return Credential(
            stored["id"],
            OrgId(row["org_id"]),
            row["org"],
            stored["generation"],
            row["client_id"],
            Secret(secret),
        )

    def _activate(self, row_id: str, overlap: timedelta = timedelta()) -> None:
        """Let runs use a verified application; the org's earlier one ends after `overlap`."""
        with self.database.transaction() as connection:
            row = applications.find(connection, row_id, lock=True)
            if row is None or row["state"] not in ("made", "announced"):
                return
            org_id, at = OrgId(row["org_id"]), self.database.now(connection)
            if not credentials.activate(connection, org_id, row["credential_id"], at=at):
                raise Conflict(
                    f"org {row['org']} was removed, or its new credential retired",
                    fix="`orgs sync --orphans --delete` deletes the application",
                )
            for older in applications.of_orgs(connection, [org_id], ("active",)):
                ends = {"state": "overlapping", "not_before": at + overlap}
                applications.change(connection, older["id"], ends, at=at)
            applications.change(connection, row_id, {"state": "active"}, at=at)
            stored = credentials.by_id(connection, org_id, row["credential_id"])
            generation = 0 if stored is None else stored["generation"]
            subject, detail = f"{row['org']} {generation}", {"client_id": row["client_id"]}
            entry = audit.Entry(org_id, "credential.add", subject, detail)
            audit.record(connection, [entry], at=at, actor=self.actor)
        emit(
            "credential.activated",
            org=row["org"],
            issuer=self.issuer,
            client=row["client_id"],
            generation=generation,
        )


def _name_of(row: Row) -> ApplicationName:
    name = ApplicationName.parse(row["name"])
    if name is None:
        raise Conflict(f"{row['name']!r} is not the name of an application", fix="correct it in the database")
    return name


def _faults(report: Report) -> list[Diagnostic]:
    """What is wrong with the token itself."""
    return [each for each in report.problems() if each.check in ESSENTIAL]
