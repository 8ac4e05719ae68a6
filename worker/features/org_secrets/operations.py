"""Secrets of orgs: add, rotate and remove one, and find those that handlers need and orgs lack."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection

from worker.errors import Conflict, NotFound
from worker.ids import OrgId, new_id
from worker.model.bindings import Binding
from worker.operations.keys import binding_of, check_secret
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
    database: Database,
    ring: KeyRing,
    org: str,
    name: str,
    value: str,
    *,
    origin: str | None = None,
    header: str | None = None,
    actor: str,
) -> SecretRow:
    """Add a secret of an org, sealed, with an `origin` bound to it; returns its row of the list.

    Raises:
        UsageError: the name, the value or the binding is invalid.
        NotFound: no such org.
        Conflict: it has one of that name, or was removed.
    """
    binding = binding_of(origin, header)
    check_secret(name, value, binding)
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
        place = {"org_id": row["id"], "name": name, "generation": 1, **_columns(binding)}
        sealed, key_id = ring.seal_secret(value, **place)
        sealing = {"sealed": sealed, "key_id": key_id, "created_at": now, "created_by": actor}
        org_secrets.add(connection, {"id": new_id()} | place | sealing)
        subject, detail = f"{org} {name}", {"generation": 1} | ({} if binding is None else asdict(binding))
        audit.note(connection, row["id"], "secret.add", subject, detail, at=now, actor=actor)
        return shown_secret(connection, row["id"], name)


def rotate_secret(
    database: Database, ring: KeyRing, org: str, name: str, value: str, *, actor: str
) -> SecretRow:
    """Replace the value of a secret, not its binding; returns its row. Running attempts keep the old value.

    Raises:
        UsageError: the value is invalid.
        NotFound: no such org, or it has no such secret.
        ConfigurationError: the old value does not open, so the binding may have been changed in the row.
    """
    check_secret(name, value)
    with database.transaction() as connection:
        row, stored = _require(connection, org, name)
        masker.register(value, OrgId(row["id"]), private=True)
        # Only the old value proves where the new one may go.
        _open(ring, stored)
        check_secret(name, value, _binding_in(stored))
        now, generation = database.now(connection), stored["generation"] + 1
        sealed, key_id = ring.seal_secret(value, **org_secrets.place_of(stored) | {"generation": generation})
        new = {"generation": generation, "sealed": sealed, "key_id": key_id}
        org_secrets.rotate(connection, row["id"], stored["id"], **new, at=now, by=actor)
        subject, detail = f"{org} {name}", {"generation": generation}
        audit.note(connection, row["id"], "secret.rotate", subject, detail, at=now, actor=actor)
        return shown_secret(connection, row["id"], name)


def bind_secret(
    database: Database,
    ring: KeyRing,
    org: str,
    name: str,
    *,
    origin: str | None,
    header: str | None = None,
    actor: str,
) -> SecretRow:
    """Bind a secret to an origin, or unbind it if that is None; returns its row. The value stays the same.

    Raises:
        UsageError: the binding is invalid, or a header cannot carry the value.
        NotFound: no such org, or it has no such secret.
        ConfigurationError: the value does not open.
    """
    binding = binding_of(origin, header)
    with database.transaction() as connection:
        row, stored = _require(connection, org, name)
        value, before = _open(ring, stored), _binding_in(stored)
        masker.register(value, OrgId(row["id"]), private=True)
        if binding != before:
            check_secret(name, value, binding)
            changed = _columns(binding)
            sealed, key_id = ring.seal_secret(value, **org_secrets.place_of(stored) | changed)
            new = changed | {"sealed": sealed, "key_id": key_id}
            org_secrets.bind(connection, row["id"], stored["id"], **new)
            subject, now = f"{org} {name}", database.now(connection)
            detail = changed | {"before": _columns(before)}
            audit.note(connection, row["id"], "secret.bind", subject, detail, at=now, actor=actor)
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


def _open(ring: KeyRing, stored: Row) -> str:
    return ring.unseal_secret(stored["sealed"], stored["key_id"], **org_secrets.place_of(stored))


def _columns(binding: Binding | None) -> dict[str, Any]:
    return {"origin": None, "header": None} if binding is None else asdict(binding)


def _binding_in(stored: Row) -> Binding | None:
    return None if stored["origin"] is None else Binding(stored["origin"], stored["header"])


def _require(connection: Connection, org: str, name: str) -> tuple[Row, Row]:
    """The org, locked, and its secret."""
    row = orgs.require(connection, org, lock=True)
    stored = org_secrets.find(connection, row["id"], name)
    if stored is None:
        raise NotFound(f"org {org} has no secret {name}", fix=f"`secrets list {org}` lists them")
    return row, stored
