"""Orgs from the provider, and an application for each: nothing is made twice, whatever interrupts it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.conftest import on_either
from tests.fakes.issuer import AUDIENCE
from tests.fakes.provisioned import Killed, Passing, Place, opened_place
from worker.errors import Busy, Conflict, ForeignApplication, ProviderUnavailable, Unclear
from worker.features.provisioning import sync
from worker.features.provisioning.provisioning import exclusive
from worker.model.provider import parse_rules
from worker.operations.installation import Ownership
from worker.operations.orgs import set_org_state
from worker.store.database import Database
from worker.tokens.sealing import KeyRing


@pytest.fixture
def clock() -> Passing:
    return Passing()


@pytest.fixture
async def place(database: Database, keyring: KeyRing, clock: Passing, apply: Any) -> AsyncIterator[Place]:
    async with opened_place(database, keyring, clock, apply) as opened:
        yield opened


def check_one_each(place: Place, rows: Any) -> None:
    """Each org has one application at the provider, which its one active credential names."""
    active = [row for row in rows.credentials if row["state"] == "active"]
    assert len(active) == len(rows.orgs) == len(place.management.made)
    codes = {row["id"]: row["code"] for row in rows.orgs}
    clients = {row["client_id"]: codes[row["org_id"]] for row in active}
    assert clients == {made.app.client_id: made.app.org_code for made in place.management.made.values()}
    assert {row["state"] for row in rows.applications} == {"active"}


async def test_every_org_of_the_provider_gets_a_verified_credential(place: Place, rows: Any) -> None:
    synced = await place.sync()
    results = await place.provision()

    assert {row["org"]: row["changes"] for row in synced.values()} == {
        code: ["added"] for code in place.management.listed
    }
    assert [result.error for result in results.values()] == [None] * 8
    check_one_each(place, rows)
    assert {tuple(made.audiences[AUDIENCE]) for made in place.management.made.values()} == {("read:kb",)}
    # Of one org: made, authorised, one scope, one token. Three pages of orgs.
    calls = place.management.calls
    assert {call: calls.count(call) for call in calls} == {
        "orgs": 3,
        "make": 8,
        "authorise": 8,
        "add_scopes": 8,
    }
    assert place.management.issuer.count() == 8


async def test_a_second_call_makes_nothing(place: Place, rows: Any) -> None:
    await place.sync()
    await place.provision()
    before = rows.everything()

    assert await place.sync() == {}
    assert await place.provision() == {}
    assert rows.everything() == before


async def test_a_second_provisioner_is_refused(place: Place) -> None:
    with exclusive(Ownership(place.database, ""), "main"), pytest.raises(Busy, match="another process"):
        await place.provision()
    await place.provision()


@pytest.mark.parametrize("seed", range(3))
async def test_it_goes_on_wherever_it_was_killed(place: Place, rows: Any, seed: int) -> None:
    rng = random.Random(seed)
    await place.sync()
    for _ in range(8):
        await place.kill_in(place.provision, rng)
    await place.provision()

    check_one_each(place, rows)


async def test_a_list_that_contradicts_itself_makes_no_second_application(
    place: Place, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(call: str) -> None:
        if call == "make":
            raise Killed

    async def unknown(*_: object, **__: object) -> None:
        return None

    await place.sync("org_a")
    place.management.after = cut
    with pytest.raises(BaseException, match="Killed|unhandled"):
        await place.provision()
    place.management.after = lambda call: None
    with monkeypatch.context() as patched:
        patched.setattr(place.management, "application", unknown)
        results = await place.provision()
    assert isinstance(results["org_a"].error, Unclear)
    assert len(place.management.made) == 1

    await place.provision()
    check_one_each(place, rows)


@pytest.mark.parametrize("is_carried_out", [True, False])
async def test_an_unclear_request_makes_no_second_application(
    place: Place, rows: Any, is_carried_out: bool
) -> None:
    rng = random.Random(7)

    def may_fail(call: str) -> None:
        if call != "applications" and rng.random() < 0.3:
            raise Unclear(f"{call} was cut off")

    await place.sync()
    setattr(place.management, "after" if is_carried_out else "before", may_fail)
    for _ in range(4):
        await place.provision()
    place.management.after = place.management.before = lambda call: None
    results = await place.provision()

    assert all(result.error is None for result in results.values())
    check_one_each(place, rows)


async def test_one_org_that_fails_stops_no_other(place: Place, rows: Any) -> None:
    def fail(call: str) -> None:
        if call == "make" and len(place.management.made) == 2:
            place.management.before = lambda call: None
            raise ProviderUnavailable("the provider failed")

    await place.sync()
    place.management.before = fail
    results = await place.provision()

    failed = [org for org, result in results.items() if result.error is not None]
    assert len(failed) == 1 and len(results) == 8
    (row,) = (row for row in rows.applications if row["state"] == "making")
    assert row["last_error"] == "the provider failed"
    assert (await place.provision())[failed[0]].error is None
    check_one_each(place, rows)


async def test_a_token_of_another_org_activates_nothing(place: Place, rows: Any) -> None:
    await place.sync()
    place.management.after = lambda call: (
        [made.app.replace.update(org_code="org_b") for made in place.management.made.values()] and None
    )
    results = await place.provision("org_a")

    assert "org_b" in str(results["org_a"].error)
    assert [row["state"] for row in rows.credentials] == ["pending"]
    assert "secret-1" not in str(results) + str(rows.applications) + str(rows.audit)


async def test_the_application_of_another_org_is_refused(place: Place, rows: Any) -> None:
    await place.sync()
    await place.provision("org_a")
    place.management._count = 0  # It answers with app-1 again, which is org_a's.
    made = place.management.made["app-1"]
    results = await place.provision("org_b")

    assert isinstance(results["org_b"].error, ForeignApplication)
    assert [row["state"] for row in rows.credentials] == ["active"]
    assert made is not place.management.made["app-1"]


@on_either
async def test_an_org_is_renamed_and_tagged_and_keeps_its_own_tags(place: Place, rows: Any) -> None:
    place.management.listed = {"org_a": "Acme"}
    place.management.tags = {"org_a": {"plan": "pro", "eu": True}}
    tags = parse_rules({"pro": "properties.plan=pro", "free": "properties.plan=free", "eu": "properties.eu"})
    await place.sync(tags=tags)
    assert rows.orgs[0]["tags"] == ["eu", "pro"]

    place.management.listed = {"org_a": "Acme Ltd"}
    place.management.tags = {"org_a": {"plan": "free"}}
    changed = await place.sync(tags=tags)

    assert changed["org_a"]["changes"] == ["renamed", "tagged"]
    assert (rows.orgs[0]["name"], rows.orgs[0]["tags"]) == ("Acme Ltd", ["free"])


async def test_orgs_that_are_gone_are_kept_unless_asked(place: Place, rows: Any) -> None:
    await place.sync()
    del place.management.listed["org_h"]

    assert await place.sync() == {}
    assert (await place.sync(absent="suspend"))["org_h"]["changes"] == ["suspended"]
    place.management.listed["org_h"] = "H"
    assert (await place.sync())["org_h"]["changes"] == ["resumed"]


async def test_an_org_that_was_paused_is_paused_again(place: Place, rows: Any) -> None:
    await place.sync()
    set_org_state(place.database, "org_h", "paused", actor="ops", note="a migration")
    name = place.management.listed.pop("org_h")
    await place.sync(absent="suspend")
    place.management.listed["org_h"] = name
    await place.sync()

    assert next(row["state"] for row in rows.orgs if row["code"] == "org_h") == "paused"


async def test_one_org_is_suspended_only_if_the_list_lacks_it_too(place: Place, rows: Any) -> None:
    await place.sync()
    # As Kinde answers for an org that it does not know, and perhaps for other reasons.
    place.management.hidden = {"org_h"}

    assert await place.sync("org_h", absent="suspend") == {}
    del place.management.listed["org_h"]
    assert (await place.sync("org_h", absent="suspend"))["org_h"]["changes"] == ["suspended"]


async def test_only_an_org_that_sync_suspended_is_resumed(place: Place, rows: Any) -> None:
    await place.sync()
    set_org_state(place.database, "org_a", "suspended", actor="ops", note="owes us")

    assert await place.sync(absent="suspend") == {}
    assert next(row["state"] for row in rows.orgs if row["code"] == "org_a") == "suspended"


async def test_an_org_that_a_person_suspended_while_it_was_gone_stays_suspended(
    place: Place, rows: Any
) -> None:
    await place.sync()
    name = place.management.listed.pop("org_h")
    await place.sync(absent="suspend")
    set_org_state(place.database, "org_h", "suspended", actor="ops", note="owes us")
    place.management.listed["org_h"] = name

    assert await place.sync() == {}
    org = next(row for row in rows.orgs if row["code"] == "org_h")
    assert (org["state"], org["state_by"], org["state_note"]) == ("suspended", "ops", "owes us")


async def test_what_a_person_does_after_the_orgs_were_compared_stays(place: Place, rows: Any) -> None:
    await place.sync()
    name = place.management.listed.pop("org_h")
    await place.sync(absent="suspend")
    place.management.listed["org_h"] = name
    del place.management.listed["org_g"]
    rules = sync.SyncRules("main", absent="suspend")
    listed = await sync.read_orgs(place.management, rules, None)
    made = sync.planned(place.database, listed, rules, None)
    for code in ("org_g", "org_h"):
        set_org_state(place.database, code, "paused", actor="ops", note="a migration")

    assert sync.apply(place.database, made, rules, actor="ops", issuers=["main"]) == []
    assert {row["state"] for row in rows.orgs if row["code"] in ("org_g", "org_h")} == {"paused"}
    await place.sync(absent="suspend")
    place.management.listed["org_g"] = "G"
    await place.sync()
    assert {row["state"] for row in rows.orgs if row["code"] in ("org_g", "org_h")} == {"paused"}


async def test_too_many_that_are_gone_suspend_nobody(place: Place, rows: Any) -> None:
    await place.sync()
    for code in ("org_g", "org_h"):
        del place.management.listed[code]
    place.management.listed["org_a"] = "Renamed"

    with pytest.raises(Conflict, match="2 of 8 orgs"):
        await place.sync(absent="suspend")

    assert {row["state"] for row in rows.orgs} == {"active"}
    assert next(row["name"] for row in rows.orgs if row["code"] == "org_a") == "Renamed"
    await place.sync(absent="suspend", most_suspended=None)
    assert sorted(row["state"] for row in rows.orgs).count("suspended") == 2


@on_either
async def test_an_empty_or_broken_list_changes_nothing(place: Place, rows: Any) -> None:
    await place.sync()
    before = rows.everything()

    def break_off(call: str) -> None:
        if place.management.calls.count("orgs") > 4:
            raise ProviderUnavailable("cut off")

    place.management.before = break_off
    with pytest.raises(ProviderUnavailable, match="cut off"):
        await place.sync(absent="suspend", most_suspended=None)
    place.management.before = lambda call: None
    place.management.listed = {}
    with pytest.raises(ProviderUnavailable, match="lists no orgs"):
        await place.sync(absent="suspend", most_suspended=None)

    assert rows.everything() == before
