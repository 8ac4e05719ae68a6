"""Provisioning: makes an application at the provider for each org without a working credential.

Each step is safe to repeat, and what is about to be made is a row first: after an interruption the same call
adopts what it finds at the provider, by the name of the row, and makes nothing twice. The steps of one org:

    making  → the application is at the provider, its secret is sealed in a pending credential
    made    → it has the scopes of the org's definitions, and those and the properties of the application that
              it replaces; a token is verified
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

from worker.claims.claims import Claims
from worker.clock import Clock
from worker.errors import (
    Busy,
    ConfigurationError,
    Conflict,
    CredentialsRejected,
    Diagnostic,
    ForeignApplication,
    IssuerUnavailable,
    ProviderRefused,
    Unclear,
    WorkerError,
)
from worker.ids import OrgId
from worker.operations.application_steps import Steps
from worker.operations.check_orgs import Checks, Report
from worker.operations.credentials import credential_row
from worker.operations.requirements import OrgDefinitions
from worker.providers.management.contract import (
    ApplicationName,
    ListedApplication,
    Management,
    OrgApplication,
    PropertyValue,
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
            there = await self.listed() if doubtful else {}
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
        codes: list[str] = []
        while True:
            with self.database.autocommit() as connection:
                page = applications.orgs_without_credential(
                    connection, self.issuer, org=org, after=codes[-1] if codes else "", limit=BATCH
                )
            if not page:
                return codes
            codes += [row["code"] for row in page]

    @property
    def steps(self) -> Steps:
        return Steps(self.database, self.issuer, self.actor)

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

    def _begin_again(self, lost: Sequence[Row]) -> list[Row]:
        """The rows that replace those whose applications are lost."""
        if not lost:
            return []
        with self.database.transaction() as connection:
            now = [applications.find(connection, row["id"]) or row for row in lost]
            orgs = [(OrgId(row["org_id"]), row["org"]) for row in now if row["org_state"] != "removed"]
            return self.begin(connection, orgs)

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

    async def listed(self) -> dict[str, ListedApplication]:
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
        self, rows: Sequence[Row], there: Mapping[str, ListedApplication], announce: timedelta | None
    ) -> list[tuple[Row, Provisioned]]:
        """The result of each row, `concurrency` at a time."""
        left, results = iter(rows), []

        async def complete_next() -> None:
            for row in left:
                results.append((row, await self._complete(row, there.get(row["name"]), announce)))
                self.report(len(results), len(rows))

        async with asyncio.TaskGroup() as group:
            for _ in range(max(1, min(self.concurrency, len(rows)))):
                group.create_task(complete_next())
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
                warning = await self._ready(row)
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

    async def _ready(self, row: Row) -> str:
        """Give an application what the one that it replaces has, and verify it; returns as `verify`."""
        older = await self.database.run(self._older, row)
        if older is None:
            return await self.verify(row)
        found = await self.management.application(
            older["application_id"], org=row["org"], name=name_of(older)
        )
        stored: Mapping[str, Sequence[str]] = older["scopes"] or {}
        scopes: dict[str, Sequence[str]] = {}
        properties: dict[str, PropertyValue] = {}
        for audience, known in stored.items():
            told = None if found is None else await self.management.scopes(found, audience)
            if told is None:
                claims = await self._claims(older, audience)
                told = frozenset(known) | (claims.scopes if claims else frozenset())
                properties |= _booleans(claims)
            scopes[audience] = sorted(told)
        # One that was deleted by hand has taken its properties along.
        if found is not None:
            credential = await self.database.run(self.credential_of, row)
            application = _application_of(row, credential)
            for key, value in (await self.management.properties(found)).items():
                # A provider may list a boolean as text; the token has its type.
                is_boolean = str(properties.get(key)).lower() == value
                await self.management.set_property(application, key, properties[key] if is_boolean else value)
        return await self.verify(row | {"scopes": scopes})

    async def _claims(self, row: Row, audience: str) -> Claims | None:
        """The claims of a token of an application; None if it gets no valid one."""
        org, _ = self.checks.read(row["org"])
        credential = await self.database.run(self.credential_of, row)
        report = await self.checks.probe(org, [Need(audience)], credential, counts=False)
        return next((probe.claims for probe in report.probes), None)

    def _older(self, row: Row) -> Row | None:
        """The application that the org uses now, if orgworker made it."""
        with self.database.autocommit() as connection:
            found = applications.of_orgs(connection, [OrgId(row["org_id"])], ("active", "overlapping"))
        return found[-1] if found else None

    async def _make(self, row: Row, found: ListedApplication | None) -> Row:
        """Make the application, or adopt the one that an earlier call has made; returns the row."""
        name = name_of(row)
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
        scopes = {need.audience: need.scopes | need.may for need in needs}
        if not scopes and not before:
            raise ConfigurationError(
                f"issuer {self.issuer} has no audience", fix=f"set audience in [issuers.{self.issuer}]"
            )
        credential = await self.database.run(self.credential_of, row)
        application = _application_of(row, credential)
        for audience, names in scopes.items():
            await self.management.authorise(application, audience)
            await self.management.add_scopes(application, audience, names)
        for audience, kept in before.items():
            needed = scopes.get(audience)
            more = set(kept) - (needed or set())
            more = await self._keep(application, audience, more, is_needed=needed is not None)
            scopes[audience] = (needed or frozenset()) | more
        given = {audience: sorted(names) for audience, names in scopes.items()}
        report = await self.confirm(org, needs, credential)
        lifetimes = [
            (probe.claims.expires_at - probe.claims.issued_at).total_seconds()
            for probe in report.probes
            if probe.claims is not None
        ]
        await self.database.run(
            self.steps.note,
            row["id"],
            {"scopes": given, "token_seconds": int(max(lifetimes, default=0))},
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

    async def _keep(
        self, application: OrgApplication, audience: str, scopes: set[str], *, is_needed: bool
    ) -> set[str]:
        """Give it scopes that no definition needs now; returns those that the provider still has."""
        try:
            if not is_needed:
                await self.management.authorise(application, audience)
            if scopes:
                await self.management.add_scopes(application, audience, scopes)
        except ProviderRefused as refused:
            if refused.detail not in ("unknown_audience", "unknown_scope"):
                raise
            if len(scopes) < 2:
                return set()
            kept = [await self._keep(application, audience, {each}, is_needed=is_needed) for each in scopes]
            return set().union(*kept)
        return scopes

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


class _Lost(Conflict):
    """An application that is never going to be used: it is gone, or its credential was retired."""


def _application_of(row: Row, credential: Credential) -> OrgApplication:
    return OrgApplication(row["org"], row["application_id"], row["client_id"], credential.secret, row["name"])


def name_of(row: Row) -> ApplicationName:
    """The name of a row's application; raises Conflict if it was changed by hand."""
    name = ApplicationName.parse(row["name"])
    if name is None:
        raise Conflict(f"{row['name']!r} is not the name of an application", fix="correct it in the database")
    return name


def _booleans(claims: Claims | None) -> dict[str, PropertyValue]:
    """The properties in a token that are booleans."""
    values = {} if claims is None else claims.properties
    return {name: value for name, value in values.items() if isinstance(value, bool)}


def _faults(report: Report) -> list[Diagnostic]:
    """What is wrong with the token itself."""
    return [each for each in report.problems() if each.check in ESSENTIAL]
