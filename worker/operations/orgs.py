"""Orgs: add one, change its state, or import many from JSON lines; each in one transaction."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from sqlalchemy import Connection

from worker.definitions.file import parse_org
from worker.errors import ConfigurationError, Conflict, DefinitionError, UsageError
from worker.ids import OrgId, new_id
from worker.operations import org_entry, settle
from worker.operations.credentials import Sealer, check_client, credential_row
from worker.operations.templates import materialise_first
from worker.orgs import STOPS, OrgEntry, OrgState, may_move
from worker.store import audit, backfills, credentials, definitions, edit_runs, orgs
from worker.store.database import Database
from worker.store.lists import orgs as org_lists

Row = dict[str, Any]


def add_org(
    database: Database, entry: OrgEntry, *, actor: str, issuers: Collection[str] | None = None
) -> Row:
    """Add one org, with what templates make for it, and return its row.

    `issuers` are those that `worker.toml` has, None if unknown.

    Raises:
        Conflict: there is such an org already.
        UsageError: no issuer is called that, or a value is out of range.
    """
    org_entry.check(entry, issuers)
    with database.transaction() as connection:
        now = database.now(connection)
        there = orgs.find(connection, entry.code, lock=True)
        if there is not None and there["state"] != "removed":
            raise Conflict(
                f"there is an org {entry.code} already", fix="to change it, name it in a file for `apply`"
            )
        columns = org_entry.columns(entry)
        if there is None:
            org_id = OrgId(new_id())
            fresh = {"id": org_id, "code": entry.code, "created_at": now, "updated_at": now}
            orgs.insert_for_all_orgs(connection, [fresh | columns])
        else:
            org_id = there["id"]
            orgs.change(connection, org_id, columns, at=now)
            orgs.set_state(connection, org_id, "active", by=actor, at=now, note=None)
        materialise_first(connection, actor=actor, at=now)
        audit.record(connection, [audit.Entry(org_id, "org.add", entry.code, columns)], at=now, actor=actor)
        return org_lists.org(connection, entry.code)


_ACTIONS: dict[OrgState, str] = {
    "active": "org.resume",
    "paused": "org.pause",
    "suspended": "org.suspend",
    "removed": "org.remove",
}


def set_org_state(
    database: Database, org: str, state: OrgState, *, actor: str, note: str | None = None
) -> Row:
    """Move an org to a state and return it; one that is in it already stays as it is.

    `paused`: nothing new fires or starts. `suspended`: what waits is cancelled too, at
    once, and what runs within one renewal. `removed`: its definitions are closed and
    its secrets destroyed as well. `active`: it goes on from now; nothing that was due
    meanwhile is replayed.

    Raises:
        NotFound: there is no such org.
        Conflict: it was removed.
    """
    with database.transaction() as connection:
        row = orgs.require(connection, org, lock=True)
        if not may_move(row["state"], state):
            raise Conflict(f"org {org} was removed", fix=f"`orgs add {org}` brings it back")
        if row["state"] != state:
            now = database.now(connection)
            with settle.settled_org(connection, row["id"], at=now) as rows:
                orgs.set_state(connection, row["id"], state, by=actor, at=now, note=note)
                stopped = _stop(connection, row["id"], state, rows, now)
            entry = audit.Entry(
                row["id"], _ACTIONS[state], org, {"from": row["state"], "note": note} | stopped
            )
            audit.record(connection, [entry], at=now, actor=actor)
        return org_lists.org(connection, org)


def _stop(connection: Connection, org_id: OrgId, state: OrgState, rows: list[Row], at: datetime) -> Row:
    """Stop what this state stops; returns how much that was, for the audit."""
    stops = STOPS[state]
    stopped: Row = {}
    if stops.waiting:
        stopped["cancelled"] = len(edit_runs.end_waiting(connection, org_id, reason="suspended"))
    if stops.running:
        stopped["asked_to_stop"] = edit_runs.ask_to_stop(connection, org_id, reason="suspended", at=at)
    if stops.secrets:
        stopped["credentials_destroyed"] = credentials.destroy(connection, org_id, at=at)
        backfills.cancel(connection, org_id, at=at)
        for row in rows:
            definitions.change(
                connection, org_id, row["id"], {"closed_at": at}, at=at, revision=row["revision"]
            )
    return stopped


class ImportRing(Sealer, Protocol):
    """The key ring: it must open secrets as well, so that the same file again adds nothing."""

    def unseal(self, sealed: bytes, key_id: str, *, org_id: str, credential_id: str) -> str:
        """The secret of one row."""
        ...


@dataclass(frozen=True, slots=True)
class ImportLine:
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
    ring: ImportRing,
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
    connection: Connection, ring: ImportRing, org_id: OrgId, line: ImportLine, *, known: bool
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


def _is_same(ring: ImportRing, newest: Row, line: ImportLine) -> bool:
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


def read_lines(lines: Iterable[str], issuers: Collection[str] | None = None) -> list[ImportLine]:
    """Read and check all lines; empty ones are passed over.

    Raises:
        UsageError: a line that is not understood, by its number.
    """
    read: list[ImportLine] = []
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


def _read(number: int, text: str) -> ImportLine:
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
        return ImportLine(number, parse_org(columns, entry=""), client_id, secret)
    except DefinitionError as error:
        raise UsageError(error.message, fix=error.fix) from None


_FIX = (
    'a line is {"code", "name", "issuer", "client_id", "client_secret"}, and may have '
    '"tags", "max_concurrent_runs", "weight" and "timezone"'
)
