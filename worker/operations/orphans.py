"""Orphans: applications of this installation at the provider that no org uses."""

from __future__ import annotations

from worker.errors import WorkerError
from worker.ids import OrgId
from worker.operations.provisioning import BATCH, Provisioner
from worker.operations.walks import rows_of
from worker.providers.management.contract import ListedApplication
from worker.store import applications, audit
from worker.store.dialect import Row


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


def _used(provisioner: Provisioner) -> dict[str, str | None]:
    """The applications that an org uses, will use, or uses until its overlap has ended.

    By name the id; None while the application is being made.
    """
    of_issuer = provisioner.issuer, applications.USED
    rows = rows_of(provisioner.database, applications.in_states, *of_issuer, limit=BATCH)
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
        entry = audit.Entry(org_id, "application.delete", found.name, {"id": found.id})
        audit.record(connection, [entry], at=at, actor=provisioner.actor)
