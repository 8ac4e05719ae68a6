"""Rotation of the fleet: each org gets a second application, and the first one ends, in spite of any kill."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from tests.conftest import on_either
from tests.fakes.issuer import AUDIENCE, App
from tests.fakes.provisioned import Passing, Place, opened_place
from worker.errors import Conflict, ForeignApplication, ProviderUnavailable
from worker.features.provisioning.fleet import Fleet, Rotated
from worker.features.provisioning.provisioning import exclusive
from worker.operations.credentials import add_credential, retire_credential
from worker.operations.installation import Ownership
from worker.operations.orgs import set_org_state
from worker.operations.runs import run_now
from worker.store import credentials
from worker.store.database import Database
from worker.tokens.sealing import KeyRing

# What does not depend on the database is tested on one.


OLD = timedelta(days=90)
OVERLAP = timedelta(minutes=5)
ORGS = [f"org_{letter}" for letter in "abcd"]


@pytest.fixture
def clock() -> Passing:
    return Passing()


@pytest.fixture
async def place(database: Database, keyring: KeyRing, clock: Passing, apply: Any) -> AsyncIterator[Place]:
    """Four orgs, each with an application that orgworker made 91 days ago."""
    async with opened_place(database, keyring, clock, apply) as opened:
        opened.management.listed = {org: org.upper() for org in ORGS}
        await opened.sync()
        await opened.provision()
        clock.advance(timedelta(days=91))
        yield opened


def fleet(place: Place, *, announce: timedelta = timedelta(), overlap: timedelta = OVERLAP) -> Fleet:
    return Fleet(place.provisioner(), announce, overlap, per_second=10)


async def rotate(place: Place, *, limit: int | None = None, **spans: timedelta) -> dict[str, Rotated]:
    """Rotate as the command does; it ends when all is over."""
    with exclusive(Ownership(place.database, ""), "main"):
        made = fleet(place, **spans)
        chosen, _ = made.candidates(OLD, limit)
        return {each.org: each for each in await made.rotate(chosen)}


async def go_on(place: Place, made: Fleet, span: timedelta) -> None:
    """Do what is due within this span."""
    until = place.clock.now() + span
    while place.clock.now() < until:
        seconds = await made.advance()
        place.clock.advance(15.0 if seconds is None else max(1.0, seconds))


def began(place: Place, org: str, **spans: timedelta) -> Fleet:
    """The rotation of one org, before its first step."""
    made = fleet(place, **spans)
    made.choose([each for each in made.candidates(OLD)[0] if each["org"] == org])
    return made


def states(rows: Any, org: str) -> list[str]:
    [org_id] = [row["id"] for row in rows.orgs if row["code"] == org]
    mine = sorted((row for row in rows.applications if row["org_id"] == org_id), key=lambda row: row["id"])
    return [row["state"] for row in mine]


def generations(rows: Any, org: str) -> list[str]:
    [org_id] = [row["id"] for row in rows.orgs if row["code"] == org]
    mine = [row for row in rows.credentials if row["org_id"] == org_id]
    return [row["state"] for row in sorted(mine, key=lambda row: row["generation"])]


def clients_of(place: Place, org: str) -> list[str]:
    return [made.app.client_id for made in place.management.made.values() if made.app.org_code == org]


def check_rotated(place: Place, rows: Any, orgs: list[str] = ORGS) -> None:
    """Each org has one application at the provider, a second one, which its only active credential names."""
    codes = {row["id"]: row["code"] for row in rows.orgs}
    for org in orgs:
        active = [
            row["client_id"]
            for row in rows.credentials
            if codes[row["org_id"]] == org and row["state"] == "active"
        ]
        assert active == clients_of(place, org) and len(active) == 1, org
        assert states(rows, org)[-1] == "active" and set(states(rows, org)[:-1]) == {"deleted"}, org


def check_each_can_work(place: Place, rows: Any) -> None:
    """The credentials that workers may use are known to the issuer, and each org has one."""
    codes = {row["id"]: row["code"] for row in rows.orgs}
    active = [row for row in rows.credentials if row["state"] == "active"]
    assert {codes[row["org_id"]] for row in active} == set(ORGS)
    assert {row["client_id"] for row in active} <= set(place.management.issuer.apps)


async def test_each_org_moves_to_an_application_with_the_same_scopes_and_properties(
    place: Place, rows: Any, emitted: Any
) -> None:
    for number, made in place.management.made.items():
        made.app.properties = {"plan": number, "beta": True}
        made.audiences[AUDIENCE].add("write:kb")
    before = {made.app.org_code: made.app for made in place.management.made.values()}
    start = place.clock.now()
    results = await rotate(place)

    check_rotated(place, rows)
    for made in place.management.made.values():
        old = before[made.app.org_code]
        assert made.app.client_id != old.client_id and made.app.properties == old.properties
        assert made.audiences == {AUDIENCE: {"read:kb", "write:kb"}}
        result = results[made.app.org_code]
        assert (result.replaces, result.client_id) == (old.client_id, made.app.client_id)
        assert result.is_over and result.error is None
    assert OVERLAP <= place.clock.now() - start < 2 * OVERLAP
    assert [one.event.name for one in emitted if one.fields.get("org") == "org_a"] == [
        *("application.made", "credential.pending", "credential.activated", "application.deleted"),
    ]
    [org_id] = [row["id"] for row in rows.orgs if row["code"] == "org_a"]
    trail = sorted(rows.audit, key=lambda row: row["id"])
    audit = [row["action"] for row in trail if row["org_id"] == org_id]
    assert [action for action in audit if not action.startswith(("org.", "definition."))] == [
        *("application.make", "credential.add"),
        *("application.make", "credential.announce", "credential.add"),
        *("credential.retire", "application.delete"),
    ]


async def test_only_old_ones_that_orgworker_made_are_rotated_oldest_first(
    place: Place, rows: Any, keyring: KeyRing
) -> None:
    place.management.issuer.add(App("org_a", "by-hand", "secret"))
    add_credential(place.database, keyring, "org_a", client_id="by-hand", secret="secret", actor="ops")
    place.management.listed["org_new"] = "New"
    await place.sync()
    await place.provision()
    set_org_state(place.database, "org_b", "suspended", actor="ops", note="owes us")
    made = fleet(place)

    chosen, by_hand = made.candidates(OLD)
    assert {each["org"] for each in chosen} == {"org_c", "org_d"}
    assert by_hand == 0
    place.clock.advance(OLD)
    oldest, by_hand = made.candidates(OLD, limit=1)
    assert oldest == chosen[:1] and by_hand == 1
    assert set(await rotate(place, limit=2)) == {"org_c", "org_d"}
    check_rotated(place, rows, ["org_c", "org_d"])
    assert states(rows, "org_new") == ["active"]


@on_either
@pytest.mark.parametrize("seed", range(3))
async def test_it_goes_on_wherever_it_was_killed(place: Place, rows: Any, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(6):
        announce = timedelta(minutes=rng.randrange(3))
        await place.kill_in(partial(rotate, place, announce=announce), rng)
        check_each_can_work(place, rows)
    results = await rotate(place)

    assert all(result.error is None for result in results.values())
    check_rotated(place, rows)
    assert all(len(states(rows, org)) == 2 for org in ORGS)


@on_either
async def test_a_new_client_is_announced_before_it_is_used(place: Place, rows: Any, emitted: Any) -> None:
    made = began(place, "org_a", announce=timedelta(days=2))
    await go_on(place, made, timedelta(seconds=5))

    assert states(rows, "org_a") == ["active", "announced"]
    assert generations(rows, "org_a") == ["active", "pending"]
    [pending] = [one.fields for one in emitted if one.event.name == "credential.pending"]
    assert (pending["org"], pending["client"]) == ("org_a", clients_of(place, "org_a")[1])
    assert pending["seconds"] == 2 * 86400
    place.clock.advance(timedelta(days=2))
    await go_on(place, fleet(place), timedelta(seconds=5))
    assert generations(rows, "org_a") == ["active", "active"]
    assert states(rows, "org_a") == ["overlapping", "active"]


@on_either
async def test_an_old_token_in_use_keeps_its_application(place: Place, rows: Any) -> None:
    """Until the run has ended, or the token has expired."""
    tokens = {}
    for org in ("org_a", "org_b"):
        [org_id] = [row["id"] for row in rows.orgs if row["code"] == org]
        [used] = [row for row in rows.credentials if row["org_id"] == org_id]
        with place.database.transaction() as connection:
            credentials.used(connection, [credentials.Use(used["id"], org_id, None)], at=place.clock.now())
        tokens[org] = run_now(place.database, org, "nightly", actor="ops")["id"]
        rows.set_running(tokens[org])
    made = fleet(place, overlap=timedelta())
    made.choose([each for each in made.candidates(OLD)[0] if each["org"] in tokens])

    await go_on(place, made, timedelta(seconds=40))
    assert states(rows, "org_a") == states(rows, "org_b") == ["retired", "active"]
    assert generations(rows, "org_a") == ["retired", "active"]
    rows.set_ended(tokens["org_a"], "succeeded", None)
    await go_on(place, made, timedelta(seconds=3))
    assert states(rows, "org_a") == ["deleted", "active"]
    # One that begins now has a token of the new one.
    rows.set_running(run_now(place.database, "org_a", "nightly", actor="ops")["id"])
    place.clock.advance(timedelta(days=1, minutes=1))
    await go_on(place, made, timedelta(seconds=3))
    assert states(rows, "org_b") == ["deleted", "active"]


async def test_an_org_that_is_removed_or_suspended_meanwhile(place: Place, rows: Any) -> None:
    made = fleet(place, announce=OVERLAP)
    chosen, _ = made.candidates(OLD)
    made.choose([each for each in chosen if each["org"] in ("org_a", "org_b", "org_c")])
    await go_on(place, made, timedelta(seconds=5))
    set_org_state(place.database, "org_a", "removed", actor="ops")
    set_org_state(place.database, "org_b", "suspended", actor="ops", note="owes us")
    await go_on(place, made, timedelta(minutes=1))
    assert states(rows, "org_a") == ["active", "deleted"]
    await go_on(place, made, OVERLAP)
    set_org_state(place.database, "org_c", "removed", actor="ops")
    await go_on(place, made, 2 * OVERLAP)

    assert states(rows, "org_b") == states(rows, "org_c") == ["deleted", "active"]
    assert all(result.error is None and result.is_over for result in made.results.values())


async def test_an_old_application_that_was_deleted_by_hand(place: Place, rows: Any) -> None:
    [client] = clients_of(place, "org_a")
    [id] = [id for id, made in place.management.made.items() if made.app.client_id == client]
    del place.management.made[id], place.management.issuer.apps[client]

    results = await rotate(place)

    assert results["org_a"].error is None
    check_rotated(place, rows)
    assert place.management.made[f"app-{len(ORGS) + 1}"].audiences == {AUDIENCE: {"read:kb"}}


async def test_a_pending_credential_that_was_retired_by_hand_is_replaced(place: Place, rows: Any) -> None:
    made = began(place, "org_a", announce=OVERLAP)
    await go_on(place, made, timedelta(seconds=5))
    retire_credential(place.database, "org_a", 2, actor="ops")

    await rotate(place)

    assert generations(rows, "org_a") == ["retired", "retired", "active"]
    check_rotated(place, rows)


async def test_a_new_application_that_is_gone_at_the_provider_is_replaced(place: Place, rows: Any) -> None:
    def lose(call: str) -> None:
        if call == "authorise":
            place.management.before = lambda call: None
            id = max(place.management.made, key=lambda id: int(id.partition("-")[2]))
            del place.management.issuer.apps[place.management.made.pop(id).app.client_id]

    place.management.before = lose
    [result] = (await rotate(place, limit=1)).values()

    assert result.error is None
    check_rotated(place, rows, [result.org])
    assert states(rows, result.org) == ["deleted", "deleted", "active"]


async def test_the_old_one_stays_while_the_new_one_is_rejected(place: Place, rows: Any) -> None:
    made = began(place, "org_a")
    await go_on(place, made, timedelta(seconds=5))
    [org_id] = [row["id"] for row in rows.orgs if row["code"] == "org_a"]
    newest = max(
        (row for row in rows.credentials if row["org_id"] == org_id), key=lambda row: row["generation"]
    )
    with place.database.transaction() as connection:
        credentials.used(
            connection, [credentials.Use(newest["id"], org_id, "invalid_client")], at=place.clock.now()
        )
    await go_on(place, made, 2 * OVERLAP)

    assert isinstance(made.results["org_a"].error, Conflict)
    assert "invalid_client" in str(made.results["org_a"].error)
    assert states(rows, "org_a") == ["overlapping", "active"]
    assert generations(rows, "org_a") == ["active", "active"]
    with place.database.transaction() as connection:
        credentials.used(connection, [credentials.Use(newest["id"], org_id, None)], at=place.clock.now())
    await rotate(place, limit=0)
    check_rotated(place, rows, ["org_a"])


async def test_a_new_one_that_was_retired_in_the_overlap_is_replaced(place: Place, rows: Any) -> None:
    made = began(place, "org_a")
    await go_on(place, made, timedelta(seconds=5))
    retire_credential(place.database, "org_a", 2, actor="ops", now=True)
    await go_on(place, made, 2 * OVERLAP)

    assert generations(rows, "org_a") == ["active", "retired"]
    assert "stays in use" in str(made.results["org_a"].error)
    await rotate(place)
    check_rotated(place, rows)


async def test_a_leaked_secret_is_replaced_by_another_application(place: Place, rows: Any) -> None:
    for made in place.management.made.values():
        made.app.properties = {"plan": "pro"}
    retire_credential(place.database, "org_a", 1, actor="ops", now=True)
    assert (await place.provision())["org_a"].error is None

    assert states(rows, "org_a") == ["overlapping", "active"]
    await rotate(place, limit=0)
    check_rotated(place, rows, ["org_a"])
    assert [made.app.properties for made in place.management.made.values()] == [{"plan": "pro"}] * 4


async def test_one_org_that_fails_stops_no_other(place: Place, rows: Any) -> None:
    def fail(call: str) -> None:
        if call == "delete":
            place.management.before = lambda call: None
            raise ProviderUnavailable("the provider failed")

    place.management.before = fail
    results = await rotate(place)

    [failed] = [org for org, result in results.items() if result.error is not None]
    [row] = [row for row in rows.applications if row["state"] == "retired"]
    assert row["last_error"] == "the provider failed"
    assert set(await rotate(place)) == {failed}
    check_rotated(place, rows)


async def test_an_application_of_another_name_is_not_deleted(place: Place, rows: Any) -> None:
    [(id, old)] = [each for each in place.management.made.items() if each[1].app.org_code == "org_a"]
    made = began(place, "org_a")
    await go_on(place, made, timedelta(seconds=5))
    old.name = "orgworker elsewhere 0190 org_b"
    await go_on(place, made, 2 * OVERLAP)

    assert isinstance(made.results["org_a"].error, ForeignApplication)
    assert place.management.made[id] is old
    assert states(rows, "org_a") == ["retired", "active"]
