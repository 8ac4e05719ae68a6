"""The keys that seal secrets: add one, reseal all secrets with it, remove an old one; what can be sealed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Table

from worker.errors import ConfigurationError, Conflict, NotFound, UsageError
from worker.handlers.job import MAX_SECRET_BYTES, SECRET_NAME
from worker.ids import ALL_ORGS
from worker.model.bindings import Binding, check_sendable, parse_bound_origin, parse_header
from worker.store import access_tokens, audit, org_secrets, orgs, tables
from worker.store.database import Database
from worker.store.dialect import Row
from worker.telemetry.secret_forms import SHORTEST, lines_of

if TYPE_CHECKING:
    from worker.tokens.sealing import KeyRing

BATCH = 500


def add_key(database: Database, ring: KeyRing, *, actor: str) -> KeyRing:
    """Add a key, which seals new secrets from now on.

    Raises:
        ConfigurationError: the ring cannot be written.
    """
    ring = ring.with_new_key()
    with database.transaction() as connection:
        audit.note(connection, None, "key.add", ring.sealing_key_id, at=database.now(connection), actor=actor)
    return ring


def rekey(
    database: Database,
    ring: KeyRing,
    *,
    actor: str,
    batch: int = BATCH,
    report: Callable[[int], None] = lambda resealed: None,
) -> Row:
    """Seal every secret with the newest key; if it seals all of them already, add a key first.

    Access tokens that an older key seals are deleted: workers request new ones. Returns the id
    of the key, whether it is `new`, and the number of secrets `resealed` and `unopened`. Each
    batch is a transaction, so the same command again continues after an interruption. Workers
    read the ring again when they meet the new key. `report` gets the number of secrets resealed
    so far.

    Raises:
        ConfigurationError: the ring cannot be written.
    """
    with database.autocommit() as connection:
        older = org_secrets.sealed_by_key(connection, ALL_ORGS).keys() & set(ring.key_ids[:-1])
    if not older:
        ring = add_key(database, ring, actor=actor)
    key_id = ring.sealing_key_id
    resealed = unopened = 0
    for table in (tables.credentials, tables.org_secrets):
        after: str | None = None
        while True:
            with database.transaction() as connection:
                rows = org_secrets.sealed_otherwise(
                    connection, ALL_ORGS, table, key_id, after=after, limit=batch
                )
                for row in rows:
                    done = _reseal(connection, ring, table, row)
                    resealed, unopened = resealed + done, unopened + (not done)
            if not rows:
                break
            after = rows[-1]["id"]
            report(resealed)
    _drop(database, not_sealed_with=key_id)
    return {"key_id": key_id, "new": not older, "resealed": resealed, "unopened": unopened}


def _reseal(connection: Connection, ring: KeyRing, table: Table, row: Row) -> bool:
    """Seal a secret with the newest key; False if its key is lost, or it was sealed for another row."""
    seal: Callable[..., tuple[bytes, str]] = ring.seal
    unseal: Callable[..., str] = ring.unseal
    place = {"org_id": row["org_id"], "credential_id": row["id"]}
    if table is tables.org_secrets:
        seal, unseal = ring.seal_secret, ring.unseal_secret
        place = org_secrets.place_of(row)
    try:
        secret = unseal(row["sealed"], row["key_id"], **place)
    except ConfigurationError:
        return False
    org_secrets.reseal(connection, table, row["org_id"], row["id"], *seal(secret, **place))
    return True


def remove_key(database: Database, ring: KeyRing, key_id: str, *, actor: str) -> None:
    """Remove an unused key from the ring, and the access tokens that it seals from the database.

    Raises:
        NotFound: the ring has no such key.
        Conflict: it still seals secrets, or it seals new ones.
    """
    if key_id not in ring.key_ids:
        raise NotFound(f"the key ring has no key {key_id}", fix="`keys list` lists them")
    with database.transaction() as connection:
        count = org_secrets.sealed_by_key(connection, ALL_ORGS).get(key_id, Counter()).total()
        if count:
            raise Conflict(f"the key {key_id} still seals {count} secrets", fix="run `keys rekey` first")
        ring.without(key_id)
        audit.note(connection, None, "key.remove", key_id, at=database.now(connection), actor=actor)
    _drop(database, sealed_with=key_id)


def drop_tokens(database: Database, org: str | None, *, actor: str) -> Row:
    """Delete the access tokens that workers share, of one org or of all; returns how many.

    Workers that run keep what they hold in memory.

    Raises:
        NotFound: no such org.
    """
    total = 0
    while True:
        # Of all orgs a batch in each transaction, each with its audit row.
        with database.transaction() as connection:
            if org is not None:
                org_id = orgs.require(connection, org)["id"]
                dropped = access_tokens.drop_of_org(connection, org_id)
            else:
                org_id, dropped = None, access_tokens.drop_some(connection, ALL_ORGS)
            subject, detail, now = org or "all orgs", {"tokens": dropped}, database.now(connection)
            audit.note(connection, org_id, "token.drop", subject, detail, at=now, actor=actor)
        total += dropped
        if org is not None or dropped < access_tokens.BATCH:
            return {"org": org, "dropped": total}


def _drop(database: Database, **which: str) -> None:
    """Delete tokens, a batch in each transaction. `which` as for the store."""
    while True:
        with database.transaction() as connection:
            dropped = access_tokens.drop_some(connection, ALL_ORGS, **which)
        if dropped < access_tokens.BATCH:
            return


def binding_of(origin: str | None, header: str | None) -> Binding | None:
    """The binding that a person gives, or None without an origin.

    Raises:
        UsageError: it is invalid, or there is a header without an origin.
    """
    if origin is None:
        if header is not None:
            raise UsageError(
                "header: only a bound secret has one",
                fix="add its origin, such as --for https://api.acme.com",
            )
        return None
    try:
        where = parse_bound_origin(origin)
    except ValueError as error:
        fix = "give scheme, host and port without a path, such as --for https://api.openai.com"
        raise UsageError(f"origin: {error}", fix=fix) from None
    try:
        return Binding(where, None if header is None else parse_header(header))
    except ValueError as error:
        raise UsageError(
            f"header: {error}", fix="leave it out if handlers put the secret into a header themselves"
        ) from None


def check_secret(name: str, value: str, binding: Binding | None = None) -> None:
    """Refuse a secret that no handler can ask for, that cannot be masked, or that its binding cannot send.

    Raises:
        UsageError: an invalid name, an empty, short or long value, or one that a header cannot carry.
    """
    if not SECRET_NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not the name of a secret",
            fix="use at most 64 letters, digits, '.', '_' and '-', such as openai",
        )
    if not value.strip():
        raise UsageError("the secret is empty", fix="check that it is the right file")
    if len(value.encode()) > MAX_SECRET_BYTES:
        raise UsageError(
            f"the secret has more than {MAX_SECRET_BYTES} bytes", fix="store the key, not the data it opens"
        )
    if not lines_of(value):
        raise UsageError(
            f"the secret is too short to be masked in what handlers write: it needs a line of {SHORTEST} "
            "characters or more",
            fix="choose a longer one",
        )
    if binding is not None:
        try:
            check_sendable(value)
        except ValueError as error:
            raise UsageError(
                f"the secret {name} is bound to {binding.origin}, and {error}",
                fix="store the key alone, or leave it unbound: handlers then get it in clear",
            ) from None
