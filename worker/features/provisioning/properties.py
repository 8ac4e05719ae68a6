"""Properties of an org's application at the provider: shown and changed, as its next token has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from sqlalchemy import Connection

from worker.errors import Conflict, NotFound
from worker.features.provisioning.management.contract import (
    Management,
    OrgApplication,
    PropertyValue,
)
from worker.ids import OrgId
from worker.model.provider import ApplicationName
from worker.store import access_tokens, applications, audit, credentials, installation, orgs
from worker.store.database import Database
from worker.store.dialect import Row


class PropertyRow(TypedDict):
    """A property of the application; a flag that the org overrides is a property of the flag's name."""

    name: str
    value: PropertyValue


async def show_properties(database: Database, management: Management, org: str) -> list[PropertyRow]:
    """The properties of the application of the org's newest active credential, by name.

    Raises:
        NotFound: no such org, or it has no application at the provider.
        ForeignApplication, ProviderRefused, ProviderUnavailable: as the management API.
    """
    application = await _application(database, management, org)
    found = await management.properties(application)
    return [PropertyRow(name=name, value=value) for name, value in sorted(found.items())]


async def change_properties(
    database: Database,
    management: Management,
    org: str,
    values: Mapping[str, PropertyValue | None],
    *,
    actor: str,
) -> list[PropertyRow]:
    """Set properties of the application; None unsets one. Returns all as they are then.

    The org's stored tokens are dropped, and workers drop theirs within `new_claims.EVERY` seconds of the row
    in the audit, so that the next run has them. Each key that was changed is in the audit, without its value.

    Raises:
        NotFound, ForeignApplication, ProviderRefused, ProviderUnavailable, Unclear: as `show_properties`.
        Conflict: the credential came with a copy, so the application is another installation's.
    """
    await database.call_autocommit(_check_own, org)
    application = await _application(database, management, org)
    for key, value in values.items():
        await management.set_property(application, key, value)
        await database.call(_record, org, key, is_set=value is not None, actor=actor, database=database)
    found = await management.properties(application)
    return [PropertyRow(name=name, value=value) for name, value in sorted(found.items())]


async def _application(database: Database, management: Management, org: str) -> OrgApplication:
    """The application of the org's newest active credential, checked to be the org's."""
    credential, row = await database.call_autocommit(_stored, org)
    if row is not None:
        name = ApplicationName.parse(row["name"])
        application = await management.application(row["application_id"], org=org, name=name)
    else:
        if credential["last_used_at"] is None or credential["last_error"] is not None:
            # Only a token shows that a client which was added by hand is this org's.
            raise Conflict(
                f"no token of {credential['client_id']} has been verified for org {org} yet",
                fix=f"`credentials verify {org}`, then again",
            )
        application = await management.application(
            credential["client_id"], org=org, client_id=credential["client_id"]
        )
    if application is None:
        raise NotFound(
            f"the provider has no application {credential['client_id']} of org {org}",
            fix=f"`orgs sync --provision --org {org}` makes one if the credential does not work",
        )
    return application


def _stored(connection: Connection, org: str) -> tuple[Row, Row | None]:
    """The org's newest active credential, and the row of its application if orgworker made it."""
    org_id = OrgId(orgs.require(connection, org)["id"])
    active = credentials.active(connection, org_id)
    if not active:
        raise Conflict(
            f"org {org} has no active credential", fix=f"`orgs sync --provision --org {org}` makes one"
        )
    made = applications.of_orgs(connection, [org_id], ("active",))
    row = next((row for row in made if row["credential_id"] == active[0]["id"]), None)
    return active[0], row


def _check_own(connection: Connection, org: str) -> None:
    """Raise Conflict if the credential in use is older than the adoption of a copy."""
    since = installation.read(connection).new_since
    if since is None:
        return
    newest = next(iter(credentials.active(connection, OrgId(orgs.require(connection, org)["id"]))), None)
    if newest is not None and newest["created_at"] <= since:
        raise Conflict(
            f"the credential of org {org} came with a copy: its application is another installation's",
            fix=f"`credentials add {org}` with an application for this installation",
        )


def _record(
    connection: Connection, org: str, key: str, *, is_set: bool, actor: str, database: Database
) -> None:
    org_id = OrgId(orgs.require(connection, org)["id"])
    action = "property.set" if is_set else "property.unset"
    audit.note(connection, org_id, action, f"{org} {key}", at=database.now(connection), actor=actor)
    access_tokens.drop_of_org(connection, org_id)
