"""The keys that seal secrets: how much each seals, a new one for all of it, the end of an old one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

from worker.errors import ConfigurationError, Conflict, NotFound
from worker.store import audit, credentials
from worker.store.database import Database

Row = dict[str, Any]
R = TypeVar("R", bound="Ring")

BATCH = 500


class Ring(Protocol):
    """The key ring, as far as it is needed here."""

    @property
    def key_ids(self) -> tuple[str, ...]: ...
    @property
    def sealing_key_id(self) -> str: ...
    def with_new_key(self) -> Self: ...
    def without(self, key_id: str) -> Self: ...
    def seal(self, secret: str, *, org_id: str, credential_id: str) -> tuple[bytes, str]: ...
    def unseal(self, sealed: bytes, key_id: str, *, org_id: str, credential_id: str) -> str: ...


@dataclass(frozen=True, slots=True)
class Rekeyed:
    """The key that seals now, whether it is new, how many secrets it took over, and how many do not open."""

    key_id: str
    is_new: bool
    resealed: int
    unopened: int


def list_keys(database: Database, ring: Ring | None) -> list[Row]:
    """A row a key, of the ring (None: there is none) and of the database, with the secrets that it seals."""
    with database.autocommit() as connection:
        counts = credentials.sealed_for_all_orgs(connection)
    ids = ring.key_ids if ring else ()
    lost = sorted(counts.keys() - set(ids))
    return [
        {
            "id": key_id,
            "in_ring": key_id in ids,
            "seals": ring is not None and key_id == ring.sealing_key_id,
            "active": counts.get(key_id, Counter())["active"],
            "retired": counts.get(key_id, Counter())["retired"],
        }
        for key_id in (*ids, *lost)
    ]


def check_ring(database: Database, ring: Ring | None, place: str) -> None:
    """Refuse to go on where the active secrets were sealed and none of their keys is at hand.

    Raises:
        ConfigurationError: the ring is missing, or another one.
    """
    rows = [row for row in list_keys(database, ring) if row["active"]]
    if rows and not any(row["in_ring"] for row in rows):
        count = sum(row["active"] for row in rows)
        raise ConfigurationError(
            f"the database has {count} sealed secrets, and none of the keys that seal them is in {place}",
            fix="put the key ring back; if it is lost for good, `keys generate --anew` makes another one,"
            " and each org needs its secret again (`credentials add`)",
        )


def add_key(database: Database, ring: R, *, actor: str) -> R:
    """Add a key, which seals from now on.

    Raises:
        ConfigurationError: the ring cannot be written.
    """
    ring = ring.with_new_key()
    with database.transaction() as connection:
        entry = audit.Entry(None, "key.add", ring.sealing_key_id)
        audit.record(connection, [entry], at=database.now(connection), actor=actor)
    return ring


def rekey(
    database: Database,
    ring: R,
    *,
    actor: str,
    batch: int = BATCH,
    tell: Callable[[int], None] = lambda resealed: None,
) -> Rekeyed:
    """Seal every secret with the newest key, adding one where the newest seals all of them already.

    In batches, a transaction each: whatever ends it, the same again goes on from there.
    Workers read the ring again when they meet the new key. `tell` is called with how many
    were done so far.

    Raises:
        ConfigurationError: the ring cannot be written.
    """
    with database.autocommit() as connection:
        older = credentials.sealed_for_all_orgs(connection).keys() & set(ring.key_ids[:-1])
    if not older:
        ring = add_key(database, ring, actor=actor)
    key_id = ring.sealing_key_id
    resealed = unopened = 0
    after: str | None = None
    while True:
        with database.transaction() as connection:
            rows = credentials.sealed_otherwise_for_all_orgs(connection, key_id, after=after, limit=batch)
            for row in rows:
                place = {"org_id": row["org_id"], "credential_id": row["id"]}
                try:
                    secret = ring.unseal(row["sealed"], row["key_id"], **place)
                except ConfigurationError:
                    # Its key is gone, or it is not this row's: no key makes that better.
                    unopened += 1
                    continue
                sealed, _ = ring.seal(secret, **place)
                credentials.reseal(connection, row["org_id"], row["id"], sealed, key_id)
                resealed += 1
        if not rows:
            return Rekeyed(key_id, not older, resealed, unopened)
        after = rows[-1]["id"]
        tell(resealed)


def remove_key(database: Database, ring: Ring, key_id: str, *, actor: str) -> None:
    """Take a key out of the ring that seals nothing any more.

    Raises:
        NotFound: the ring has no such key.
        Conflict: it still seals secrets, or it is the one that seals new ones.
    """
    if key_id not in ring.key_ids:
        raise NotFound(f"the key ring has no key {key_id}", fix="`keys list` names them")
    with database.transaction() as connection:
        count = credentials.sealed_for_all_orgs(connection).get(key_id, Counter()).total()
        if count:
            raise Conflict(f"the key {key_id} still seals {count} secrets", fix="run `keys rekey` first")
        ring.without(key_id)
        entry = audit.Entry(None, "key.remove", key_id)
        audit.record(connection, [entry], at=database.now(connection), actor=actor)
