"""Orgs with their credentials in bulk, from JSON lines: the whole file or nothing, in one transaction."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from sqlalchemy import Connection

from worker.definitions.file import parse_org
from worker.errors import ConfigurationError, DefinitionError, UsageError
from worker.ids import OrgId, new_id
from worker.operations import org_entry
from worker.operations.credentials import Sealer, check_client, credential_row
from worker.operations.materialise import materialise_first
from worker.orgs.org import OrgEntry
from worker.store import audit, credentials, orgs
from worker.store.database import Database

Row = dict[str, Any]


class Ring(Sealer, Protocol):
    """The key ring: it must open secrets as well, so that the same file again adds nothing."""

    def unseal(self, sealed: bytes, key_id: str, *, org_id: str, credential_id: str) -> str:
        """The secret of one row."""
        ...


@dataclass(frozen=True, slots=True)
class Line:
    """One org of the file; the secret is in no repr."""

    number: int
    org: OrgEntry
    client_id: str | None
    secret: str | None = field(repr=False)


@dataclass(slots=True)
class Imported:
    """How many orgs and credentials the import made or changed; 0 of each when all was there."""

    orgs_added: int = 0
    orgs_changed: int = 0
    credentials_added: int = 0


def import_orgs(
    database: Database,
    ring: Ring,
    lines: Iterable[str],
    *,
    actor: str,
    issuers: Collection[str] | None = None,
) -> Imported:
    """Add the orgs of JSON lines, change those that are there, and give each the credential of its line.

    A credential that equals the newest active one of its org is left alone, so the
    same file again changes nothing. The state of an org stays, but for a removed
    one, which comes back.

    Raises:
        UsageError: a line that is not understood, by its number; nothing was written.
    """
    read = read_lines(lines, issuers)
    done = Imported()
    with database.transaction() as connection:
        now = database.now(connection)
        there = orgs.find_for_all_orgs(connection, (line.org.code for line in read), lock=True)
        new_orgs: list[Row] = []
        new_credentials: list[Row] = []
        trail: list[audit.Entry] = []
        for line in read:
            before = there.get(line.org.code)
            columns = org_entry.columns(line.org)
            if before is None:
                org_id = OrgId(new_id())
                fresh = {"id": org_id, "code": line.org.code, "created_at": now, "updated_at": now}
                new_orgs.append(fresh | columns)
                trail.append(audit.Entry(org_id, "org.add", line.org.code, columns))
            else:
                org_id = before["id"]
                new = org_entry.changed(before, line.org)
                if before["state"] == "removed":
                    orgs.set_state(connection, org_id, "active", by=actor, at=now, note=None)
                    trail.append(audit.Entry(org_id, "org.add", line.org.code, columns))
                elif new:
                    trail.append(audit.Entry(org_id, "org.change", line.org.code, new))
                if new or before["state"] == "removed":
                    org_entry.write(connection, before, new, at=now)
                    done.orgs_changed += 1
            credential = _new_credential(connection, ring, org_id, line, known=before is not None)
            if credential is not None:
                new_credentials.append(credential | {"created_at": now, "created_by": actor})
                subject = f"{line.org.code} {credential['generation']}"
                trail.append(audit.Entry(org_id, "credential.add", subject, {"client_id": line.client_id}))
        orgs.insert_for_all_orgs(connection, new_orgs)
        credentials.insert_for_all_orgs(connection, new_credentials)
        audit.record(connection, trail, at=now, actor=actor)
        materialise_first(connection, actor=actor, at=now)
        done.orgs_added, done.credentials_added = len(new_orgs), len(new_credentials)
    return done


def _new_credential(
    connection: Connection, ring: Ring, org_id: OrgId, line: Line, *, known: bool
) -> Row | None:
    """The row to insert, or None where the line has no credential or the org has it already."""
    if line.client_id is None:
        return None
    generation = 1
    if known:
        generation = credentials.last_generation(connection, org_id) + 1
        newest = next(iter(credentials.active(connection, org_id)), None)
        if newest is not None and _is_same(ring, newest, line):
            return None
    return credential_row(ring, org_id, generation, client_id=line.client_id, secret=line.secret)


def _is_same(ring: Ring, newest: Row, line: Line) -> bool:
    if newest["client_id"] != line.client_id or newest["sealed"] is None:
        return False
    try:
        secret = ring.unseal(
            newest["sealed"], newest["key_id"], org_id=newest["org_id"], credential_id=newest["id"]
        )
    except ConfigurationError:
        # Its key is gone: what the file says is the way to mend that.
        return False
    return secret == line.secret


def read_lines(lines: Iterable[str], issuers: Collection[str] | None = None) -> list[Line]:
    """Read and check all lines; empty ones are passed over.

    Raises:
        UsageError: a line that is not understood, by its number.
    """
    read: list[Line] = []
    seen: dict[str, int] = {}
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            line = _read(number, text)
            org_entry.check(line.org, issuers)
            if line.org.code in seen:
                raise UsageError(
                    f"org {line.org.code} stands in line {seen[line.org.code]} already",
                    fix="an org has one line; leave one of the two out",
                )
        except UsageError as error:
            raise UsageError(
                f"line {number}: {error.message}; nothing was imported", fix=error.fix or _FIX
            ) from None
        seen[line.org.code] = number
        read.append(line)
    return read


def _read(number: int, text: str) -> Line:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        # Not the parser's own words: they may quote the line, and with it the secret.
        raise UsageError("not JSON", fix=_FIX) from None
    if not isinstance(value, Mapping):
        raise UsageError("not a JSON object", fix=_FIX)
    client_id, secret = value.get("client_id"), value.get("client_secret")
    for key in ("client_id", "client_secret"):
        if value.get(key) is not None and not isinstance(value[key], str):
            raise UsageError(f"{key} is no text", fix=_FIX)
    if (client_id is None) != (secret is None):
        raise UsageError("client_id and client_secret come together or not at all", fix=_FIX)
    if client_id is not None:
        check_client(client_id, secret, None)
    columns = {key: item for key, item in value.items() if key not in ("client_id", "client_secret")}
    try:
        return Line(number, parse_org(columns, entry=""), client_id, secret)
    except DefinitionError as error:
        raise UsageError(error.message, fix=error.fix) from None


_FIX = (
    'a line is {"code", "name", "issuer", "client_id", "client_secret"}, and may have '
    '"tags", "max_concurrent_runs", "weight" and "timezone"'
)
