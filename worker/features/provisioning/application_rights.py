"""The rights of an application: scopes and properties, and a verified token that shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker.clock import Clock
from worker.diagnosis.check_orgs import Checks, Report
from worker.diagnosis.requirements import OrgDefinitions
from worker.errors import (
    ConfigurationError,
    Conflict,
    CredentialsRejected,
    Diagnostic,
    IssuerUnavailable,
    ProviderRefused,
)
from worker.features.provisioning.application_steps import Steps
from worker.features.provisioning.management.contract import (
    Management,
    OrgApplication,
    PropertyValue,
)
from worker.guard.claims import Claims
from worker.ids import OrgId
from worker.model.provider import ApplicationName
from worker.secret import Secret
from worker.store import applications, credentials
from worker.store.database import Database
from worker.store.dialect import Row
from worker.tokens.credentials import Credential
from worker.tokens.token_probe import Need

if TYPE_CHECKING:
    from worker.tokens.sealing import KeyRing

# Seconds between the tries for the first token of a new application.
TRIES = (0.5, 2.0, 5.0)
# What must hold of a new application's token. Properties and flags are set later, and belong to definitions.
ESSENTIAL = frozenset({"issuer", "audience", "token", "verification", "key", "org", "client", "scopes"})


@dataclass(frozen=True, slots=True, repr=False)
class Rights:
    """Gives the applications of one issuer's orgs their rights, and verifies them."""

    database: Database
    ring: KeyRing
    management: Management
    checks: Checks
    issuer: str
    clock: Clock
    steps: Steps

    async def give(self, row: Row) -> str:
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
            application = application_of(row, credential)
            for key, value in (await self.management.properties(found)).items():
                # A provider may list a boolean as text; the token has its type.
                is_boolean = str(properties.get(key)).lower() == value
                await self.management.set_property(application, key, properties[key] if is_boolean else value)
        return await self.verify(row | {"scopes": scopes})

    async def _claims(self, row: Row, audience: str) -> Claims | None:
        """The claims of a token of an application; None if it gets no valid one."""
        if row["credential_state"] != "active":
            return None
        org, _ = self.checks.read(row["org"])
        try:
            credential = await self.database.run(self.credential_of, row)
        except (Conflict, ConfigurationError):  # its secret is destroyed, or the key that sealed it is lost
            return None
        report = await self.checks.probe(org, [Need(audience)], credential, counts=False)
        return next((probe.claims for probe in report.probes), None)

    def _older(self, row: Row) -> Row | None:
        """The application that the org uses now, if orgworker made it."""
        with self.database.autocommit() as connection:
            found = applications.of_orgs(connection, [OrgId(row["org_id"])], ("active", "overlapping"))
        return found[-1] if found else None

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
        application = application_of(row, credential)
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
            fix = _fix(faults[0], credential)
            raise kind(f"no valid token of the application: {faults[0].detail}", fix=fix)
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
        org_id, client = OrgId(row["org_id"]), row["client_id"]
        with self.database.autocommit() as connection:
            stored = credentials.by_id(connection, org_id, row["credential_id"])
        if stored is None or stored["sealed"] is None:
            raise Conflict(
                f"the credential of org {row['org']}'s new application was retired",
                fix="`orgs sync --orphans --delete` deletes the application; the next call makes another",
            )
        id, sealed, key_id = stored["id"], stored["sealed"], stored["key_id"]
        secret = self.ring.unseal(sealed, key_id, org_id=stored["org_id"], credential_id=id)
        return Credential(id, org_id, row["org"], stored["generation"], client, Secret(secret))


def application_of(row: Row, credential: Credential) -> OrgApplication:
    """The application of a row, with its secret."""
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


def _fix(fault: Diagnostic, credential: Credential) -> str:
    """What to do about a new application's token; advice for credentials that people add does not fit."""
    if fault.check in ("org", "client"):
        return f"delete the application {credential.client_id} at the provider, then run the command again"
    return fault.fix


def _faults(report: Report) -> list[Diagnostic]:
    """What is wrong with the token itself."""
    return [each for each in report.problems() if each.check in ESSENTIAL]
