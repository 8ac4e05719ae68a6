"""Scopes of applications follow the definitions: missing ones are added, unused ones taken away if asked."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from worker.diagnosis.requirements import OrgDefinitions
from worker.errors import WorkerError
from worker.features.provisioning.application_rights import application_of
from worker.features.provisioning.provisioning import Provisioned, Provisioner
from worker.ids import OrgId
from worker.store import applications, audit
from worker.store.dialect import Row
from worker.telemetry.events import emit
from worker.tokens.token_probe import Need

# Orgs whose definitions are read at once.
PAGE = 200


@dataclass(frozen=True, slots=True)
class ScopeChange:
    """An application in use, and the scopes by audience that it lacks, and those that nothing needs."""

    row: Row
    org: OrgDefinitions
    needs: Sequence[Need]
    add: Mapping[str, frozenset[str]] = field(default_factory=dict)
    remove: Mapping[str, frozenset[str]] = field(default_factory=dict)


@dataclass(slots=True)
class Scopes:
    """The scopes of one issuer's applications; `trim` also takes away what no definition needs any more."""

    provisioner: Provisioner
    trim: bool

    def next(self, after: str) -> tuple[list[ScopeChange], str | None]:
        """The changes that the next orgs by code need; also the last org's code, None at the end."""
        provisioner = self.provisioner
        found, last = provisioner.checks.read_next(provisioner.issuer, after, PAGE)
        needs = {org.org.id: (org, each) for org, each in found}
        with provisioner.database.autocommit() as connection:
            rows = applications.of_orgs(connection, list(needs), ("active",))
        changes = [
            change for row in rows if (change := compared(row, *needs[OrgId(row["org_id"])], trim=self.trim))
        ]
        return changes, last

    async def change(self, change: ScopeChange) -> Provisioned:
        """Carry one change out; harmless to repeat. What fails is tried again by the next round."""
        provisioner, row = self.provisioner, change.row
        try:
            await self._change(change)
        except WorkerError as error:
            await provisioner.database.run(provisioner.steps.note_error, row["id"], error)
            emit("provisioning.failed", org=row["org"], issuer=provisioner.issuer, error=error.code)
            return Provisioned(row["org"], row["client_id"], error=error)
        return Provisioned(row["org"], row["client_id"])

    async def change_all(self, changes: Iterable[ScopeChange]) -> list[Provisioned]:
        """The results of these changes, all at once."""
        return await asyncio.gather(*(self.change(change) for change in changes))

    async def _change(self, change: ScopeChange) -> None:
        provisioner, row = self.provisioner, change.row
        management = provisioner.management
        credential = await provisioner.database.run(provisioner.rights.credential_of, row)
        application = application_of(row, credential)
        for audience, scopes in change.add.items():
            if audience not in (row["scopes"] or {}):
                await management.authorise(application, audience)
            await management.add_scopes(application, audience, scopes)
        for audience, scopes in change.remove.items():
            await management.remove_scopes(application, audience, scopes)
        if change.add:
            await provisioner.rights.confirm(change.org, change.needs, credential)
        await provisioner.database.run(self._store, change)

    def _store(self, change: ScopeChange) -> None:
        """Store the scopes that the application has now."""
        provisioner, database = self.provisioner, self.provisioner.database
        given = {audience: set(scopes) for audience, scopes in (change.row["scopes"] or {}).items()}
        for audience, scopes in change.add.items():
            given[audience] = given.get(audience, set()) | scopes
        for audience, scopes in change.remove.items():
            given[audience] -= scopes
        added, removed = names_of(change.add), names_of(change.remove)
        detail = {"client_id": change.row["client_id"], "added": added, "removed": removed}
        org_id = OrgId(change.row["org_id"])
        with database.transaction() as connection:
            at = database.now(connection)
            values = {
                "scopes": {audience: sorted(scopes) for audience, scopes in given.items()},
                "last_error": None,
            }
            applications.change(connection, change.row["id"], values, at=at)
            if change.add or change.remove:
                subject, actor = change.row["org"], provisioner.actor
                audit.note(connection, org_id, "application.scopes", subject, detail, at=at, actor=actor)
        if change.add or change.remove:
            emit(
                "application.scopes",
                org=change.row["org"],
                issuer=provisioner.issuer,
                client=change.row["client_id"],
                added=" ".join(added),
                removed=" ".join(removed),
            )


def compared(row: Row, org: OrgDefinitions, needs: Sequence[Need], *, trim: bool) -> ScopeChange | None:
    """What an application lacks and what nothing needs, or None; pure.

    An application whose last change failed, and that needs none any more, is a change without scopes.
    """
    given = {audience: frozenset(scopes) for audience, scopes in (row["scopes"] or {}).items()}
    wanted = {need.audience: need.scopes | need.may for need in needs}
    add = {
        audience: scopes - given.get(audience, frozenset())
        for audience, scopes in wanted.items()
        if audience not in given or scopes - given[audience]
    }
    remove = {
        audience: scopes - wanted.get(audience, frozenset())
        for audience, scopes in given.items()
        if trim and scopes - wanted.get(audience, frozenset())
    }
    if add or remove or row["last_error"] is not None:
        return ScopeChange(row, org, needs, add, remove)
    return None


def names_of(scopes: Mapping[str, frozenset[str]]) -> list[str]:
    """The names of scopes of all audiences."""
    return sorted({name for each in scopes.values() for name in each})
