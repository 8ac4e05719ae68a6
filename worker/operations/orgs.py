"""Orgs: add one, import many with their credentials, move an org between its states."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection

from worker.errors import Conflict, DefinitionError, InvalidTrigger, UsageError
from worker.ids import ALL_ORGS, OrgId, new_id
from worker.model.definitions.file import parse_org
from worker.model.definitions.pools import parse_pool
from worker.model.definitions.zones import parse_zone
from worker.model.orgs import OrgEntry, OrgState, may_move
from worker.operations import settle
from worker.operations.credentials import check_client, credential_row, is_stored
from worker.operations.templates import materialise_first
from worker.store import (
    access_tokens,
    audit,
    backfills,
    batch_requests,
    credentials,
    definitions,
    edit_runs,
    limits,
    org_secrets,
    orgs,
    product_logins,
    sign_in,
    states,
)
from worker.store.database import Database
from worker.store.dialect import Row, chunks
from worker.store.lists import read as lists
from worker.store.lists.rows import OrgDetail
from worker.store.sweeps import EndCounts
from worker.telemetry.masking import masker

if TYPE_CHECKING:
    from worker.tokens.sealing import KeyRing

# What a column of numbers holds.
_COUNTS = range(1, 2**31)


def columns_of(entry: OrgEntry) -> Row:
    """The columns of `orgs` that an entry sets."""
    names = ("name", "issuer", "max_concurrent_runs", "weight", "timezone", "pool")
    return {name: getattr(entry, name) for name in names} | {"tags": sorted(entry.tags)}


def changed_columns(before: Mapping[str, Any], entry: OrgEntry) -> Row:
    """The columns that an entry changes, with their new values."""
    return {name: value for name, value in columns_of(entry).items() if before[name] != value}


def check_entry(entry: OrgEntry, issuers: Collection[str] | None) -> None:
    """Refuse an invalid entry. `issuers` are those of `worker.toml`, None if unknown.

    Raises:
        UsageError: an unknown issuer or zone, an invalid pool, or a number out of range.
    """
    named = f"org {entry.code}"
    if issuers is not None and entry.issuer not in issuers:
        raise UsageError(
            f"{named}: there is no issuer {entry.issuer!r}; worker.toml has "
            f"{', '.join(sorted(issuers)) or 'none'}",
            fix=f"add a table [issuers.{entry.issuer}] to worker.toml, or correct the name",
        )
    if not entry.code or not entry.code.isprintable():
        raise UsageError(f"{entry.code!r} is not an org's code", fix="use the org_code of its tokens")
    if not (entry.max_concurrent_runs in _COUNTS and entry.weight in _COUNTS):
        raise UsageError(
            f"{named}: max_concurrent_runs and weight must be between 1 and {_COUNTS[-1]}",
            fix=f"`orgs pause {entry.code}` stops all of its runs",
        )
    if entry.timezone is not None:
        try:
            parse_zone(entry.timezone)
        except InvalidTrigger as error:
            raise UsageError(f"{named}: {error.message}", fix=error.fix) from None
    if entry.pool is not None:
        try:
            parse_pool(entry.pool)
        except ValueError as error:
            raise UsageError(f"{named}, pool: {error}", fix="name the pool of a worker or host") from None


def add_org(
    database: Database, entry: OrgEntry, *, actor: str, issuers: Collection[str] | None = None
) -> OrgDetail:
    """Add an org with the definitions of its templates, and return its row; a removed org comes back.

    Raises:
        Conflict: the org exists already.
        UsageError: an unknown issuer or zone, or a number out of range.
    """
    check_entry(entry, issuers)
    with database.transaction() as connection:
        now = database.now(connection)
        before = orgs.find(connection, entry.code, lock=True)
        if before is not None and before["state"] != "removed":
            raise Conflict(
                f"there is an org {entry.code} already", fix="to change it, name it in a file for `apply`"
            )
        if before is None:
            row = new_row(entry, at=now)
            orgs.add(connection, [row])
            trail = [audit.Entry(row["id"], "org.add", entry.code, columns_of(entry))]
        else:
            trail = _change_org(connection, before, entry, actor=actor, at=now)
        materialise_first(connection, actor=actor, at=now)
        audit.record(connection, trail, at=now, actor=actor)
        return lists.org(connection, entry.code)


def new_row(entry: OrgEntry, *, at: datetime) -> Row:
    """The row of `orgs` of a new org."""
    fresh = {"id": OrgId(new_id()), "code": entry.code, "created_at": at, "updated_at": at}
    return fresh | columns_of(entry)


# The states that also end an org's runs, and the sessions of its people.
ENDING: Collection[OrgState] = ("suspended", "removed")
# How the name of an actor begins that follows a provider.
SYNC = "sync:"
_VERBS: dict[OrgState, str] = {
    "active": "resume",
    "paused": "pause",
    "suspended": "suspend",
    "removed": "remove",
}


def set_org_state(
    database: Database,
    org: str,
    state: OrgState,
    *,
    actor: str,
    note: str | None = None,
    seen: Row | None = None,
) -> OrgDetail:
    """Move an org to a state, and return it.

    `paused`: no runs fire or start. `suspended`: also cancels waiting runs at once, running
    ones within one renewal. `removed`: also closes its definitions, clears their states and
    destroys its secrets.
    `active`: it continues from now; what was due meanwhile is not replayed.
    Who ends what a sync has suspended keeps it so. With `seen`, nothing changes if the state is no longer the
    one of that row.

    Raises:
        NotFound: no such org.
        Conflict: it was removed.
    """
    with database.transaction() as connection:
        row = orgs.require(connection, org, lock=True)
        if seen is not None and any(row[name] != seen[name] for name in ("state", "state_by", "state_at")):
            return lists.org(connection, org)
        if not may_move(row["state"], state):
            raise Conflict(f"org {org} was removed", fix=f"`orgs add {org}` brings it back")
        takes_over = state in ENDING and (row["state_by"] or "").startswith(SYNC) and row["state_by"] != actor
        if row["state"] != state or takes_over:
            now = database.now(connection)
            rows = definitions.lock_org(connection, row["id"])
            with settle.rescheduling(connection, rows, at=now, scope=ALL_ORGS) as counts:
                orgs.set_state(connection, row["id"], state, by=actor, at=now, note=note)
                stopped = _stop(connection, row["id"], state, rows, now, counts)
            if state in ENDING and (ended := sign_in.end_sessions_of_people(connection, org)):
                stopped["sessions_ended"] = ended
            detail = {"from": row["state"], "note": note} | stopped
            audit.note(connection, row["id"], f"org.{_VERBS[state]}", org, detail, at=now, actor=actor)
        return lists.org(connection, org)


def _stop(
    connection: Connection,
    org_id: OrgId,
    state: OrgState,
    rows: list[Row],
    at: datetime,
    counts: EndCounts,
) -> Row:
    """Stop what this state stops; returns the counts for the audit."""
    stopped: Row = {}
    if state in ENDING:
        # Not while a worker makes runs of a backfill, or admits them: those would be missed.
        backfills.lock_unfinished(connection, org_id)
        edit_runs.lock(connection, org_id)
        asked = edit_runs.ask_to_stop(connection, org_id, reason="suspended", at=at)
        cancelled = edit_runs.end_waiting(connection, org_id, reason="suspended", counts=counts)
        stopped["cancelled"] = len(cancelled)
        stopped["asked_to_stop"] = asked
        access_tokens.drop_of_org(connection, org_id)
    if state == "removed":
        stopped["credentials_destroyed"] = credentials.destroy(connection, org_id, at=at)
        stopped["secrets_destroyed"] = org_secrets.destroy(connection, org_id)
        stopped["states_cleared"] = states.clear(connection, org_id)
        backfills.cancel(connection, org_id, at=at)
        limits.forget_org(connection, org_id)
        batch_requests.forget_org(connection, org_id)
        if revoked := product_logins.forget_org(connection, org_id):
            stopped["product_logins_revoked"] = revoked
        for row in rows:
            closing = definitions.DefinitionUpdate(org_id, row["id"], row["revision"], {"closed_at": at})
            definitions.change(connection, [closing], at=at)
    return stopped


@dataclass(frozen=True, slots=True)
class ImportLine:
    """One org of the file; the repr leaves the secret out."""

    number: int
    org: OrgEntry
    client_id: str | None
    secret: str | None = field(repr=False)


def import_orgs(
    database: Database,
    ring: KeyRing,
    lines: Iterable[str],
    *,
    actor: str,
    issuers: Collection[str] | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Row:
    """Add or change the orgs of JSON lines, and add each line's credential; returns the counts.

    `report` gets the number of lines that are done and of all lines.
    A credential that equals the org's newest active one is not added, so the same file
    again changes nothing. Org states stay, but a removed org comes back.

    Raises:
        UsageError: an invalid line, by its number; nothing was written.
    """
    parsed = read_lines(lines, issuers)
    counts = Counter[str]()
    with database.transaction() as connection:
        now = database.now(connection)
        # Locked in the order of codes, before anything is written.
        stored = orgs.by_code(connection, (line.org.code for line in parsed), lock=True)
        done = 0
        for part in chunks(parsed):
            with _masking(part):
                counts += _import_some(connection, ring, part, stored, actor=actor, at=now)
            done += len(part)
            report(done, len(parsed))
        materialise_first(connection, actor=actor, at=now)
    return {name: counts[name] for name in ("orgs_added", "orgs_changed", "credentials_added")}


@contextmanager
def _masking(lines: Sequence[ImportLine]) -> Iterator[None]:
    """Mask the secrets of these lines in what an error says: to register each takes as long as to seal it."""
    try:
        yield
    except BaseException:
        for line in lines:
            if line.secret is not None:
                masker.register(line.secret)
        raise


def _import_some(
    connection: Connection,
    ring: KeyRing,
    lines: Sequence[ImportLine],
    stored: Mapping[str, Row],
    *,
    actor: str,
    at: datetime,
) -> Counter[str]:
    """Write some lines, whose orgs are `stored` by code or new; returns the counts."""
    known_ids = [stored[line.org.code]["id"] for line in lines if line.org.code in stored]
    active = credentials.active_of(connection, known_ids) if known_ids else {}
    last = credentials.last_generations(connection, known_ids) if known_ids else {}
    new_orgs: list[Row] = []
    new_credentials: list[Row] = []
    trail: list[audit.Entry] = []
    orgs_changed = 0
    for line in lines:
        before = stored.get(line.org.code)
        if before is None:
            new_orgs.append(new_row(line.org, at=at))
            org_id = new_orgs[-1]["id"]
            trail.append(audit.Entry(org_id, "org.add", line.org.code, columns_of(line.org)))
        else:
            org_id = before["id"]
            changed = _change_org(connection, before, line.org, actor=actor, at=at)
            trail += changed
            orgs_changed += len(changed)
        newest = next(iter(active.get(org_id, ())), None)
        credential = _new_credential(ring, org_id, line, newest, last.get(org_id, 0) + 1)
        if credential is not None:
            new_credentials.append(credential | {"created_at": at, "created_by": actor})
            subject = f"{line.org.code} {credential['generation']}"
            trail.append(audit.Entry(org_id, "credential.add", subject, {"client_id": line.client_id}))
    orgs.add(connection, new_orgs)
    credentials.add(connection, new_credentials)
    audit.record(connection, trail, at=at, actor=actor)
    return Counter(
        orgs_added=len(new_orgs), orgs_changed=orgs_changed, credentials_added=len(new_credentials)
    )


def _change_org(
    connection: Connection, before: Row, entry: OrgEntry, *, actor: str, at: datetime
) -> list[audit.Entry]:
    """Change a stored org to its entry; returns the audit entry, if anything changes."""
    org_id, new = before["id"], changed_columns(before, entry)
    is_back = before["state"] == "removed"
    if not new and not is_back:
        return []
    if is_back:
        orgs.set_state(connection, org_id, "active", by=actor, at=at, note=None)
    moved = definitions.lock_org(connection, org_id) if "timezone" in new else []
    with settle.rescheduling(connection, moved, at=at, scope=ALL_ORGS):
        orgs.change(connection, org_id, new, at=at)
    if is_back:
        return [audit.Entry(org_id, "org.add", entry.code, columns_of(entry))]
    return [audit.Entry(org_id, "org.change", entry.code, new)]


def _new_credential(
    ring: KeyRing, org_id: OrgId, line: ImportLine, newest: Row | None, generation: int
) -> Row | None:
    """The row to insert; None if the line has no credential, or that of the newest active one."""
    if line.client_id is None or line.secret is None:
        return None
    if newest is not None and is_stored(ring, newest, line.client_id, line.secret):
        return None
    return credential_row(ring, org_id, generation, client_id=line.client_id, secret=line.secret)


def read_lines(lines: Iterable[str], issuers: Collection[str] | None = None) -> list[ImportLine]:
    """Parse and check all lines, skipping empty ones.

    Raises:
        UsageError: an invalid line, by its number.
    """
    parsed: list[ImportLine] = []
    seen: dict[str, int] = {}
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            line = _parse(number, text)
            check_entry(line.org, issuers)
            if line.org.code in seen:
                raise UsageError(
                    f"org {line.org.code} is in line {seen[line.org.code]} already",
                    fix="an org has one line; remove one of the two",
                )
        except UsageError as error:
            raise UsageError(
                f"line {number}: {error.message}; nothing was imported", fix=error.fix or _FIX
            ) from None
        seen[line.org.code] = number
        parsed.append(line)
    return parsed


def _parse(number: int, text: str) -> ImportLine:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        # Not the parser's message: it can quote the line, with its secret.
        raise UsageError("not JSON", fix=_FIX) from None
    if not isinstance(value, Mapping):
        raise UsageError("not a JSON object", fix=_FIX)
    client_id, secret = value.get("client_id"), value.get("client_secret")
    for key in ("client_id", "client_secret"):
        if value.get(key) is not None and not isinstance(value[key], str):
            raise UsageError(f"{key} must be a string", fix=_FIX)
    if (client_id is None) != (secret is None):
        raise UsageError("client_id and client_secret must be given together", fix=_FIX)
    if client_id is not None:
        check_client(client_id, secret, None)
    columns = {key: item for key, item in value.items() if key not in ("client_id", "client_secret")}
    try:
        return ImportLine(number, parse_org(columns, entry=""), client_id, secret)
    except DefinitionError as error:
        raise UsageError(error.message, fix=error.fix) from None


_FIX = (
    'a line is {"code", "name", "issuer", "client_id", "client_secret"}, and can have '
    '"tags", "max_concurrent_runs", "weight", "timezone" and "pool"'
)
