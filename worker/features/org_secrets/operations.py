"""Secrets of orgs: add, rotate and remove one, and find those that handlers need and orgs lack."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import Connection

from worker.errors import Conflict, NotFound
from worker.ids import OrgId, new_id
from worker.operations.keys import check_secret
from worker.store import audit, org_secrets, orgs
from worker.store.database import Database
from worker.store.dialect import Row
from worker.store.lists.read import secret as shown_secret
from worker.store.lists.rows import SecretRow
from worker.telemetry.masking import masker

if TYPE_CHECKING:
    from worker.tokens.sealing import KeyRing

COMMAND = "python -m worker"


def add_secret(
    database: Database, ring: KeyRing, org: str, name: str, value: str, *, actor: str
) -> SecretRow:
    """Add a secret of an org, sealed; returns its row of the list.

    Raises:
        UsageError: the name or the value is invalid.
        NotFound: no such org.
        Conflict: it has one of that name, or was removed.
    """
    check_secret(name, value)
    with database.transaction() as connection:
        row = orgs.require(connection, org, lock=True)
        masker.register(value, OrgId(row["id"]), private=True)
        if row["state"] == "removed":
            raise Conflict(f"org {org} was removed", fix=f"`orgs add {org}` brings it back")
        if org_secrets.find(connection, row["id"], name) is not None:
            raise Conflict(
                f"org {org} has a secret {name} already",
                fix=f"`secrets rotate {org} {name}` replaces its value",
            )
        now = database.now(connection)
        sealed, key_id = ring.seal_secret(value, org_id=row["id"], name=name, generation=1)
        new = {"id": new_id(), "org_id": row["id"], "name": name, "generation": 1}
        sealing = {"sealed": sealed, "key_id": key_id, "created_at": now, "created_by": actor}
        org_secrets.add(connection, new | sealing)
        subject = f"{org} {name}"
        audit.note(connection, row["id"], "secret.add", subject, {"generation": 1}, at=now, actor=actor)
        return shown_secret(connection, row["id"], name)


def rotate_secret(
    database: Database, ring: KeyRing, org: str, name: str, value: str, *, actor: str
) -> SecretRow:
    """Replace the value of a secret; returns its row. Running attempts keep the old one.

    Raises:
        UsageError: the value is invalid.
        NotFound: no such org, or it has no such secret.
    """
    check_secret(name, value)
    with database.transaction() as connection:
        row, stored = _require(connection, org, name)
        masker.register(value, OrgId(row["id"]), private=True)
        now, generation = database.now(connection), stored["generation"] + 1
        sealed, key_id = ring.seal_secret(value, org_id=row["id"], name=name, generation=generation)
        new = {"generation": generation, "sealed": sealed, "key_id": key_id}
        org_secrets.rotate(connection, row["id"], stored["id"], **new, at=now, by=actor)
        subject, detail = f"{org} {name}", {"generation": generation}
        audit.note(connection, row["id"], "secret.rotate", subject, detail, at=now, actor=actor)
        return shown_secret(connection, row["id"], name)


def remove_secret(database: Database, org: str, name: str, *, actor: str) -> Row:
    """Delete a secret: new runs that need it are refused. Returns its org, name and last generation.

    Raises:
        NotFound: no such org, or it has no such secret.
    """
    with database.transaction() as connection:
        row, stored = _require(connection, org, name)
        org_secrets.remove(connection, row["id"], stored["id"])
        detail, now = {"generation": stored["generation"]}, database.now(connection)
        audit.note(connection, row["id"], "secret.remove", f"{org} {name}", detail, at=now, actor=actor)
    return {"id": stored["id"], "org": org, "name": name, **detail, "removed": True}


def _require(connection: Connection, org: str, name: str) -> tuple[Row, Row]:
    """The org, locked, and its secret."""
    row = orgs.require(connection, org, lock=True)
    stored = org_secrets.find(connection, row["id"], name)
    if stored is None:
        raise NotFound(f"org {org} has no secret {name}", fix=f"`secrets list {org}` lists them")
    return row, stored
