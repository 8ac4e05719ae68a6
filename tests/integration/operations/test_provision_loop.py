"""The loop of `provision`: rounds, scopes, the lock that others hold, and what a webhook starts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest

from tests.conftest import on_either
from tests.fakes.clock import ManualClock
from tests.fakes.issuer import AUDIENCE
from tests.fakes.management import MemoryManagement
from tests.fakes.provisioned import NIGHTLY, opened_checks
from worker.errors import ProviderRefused, ProviderUnavailable
from worker.features.provisioning import sync
from worker.features.provisioning.fleet import Fleet
from worker.features.provisioning.management.contract import Notice, NoticeKind
from worker.features.provisioning.provision_loop import COLLECT, NOTICE_AGAIN, ROUND_AGAIN, ProvisionLoop
from worker.features.provisioning.provisioning import Provisioner, exclusive
from worker.features.provisioning.scopes import Scopes
from worker.features.provisioning.sync import Absent, SyncRules
from worker.operations.installation import Ownership
from worker.store.database import Database
from worker.telemetry import events
from worker.tokens.sealing import KeyRing

EVERY = timedelta(minutes=15)
# What does not depend on the database is tested on one.


@dataclass
class Place:
    """An installation and its provider, whose time passes by `pass_`."""

    database: Database
    management: MemoryManagement
    provisioner: Provisioner
    clock: ManualClock
    heard: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def loop(
        self, *, absent: Absent = "keep", trim: bool = False, rotate_after: timedelta = timedelta()
    ) -> ProvisionLoop:
        rules = SyncRules("main", absent=absent)
        scopes = Scopes(self.provisioner, trim)
        return ProvisionLoop(self.provisioner, rules, ["main"], EVERY, scopes, self.new_fleet, rotate_after)

    def new_fleet(self) -> Fleet:
        return Fleet(self.provisioner, announce=timedelta(), overlap=timedelta(hours=1), per_second=1000)

    def notice(self, org: str, kind: NoticeKind = "org_created") -> Notice:
        return Notice(kind, org, self.clock.now())

    def names(self) -> list[str]:
        return [name for name, _ in self.heard]

    async def until(self, holds: Callable[[], bool], *, seconds: float = 0.0) -> None:
        """Let time pass, `seconds` at a time, until it holds."""
        for _ in range(400):
            if holds():
                return
            await asyncio.sleep(0.01)
            self.clock.advance(seconds)
        raise AssertionError(f"it does not hold; heard: {self.heard[-5:]}")


@pytest.fixture
async def place(database: Database, keyring: KeyRing, clock: ManualClock, apply: Any) -> AsyncIterator[Place]:
    apply(NIGHTLY + 'scopes = ["read:kb"]')
    async with opened_checks(database, keyring, clock) as (issuer, checks):
        management = MemoryManagement(issuer, {f"org_{letter}": letter.upper() for letter in "abcd"})
        provisioner = Provisioner(
            Ownership(database, ""), keyring, management, checks, "main", "provision", clock
        )
        made = Place(database, management, provisioner, clock)
        end = events.listen(lambda emitted: made.heard.append((emitted.event.name, dict(emitted.fields))))
        yield made
        end()


@pytest.fixture
def running(place: Place) -> Callable[[ProvisionLoop], Awaitable[Callable[[], Awaitable[None]]]]:
    """Start a loop and wait for its first round; returns what stops it."""

    async def start(loop: ProvisionLoop) -> Callable[[], Awaitable[None]]:
        stop = asyncio.Event()
        task = asyncio.create_task(loop.run(stop))
        await place.until(lambda: "provisioning.round" in place.names() or loop.doing == "waiting")

        async def end() -> None:
            stop.set()
            async with asyncio.timeout(5):
                await task

        return end

    return start


def scopes_of(place: Place) -> set[tuple[str, ...]]:
    return {tuple(sorted(made.audiences[AUDIENCE])) for made in place.management.made.values()}


@on_either
async def test_scopes_follow_the_definitions(place: Place, rows: Any, apply: Any) -> None:
    await place.loop().round()
    assert scopes_of(place) == {("read:kb",)}
    apply(NIGHTLY + 'scopes = ["read:kb", "write:kb"]')
    calls = len(place.management.calls)
    await place.loop().round()

    assert scopes_of(place) == {("read:kb", "write:kb")}
    # One request for the one new scope of each org; the list of orgs has two pages.
    assert sorted(place.management.calls[calls:]) == ["add_scopes"] * 4 + ["orgs"] * 2
    assert {tuple(row["scopes"][AUDIENCE]) for row in rows.applications} == {("read:kb", "write:kb")}
    changes = [fields for name, fields in place.heard if name == "application.scopes"]
    assert {(each["added"], each["removed"]) for each in changes} == {("write:kb", "")} and len(changes) == 4
    audited = [row for row in rows.audit if row["action"] == "application.scopes"]
    assert {row["actor"] for row in audited} == {"provision"} and len(audited) == 4

    apply(NIGHTLY + 'scopes = ["write:kb"]')
    await place.loop().round()
    assert scopes_of(place) == {("read:kb", "write:kb")}
    await place.loop(trim=True).round()
    assert scopes_of(place) == {("write:kb",)}
    settled = rows.everything()
    await place.loop(trim=True).round()
    assert rows.everything() == settled


async def test_a_refused_scope_is_an_error_of_its_org_until_it_is_given(
    place: Place, rows: Any, apply: Any
) -> None:
    await place.loop().round()
    apply(NIGHTLY + 'scopes = ["read:kb", "write:kb"]')
    refused = {"app-2"}

    def refuse(call: str) -> None:
        if call == "add_scopes" and refused:
            refused.pop()
            raise ProviderRefused("no such scope", detail="scope_unknown")

    place.management.before = refuse
    await place.loop().round()
    assert sum(row["last_error"] is not None for row in rows.applications) == 1
    [(_, failed)] = [each for each in place.heard if each[0] == "provisioning.failed"]
    assert failed["error"] == "provider_refused"
    await place.loop().round()
    assert [row["last_error"] for row in rows.applications] == [None] * 4
    assert scopes_of(place) == {("read:kb", "write:kb")}


@on_either
async def test_it_waits_while_another_process_provisions(place: Place, running: Any, rows: Any) -> None:
    loop = place.loop()
    with exclusive(Ownership(place.database, ""), "main"):
        end = await running(loop)
        loop.notify(place.notice("org_a"))
        await place.until(lambda: place.names().count("provisioning.waiting") == 1, seconds=5)
        assert loop.doing == "waiting" and rows.orgs == []
    await place.until(lambda: "provisioning.round" in place.names(), seconds=5)
    await end()
    assert len(rows.orgs) == 4 and len(place.management.made) == 4


async def test_it_ends_at_once_while_it_waits(place: Place, running: Any) -> None:
    with exclusive(Ownership(place.database, ""), "main"):
        end = await running(place.loop())
        await end()


async def test_a_new_org_is_read_again_until_the_provider_knows_it(
    place: Place, running: Any, rows: Any
) -> None:
    loop = place.loop()
    end = await running(loop)
    loop.notify(place.notice("org_new"))
    # Others do not wait for it.
    place.management.listed["org_e"] = "E"
    loop.notify(place.notice("org_e"))
    await place.until(lambda: len(place.management.made) == 5)
    place.management.listed["org_new"] = "New"
    await place.until(lambda: len(place.management.made) == 6, seconds=NOTICE_AGAIN[0])
    await place.until(lambda: loop.doing == "idle")
    await end()
    assert sorted(row["code"] for row in rows.orgs)[-2:] == ["org_e", "org_new"]
    assert {row["state"] for row in rows.applications} == {"active"}


async def test_a_failed_round_is_repeated_soon_and_is_an_alert(place: Place, running: Any) -> None:
    failing = True

    def fail(call: str) -> None:
        if failing:
            raise ProviderUnavailable("status 503")

    place.management.before = fail
    task_end = asyncio.create_task(running(place.loop()))
    await place.until(lambda: "provisioning.unavailable" in place.names())
    failing = False
    await place.until(lambda: "provisioning.round" in place.names(), seconds=ROUND_AGAIN)
    await (await task_end)()
    assert len(place.management.made) == 4


async def test_deletions_suspend_only_as_many_as_a_round_may(place: Place, running: Any, rows: Any) -> None:
    def states() -> dict[str, str]:
        return {row["code"]: row["state"] for row in rows.orgs}

    loop = place.loop(absent="suspend")
    end = await running(loop)
    for org in ("org_a", "org_b"):
        del place.management.listed[org]
        loop.notify(place.notice(org, "org_deleted"))
    await place.until(lambda: loop._soon.is_set() and loop.doing == "idle")
    await place.until(lambda: "provisioning.unavailable" in place.names(), seconds=COLLECT)
    assert set(states().values()) == {"active"}

    place.management.listed["org_a"] = "A"
    loop.notify(place.notice("org_b", "org_deleted"))
    await place.until(lambda: loop._soon.is_set() and loop.doing == "idle")
    await place.until(lambda: states()["org_b"] == "suspended", seconds=COLLECT)
    await end()
    assert states()["org_a"] == "active"


async def test_an_org_that_comes_while_the_list_is_read_is_not_taken_for_gone(
    place: Place, rows: Any
) -> None:
    loop = place.loop(absent="suspend")
    await loop.round()
    del place.management.listed["org_d"]
    listed = 0

    def come(call: str) -> None:
        nonlocal listed
        listed += call == "orgs"
        if listed == 1:
            listed += 1
            loop._newer.add("org_d")

    place.management.after = come
    await loop.round()
    assert {row["state"] for row in rows.orgs} == {"active"}
    # The control: without a webhook in between the org is gone.
    place.management.after = lambda call: None
    await loop.round()
    assert [row["code"] for row in rows.orgs if row["state"] == "suspended"] == ["org_d"]


async def test_an_org_that_another_process_adds_while_the_list_is_read_is_not_taken_for_gone(
    place: Place, rows: Any
) -> None:
    """A webhook may reach a second `provision`, or a person calls `orgs sync --org`."""
    loop, other = place.loop(absent="suspend"), place.loop(absent="suspend")
    await loop.round()
    page, place.management.listed["org_e"] = dict(place.management.listed), "E"
    read_orgs = sync.read_orgs

    async def read(management: Any, *args: Any, **kwargs: Any) -> list[sync.Listed]:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sync, "read_orgs", read_orgs)
            listed = [each for each in await read_orgs(management, *args) if each.org.code in page]
            place.clock.advance(1)
            async with other._turn():
                await other.follow(place.notice("org_e"))
        return listed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sync, "read_orgs", read)
        await loop.round()

    assert {row["code"]: row["state"] for row in rows.orgs}["org_e"] == "active"


async def test_old_credentials_are_rotated_across_restarts(place: Place, rows: Any) -> None:
    """The overlap of an hour is longer than a process that looks every 15 minutes may live."""
    await place.loop(rotate_after=timedelta(days=90)).round()
    before = set(place.management.made)

    async def rotate_for(span: timedelta) -> None:
        place.heard.clear()
        until = place.clock.monotonic() + span.total_seconds()
        rotating = asyncio.create_task(place.loop(rotate_after=timedelta(days=90)).rotate(until))
        while not rotating.done():
            await asyncio.sleep(0.005)
            place.clock.advance(15)
        await rotating

    await rotate_for(EVERY)
    assert set(place.management.made) == before
    place.clock.advance(timedelta(days=91))
    await rotate_for(EVERY)
    assert before < set(place.management.made) and len(place.management.made) == 8
    for _ in range(6):
        await rotate_for(EVERY)

    assert len(place.management.made) == 4 and not before & set(place.management.made)
    assert {row["state"] for row in rows.applications} == {"active", "deleted"}
    active = {row["client_id"] for row in rows.credentials if row["state"] == "active"}
    assert active == {made.app.client_id for made in place.management.made.values()}
    assert {row["actor"] for row in rows.audit if row["action"] == "application.delete"} == {"provision"}


@pytest.mark.parametrize("migrated_url", ["postgresql"], indirect=True)
async def test_a_lost_session_ends_the_lock_and_the_next_round_takes_it_again(
    place: Place, running: Any, rows: Any
) -> None:
    def end_sessions(call: str) -> None:
        if call == "make" and not place.names().count("provisioning.unavailable"):
            with place.database.autocommit() as connection:
                connection.exec_driver_sql(
                    "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
                    " AND granted AND pid <> pg_backend_pid()"
                    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
                )

    place.management.before = end_sessions
    starting = asyncio.create_task(running(place.loop()))
    await place.until(lambda: "provisioning.unavailable" in place.names())
    await place.until(lambda: "provisioning.round" in place.names(), seconds=ROUND_AGAIN)
    await (await starting)()

    assert [fields["error"] for name, fields in place.heard if name == "provisioning.unavailable"] == [
        "database_unavailable"
    ]
    assert len(place.management.made) == 4
    assert {row["state"] for row in rows.applications} == {"active"}
