"""Orphans: applications of this installation at the provider that no org uses."""

from __future__ import annotations

from worker.ids import OrgId
from worker.operations.provisioning import Provisioner
from worker.providers.management.contract import ListedApplication
from worker.store import applications, audit
from worker.store.dialect import Row


async def orphans(provisioner: Provisioner, *, delete: bool) -> list[Row]:
    """The applications of this installation that no org uses; deletes them if asked.

    Each has `id` and `name` at the provider, `org` and `deleted`.

    Raises:
        ProviderUnavailable, ProviderRefused, ConfigurationError: as `Provisioner.provision`.
    """
    there = await provisioner.listed()
    used = await provisioner.database.run(_used_names, provisioner)
    rows: list[Row] = []
    for name, found in there.items():
        if name in used or found.made_as is None:
            continue
        rows.append({"id": found.id, "name": name, "org": found.made_as.org, "deleted": False})
        if delete:
            await provisioner.management.delete(found.id, org=found.made_as.org, name=found.made_as)
            await provisioner.database.run(_note_deleted, provisioner, found)
            rows[-1]["deleted"] = True
    return rows


def _used_names(provisioner: Provisioner) -> set[str]:
    """The names of applications that an org uses, will use, or uses until its overlap has ended."""
    names: set[str] = set()
    after = ""
    while True:
        with provisioner.database.autocommit() as connection:
            page = applications.in_states(connection, provisioner.issuer, applications.USED, after=after)
        names |= {row["name"] for row in page if row["org_state"] != "removed"}
        if not page:
            return names
        after = page[-1]["id"]


def _note_deleted(provisioner: Provisioner, found: ListedApplication) -> None:
    """Store that an application is deleted, if there is a row of it."""
    database = provisioner.database
    with database.transaction() as connection:
        at = database.now(connection)
        row = applications.by_name(connection, found.name)
        if row is not None:
            applications.change(connection, row["id"], {"state": "deleted"}, at=at)
        org_id = None if row is None else OrgId(row["org_id"])
        entry = audit.Entry(org_id, "application.delete", found.name, {"id": found.id})
        audit.record(connection, [entry], at=at, actor=provisioner.actor)
