"""What a process that runs does once another one has adopted its database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import pytest

from tests.conftest import on_either
from tests.fakes.clock import ManualClock
from tests.fakes.provisioned import Passing, Place, opened_place
from tests.fakes.rows import within
from worker.errors import InstallationMismatch
from worker.features.hosts.temporal import EngineUnavailable, Placer, Standing
from worker.features.hosts.temporal.placer import TemporalPlacer
from worker.features.hosts.temporal.wiring import ASK_AGAIN, OwnedPlacer
from worker.features.provisioning.fleet import Fleet
from worker.features.provisioning.management.contract import Notice
from worker.features.provisioning.provision_loop import ProvisionLoop
from worker.features.provisioning.scopes import Scopes
from worker.features.provisioning.sync import SyncRules
from worker.ids import RunId
from worker.model.runs.hosts import Placement, Ticket
from worker.operations.installation import Ownership, adopt
from worker.store import installation
from worker.store.database import Database
from worker.telemetry import events
from worker.tokens.sealing import KeyRing

RUN = Placement(RunId("0193abcd-0000-7000-8000-000000000000"), 1, "gpu", "child")
TICKET = Ticket.new(RUN.run_id, 1)


@pytest.fixture
def clock() -> Passing:
    return Passing()


@pytest.fixture
async def place(database: Database, keyring: KeyRing, clock: Passing, apply: Any) -> AsyncIterator[Place]:
    within(database, installation.store_word, "production")
    async with opened_place(database, keyring, clock, apply) as made:
        yield made


@pytest.fixture
def other(migrated_url: str, database: Database, clock: ManualClock) -> Iterator[Database]:
    """The database as another process has it."""
    opened = Database.open(migrated_url, clock=clock)
    yield opened
    opened.close()


@pytest.fixture
def heard() -> Iterator[list[tuple[str, Mapping[str, Any]]]]:
    found: list[tuple[str, Mapping[str, Any]]] = []
    end = events.listen(lambda emitted: found.append((emitted.event.name, dict(emitted.fields))))
    yield found
    end()


def loop_of(place: Place, word: str) -> ProvisionLoop:
    provisioner = place.provisioner(ownership=Ownership(place.database, word))
    fleet = Fleet(provisioner, announce=timedelta(), overlap=timedelta(), per_second=1000)
    return ProvisionLoop(
        provisioner,
        SyncRules("main", absent="keep"),
        ["main"],
        timedelta(hours=1),
        Scopes(provisioner, False),
        lambda: fleet,
        timedelta(),
    )


@pytest.mark.parametrize("how", ["same", "new", "none"])
async def test_a_running_loop_notices_the_adoption_at_its_next_turn(
    place: Place, other: Database, heard: Any, how: Any
) -> None:
    """The control, `none`: without an adoption it serves the org of the webhook."""
    loop = loop_of(place, "production")
    await loop.round()
    made = len(place.management.made)
    if how != "none":
        # By a process whose worker.toml has another word, or after it the same one again.
        adopt(other, "staging", how, actor="ops", issuers=["main"])
        if how == "new":
            within(other, installation.change_word, "production")

    place.management.listed["org_new"] = "New"
    notice = Notice("org_created", "org_new", place.clock.now())
    if how == "none":
        async with loop._turn():
            await loop.follow(notice)
        assert len(place.management.made) == made + 1
        return
    with pytest.raises(InstallationMismatch):
        async with loop._turn():
            await loop.follow(notice)
    with pytest.raises(InstallationMismatch):
        await loop.round()
    with pytest.raises(InstallationMismatch):
        await loop.rotate(place.clock.monotonic() + 1)
    assert len(place.management.made) == made
    # It goes on where the process is started again with the word.
    await loop_of(place, "production" if how == "new" else "staging").round()
    assert len(place.management.made) > made or how == "new"


async def test_a_loop_that_is_refused_says_so_and_goes_on(place: Place, other: Database, heard: Any) -> None:
    loop = loop_of(place, "staging")
    stop = asyncio.Event()
    running = asyncio.create_task(loop.run(stop))
    for _ in range(500):
        if "provisioning.unavailable" in dict(heard):
            break
        await asyncio.sleep(0.01)
    said = dict(heard)["provisioning.unavailable"]
    assert said["error"] == "installation_mismatch" and "production" in said["detail"]
    assert not running.done() and place.management.made == {}

    adopt(other, "staging", "same", actor="ops", issuers=["main"])
    for _ in range(500):
        if len(place.management.made) == 8:
            break
        await asyncio.sleep(0.01)
    assert len(place.management.made) == 8
    stop.set()
    await running


class Engine:
    """A placer that keeps what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def place(self, placement: Placement, ticket: Ticket) -> None:
        self.asked.append("place")

    async def withdraw(self, placement: Placement) -> None:
        self.asked.append("withdraw")

    async def describe(self, placement: Placement) -> Standing:
        self.asked.append("describe")
        return "queued"

    async def check(self) -> None:
        self.asked.append("check")


ACTS: dict[str, Callable[[Placer], Awaitable[object]]] = {
    "place": lambda placer: placer.place(RUN, TICKET),
    "withdraw": lambda placer: placer.withdraw(RUN),
    "describe": lambda placer: placer.describe(RUN),
    "check": lambda placer: placer.check(),
}


def test_each_act_of_a_placer_is_tried() -> None:
    assert set(ACTS) == {name for name in vars(Placer) if not name.startswith("_")}


@pytest.mark.parametrize("act", ACTS)
async def test_a_copy_asks_nothing_of_the_engine_that_it_shares(
    database: Database, clock: Passing, act: str
) -> None:
    """The control: with the word of the database the engine is asked."""
    with database.transaction() as connection:
        installation.store_word(connection, "production")
        key = installation.key_of(connection)
    engine = Engine()

    copy = OwnedPlacer(engine, Ownership(database, "staging", key=key), clock)
    with pytest.raises(EngineUnavailable, match="belongs to"):
        await ACTS[act](copy)
    assert engine.asked == []

    await ACTS[act](OwnedPlacer(engine, Ownership(database, "production", key=key), clock))
    assert engine.asked == [act]


@on_either
async def test_a_placer_notices_an_adoption_within_a_second(
    database: Database, other: Database, clock: Passing
) -> None:
    key = within(database, installation.key_of)
    engine = Engine()
    placer = OwnedPlacer(engine, Ownership(database, "staging", key=key), clock)
    await placer.place(RUN, TICKET)

    adopt(other, "staging", "new", actor="ops", issuers=[])
    clock.advance(ASK_AGAIN)
    with pytest.raises(EngineUnavailable, match="since this process began"):
        await placer.place(RUN, TICKET)

    assert engine.asked == ["place"]


async def test_a_copy_has_the_activities_of_production_until_it_is_adopted(
    database: Database, other: Database
) -> None:
    """Why a copy must not place: with the same key, its withdrawal would cancel production's activity."""

    def activity() -> str:
        key = within(database, installation.key_of)
        placer = TemporalPlacer("h:7233", "n", installation=key, place_timeout=timedelta(), identity="")
        return placer._id(RUN)

    production = activity()
    assert activity() == production

    adopt(other, "staging", "new", actor="ops", issuers=[])

    assert activity() != production


@on_either
async def test_two_first_calls_make_one_key(database: Database, other: Database) -> None:
    """The later one must not replace a key that has names already."""
    keys: list[str] = []
    for each in (database, other):
        keys.append(within(each, installation.key_of))

    assert len(set(keys)) == 1 and keys[0]


@on_either
async def test_locks_are_taken_together_or_not_at_all(database: Database, other: Database) -> None:
    """Adopting holds the lock of every issuer; one that another process holds leaves the rest free."""
    with database.exclusively("provisioning-b"):
        with other.exclusively("provisioning-a", "provisioning-b") as held:
            assert not held
        with other.exclusively("provisioning-a") as held:
            assert held
            with database.exclusively("provisioning-c", "provisioning-a") as both:
                assert not both
    with (
        other.exclusively("provisioning-a", "provisioning-b") as held,
        database.exclusively("provisioning-b") as second,
    ):
        assert held and not second
    with database.exclusively() as held:
        assert held
