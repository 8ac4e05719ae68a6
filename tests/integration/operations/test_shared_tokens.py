"""Shared tokens in the database: found, reserved and stored in batches; deleted with what they rest on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import DBAPIError

from tests.conftest import on_either
from tests.fakes.clock import ManualClock
from tests.fakes.rows import reading, within
from tests.integration.operations.conftest import Tables
from tests.integration.operations.test_keys import add_orgs
from worker.errors import NotFound
from worker.ids import ALL_ORGS, OrgId, new_id
from worker.model.orgs import OrgRef
from worker.operations.credentials import add_credential, retire_credential
from worker.operations.keys import drop_tokens, rekey, remove_key
from worker.operations.orgs import set_org_state
from worker.store import access_tokens, audit, credentials, roles, tables
from worker.store.access_tokens import Reservation
from worker.store.credentials import Use
from worker.store.database import Database
from worker.tokens.sealing import KeyRing
from worker.tokens.shared import Found, StoredToken, TokenRequest
from worker.wiring.secrets import StoredTokens

LASTS = 15.0


@pytest.fixture
def org_ids(database: Database, keyring: KeyRing, rows: Any) -> Iterator[list[OrgId]]:
    """Three orgs, each with a credential."""
    add_orgs(database, keyring, 3)
    yield [row["id"] for row in sorted(rows.orgs, key=lambda row: row["code"])]


def put(database: Database, rows: Any, keyring: KeyRing, *org_ids: OrgId, left: float = 3600) -> list[str]:
    """Store a token for each org's newest credential; returns the ids of what was stored."""
    tokens = []
    for org_id in org_ids:
        credential = max(
            (row for row in rows.credentials if row["org_id"] == org_id), key=lambda row: row["generation"]
        )
        sealed, key_id = keyring.seal_token(f"token of {org_id}", [org_id])
        tokens.append(
            {"id": f"key-{org_id}", "org_id": org_id, "issuer": "main", "credential_id": credential["id"]}
            | {"sealed": sealed, "key_id": key_id, "received_ago": 2.0, "left": left}
        )
    return sorted(within(database, access_tokens.put, tokens))


def find(database: Database, *org_ids: OrgId) -> dict[OrgId, access_tokens.Stored]:
    found = reading(database, access_tokens.find, [f"key-{org_id}" for org_id in org_ids])
    return {row.org_id: row for row in found if row.sealed is not None}


def reserve(database: Database, holder: str, *org_ids: OrgId, version: int = 0) -> set[str]:
    wanted = [Reservation(f"key-{org_id}", org_id, "main", version, LASTS) for org_id in org_ids]
    return within(database, access_tokens.reserve, wanted, holder=holder)


def test_what_was_stored_is_found_with_its_age(database, rows, keyring, org_ids, clock: ManualClock):
    put(database, rows, keyring, *org_ids)
    clock.advance(10)

    found = find(database, *org_ids)

    assert set(found) == set(org_ids)
    lives = reading(database, access_tokens.lives, [f"key-{org_id}" for org_id in org_ids])
    assert lives[f"key-{org_ids[0]}"] == pytest.approx((12, 3590), abs=1)
    assert len(lives) == len(org_ids)
    row = found[org_ids[0]]
    assert (row.version, row.key_id) == (1, keyring.sealing_key_id)
    assert row.age == pytest.approx(12, abs=1)
    assert row.left == pytest.approx(3590, abs=1)
    opened = keyring.open_token(row.sealed, row.key_id, [org_ids[0]])
    assert opened == f"token of {org_ids[0]}"


def test_of_two_tokens_for_one_key_in_a_batch_the_last_is_stored(database, rows, keyring, org_ids):
    put(database, rows, keyring, org_ids[0], org_ids[1], org_ids[0])
    put(database, rows, keyring, org_ids[0])

    assert {id_: row.version for id_, row in find(database, *org_ids).items()} == {
        org_ids[0]: 2,
        org_ids[1]: 1,
    }


def test_uses_of_credentials_are_counted_with_their_last_error(database, rows, org_ids, clock: ManualClock):
    ids = {row["org_id"]: row["id"] for row in rows.credentials}
    one, two = ((ids[org_id], org_id) for org_id in org_ids[:2])
    for uses in ([Use(*one, None), Use(*two, None), Use(*one, "invalid_client")], [Use(*two, None)], []):
        within(database, credentials.used, uses, at=clock.now())

    found = {row["org_id"]: (row["uses"], row["last_error"], row["last_used_at"]) for row in rows.credentials}
    assert found[org_ids[0]] == (2, "invalid_client", clock.now())
    assert found[org_ids[1]] == (2, None, clock.now())
    assert found[org_ids[2]] == (0, None, None)


def test_one_process_at_a_time_reserves_a_request(database, rows, keyring, org_ids, clock: ManualClock):
    first, second, third = org_ids
    assert reserve(database, "a", first, second) == {f"key-{first}", f"key-{second}"}

    assert reserve(database, "b", first, third) == {f"key-{third}"}
    clock.advance(LASTS)
    assert reserve(database, "b", first) == {f"key-{first}"}


@on_either
def test_a_reservation_can_be_renewed_and_released(database, rows, keyring, org_ids, clock: ManualClock):
    key = f"key-{org_ids[0]}"
    reserve(database, "a", org_ids[0])
    clock.advance(LASTS - 1)
    with database.transaction() as connection:
        access_tokens.renew(connection, [key], holder="b", lasts=timedelta(seconds=60))
        access_tokens.renew(connection, [key], holder="a", lasts=timedelta(seconds=LASTS))
    clock.advance(LASTS - 1)
    # Requests wait for the rate of the issuer for longer than a reservation that is not renewed.
    assert within(database, access_tokens.drop_expired, ALL_ORGS) == 0
    assert reserve(database, "b", org_ids[0]) == set()

    within(database, access_tokens.release, key, holder="b")
    assert reserve(database, "b", org_ids[0]) == set()
    within(database, access_tokens.release, key, holder="a")
    assert reserve(database, "b", org_ids[0]) == {key}


def test_a_request_is_not_reserved_once_a_token_was_stored(database, rows, keyring, org_ids):
    put(database, rows, keyring, org_ids[0])

    assert reserve(database, "b", org_ids[0], version=0) == set()
    assert reserve(database, "b", org_ids[0], version=1) == {f"key-{org_ids[0]}"}


def test_a_reservation_leaves_the_token_that_is_there(database, rows, keyring, org_ids):
    """It serves until the new one comes."""
    put(database, rows, keyring, org_ids[0])
    reserve(database, "a", org_ids[0], version=1)

    assert set(find(database, org_ids[0])) == {org_ids[0]}
    reserve(database, "one", org_ids[1])
    assert not reading(database, access_tokens.lives, [f"key-{org_ids[1]}"])


def test_many_processes_that_reserve_at_once_get_it_once(migrated_postgres_url, keyring, clock):
    database = Database.open(migrated_postgres_url, clock=clock, threads=8)
    add_orgs(database, keyring, 40)
    org_ids = [row["id"] for row in Tables(database).orgs]
    with ThreadPoolExecutor(8) as pool:
        # In another order each, which must not deadlock.
        orders = [org_ids[number:] + org_ids[:number] for number in range(0, 40, 5)]
        reserved = list(pool.map(lambda order: reserve(database, order[0], *order), orders))
    database.close()

    assert sum(map(len, reserved)) == len(set().union(*reserved)) == 40


def test_a_retired_credential_takes_its_tokens_along(database, rows, keyring, org_ids):
    first, second, _ = org_ids
    put(database, rows, keyring, first, second)

    retire_credential(database, "org_0", 1, actor="ops")

    assert set(find(database, *org_ids)) == {second}
    assert put(database, rows, keyring, first, second) == [f"key-{second}"]
    assert set(find(database, *org_ids)) == {second}


@pytest.mark.parametrize("state", ["suspended", "removed"])
def test_an_org_that_is_stopped_has_no_tokens(database, rows, keyring, org_ids, state):
    first, second, _ = org_ids
    put(database, rows, keyring, first, second)

    set_org_state(database, "org_0", state, actor="ops")

    assert put(database, rows, keyring, first) == []
    assert set(find(database, *org_ids)) == {second}


def test_a_paused_org_and_a_new_generation_keep_the_tokens(database, rows, keyring, org_ids):
    put(database, rows, keyring, *org_ids)

    set_org_state(database, "org_0", "paused", actor="ops")
    add_credential(database, keyring, "org_1", client_id="new", secret="another-secret", actor="ops")

    assert set(find(database, *org_ids)) == set(org_ids)


@on_either
def test_a_new_key_deletes_what_the_old_one_sealed(database, rows, keyring, org_ids):
    put(database, rows, keyring, *org_ids)

    done = rekey(database, keyring, actor="ops")

    assert find(database, *org_ids) == {}
    ring = KeyRing.load(keyring.path)
    put(database, rows, ring, *org_ids)
    put(database, rows, keyring, org_ids[0])
    remove_key(database, ring, keyring.sealing_key_id, actor="ops")
    found = find(database, *org_ids)
    assert {row.key_id for row in found.values()} == {done["key_id"]}
    assert set(found) == set(org_ids[1:])


@on_either
def test_tokens_drop_says_how_many(database, rows, keyring, org_ids):
    put(database, rows, keyring, *org_ids)

    assert drop_tokens(database, "org_1", actor="ops") == {"org": "org_1", "dropped": 1}
    assert drop_tokens(database, None, actor="ops") == {"org": None, "dropped": 2}
    assert find(database, *org_ids) == {}
    assert [row["action"] for row in rows.audit][-2:] == ["token.drop", "token.drop"]
    with pytest.raises(NotFound, match="org_9"):
        drop_tokens(database, "org_9", actor="ops")


@on_either
@pytest.mark.parametrize("org", ["org_1", None])
def test_tokens_are_dropped_with_their_audit_row_or_not_at_all(
    database, rows, keyring, org_ids, org, monkeypatch: pytest.MonkeyPatch
):
    put(database, rows, keyring, *org_ids)

    def dies(*given: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(audit, "note", dies)
    with pytest.raises(KeyboardInterrupt):
        drop_tokens(database, org, actor="ops")

    assert set(find(database, *org_ids)) == set(org_ids)


@on_either
def test_expired_tokens_are_deleted(database, rows, keyring, org_ids, clock: ManualClock):
    first, second, third = org_ids
    put(database, rows, keyring, first, left=60)
    put(database, rows, keyring, second)
    reserve(database, "a", third)
    clock.advance(61)

    assert within(database, access_tokens.drop_expired, ALL_ORGS) == 2
    assert [row["org_id"] for row in rows.access_tokens] == [second]


def test_no_role_of_the_web_side_reads_tokens(migrated_postgres_url, keyring, clock):
    """Not even of its own org; the worker's role does."""
    database = Database.open(migrated_postgres_url, clock=clock)
    add_orgs(database, keyring, 1)
    for scope in (roles.Scope.of_org(OrgId("0190b6a0-0000-7000-8000-000000000000")), roles.ALL_ORGS):
        with (
            pytest.raises(DBAPIError, match="permission denied for table access_tokens"),
            database.acting(scope).transaction() as connection,
        ):
            connection.execute(select(tables.access_tokens.c.sealed))
    database.close()


@on_either
async def test_a_token_that_is_reserved_twice_at_once_keeps_no_other_from_it(database, rows, org_ids):
    """A task that was cancelled may have asked before, for another version."""
    first, second = (
        TokenRequest("main", OrgRef(id_, id_), "https://api", frozenset({"read:kb"})) for id_ in org_ids[:2]
    )
    store = StoredTokens(database, str(new_id()))
    asked = ((first, 3), (first, 0), (second, 0))

    ours = await asyncio.gather(*(store.reserve(request, version, LASTS) for request, version in asked))

    assert ours == [False, True, True]
    assert {row["id"] for row in rows.access_tokens} == {first.id, second.id}


@on_either
async def test_a_worker_reserves_stores_and_finds_the_token_of_a_request(database, rows, org_ids):
    """By the id of its row, and only if that row is the org's own."""
    first, second, third = (
        TokenRequest("main", OrgRef(id_, id_), "https://api", frozenset({"read:kb"})) for id_ in org_ids
    )
    [credential] = [row["id"] for row in rows.credentials if row["org_id"] == first.org.id]
    store, other = StoredTokens(database, str(new_id())), StoredTokens(database, str(new_id()))

    assert await store.find(first) == Found()
    assert await store.reserve(first, 0, LASTS)
    assert not await other.reserve(first, 0, LASTS)
    await store.put(first, StoredToken(b"sealed", "key", credential, 2.0, 3600.0))

    version, token = await other.find(first)
    assert (version, token and token.sealed, token and token.credential_id) == (1, b"sealed", credential)
    assert set(await other.find_all([first, second, third])) == {first}
    assert (await other.lives([second, first])).keys() == {first}
    with database.transaction() as connection:
        tokens = tables.access_tokens
        connection.execute(update(tokens).values(org_id=second.org.id))
    assert await other.find(first) == Found()
    await other.drop(first)
    assert rows.access_tokens == []
