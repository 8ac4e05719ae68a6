"""Late definitions, from firing to the morning page: found once, and late until they are done."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from tests.fakes.clock import utc
from tests.fakes.timeline import NAME, ORG, Timeline
from worker.diagnosis.deadlines import odd_deadlines
from worker.diagnosis.matters import overview
from worker.ids import ALL_ORGS
from worker.model.runs.preview import preview_definition
from worker.operations.chores import Chores
from worker.operations.definitions import edit_definition, pause_definition, resume_definition
from worker.operations.orgs import set_org_state
from worker.operations.runs import retry, run_now
from worker.store import tables
from worker.store.lists import DEFINITIONS, ORGS, Page
from worker.store.lists.read import definition, read
from worker.telemetry.events import Emitted

HOUR = timedelta(hours=1)
BY = {"schedule": "0 3 * * *", "done_by": "06:00"}


class Watched:
    """A definition, and a worker's chores that look at its deadlines when a test says so."""

    def __init__(self, timeline: Timeline, emitted: list[Emitted]) -> None:
        self.timeline = timeline
        self.chores = Chores(timeline.database, on_runs=lambda: None)
        self._emitted = emitted

    def start(self, at: str, **keys: Any) -> None:
        self.timeline.clock.set(utc(at))
        self.timeline.define(**keys)

    async def go(self, until: str, *, fires: bool = True) -> None:
        """Let time pass, with a worker that fires and looks, or without one until then."""
        if fires:
            self.timeline.fire_until(utc(until))
        else:
            self.timeline.clock.set(utc(until))
            self.timeline.fire()
        await self.look()

    async def look(self) -> None:
        await self.chores.pass_deadlines()
        await self.chores.check_late()

    def told(self, name: str = "schedule.late") -> list[Any]:
        return [each.fields for each in self._emitted if each.event.name == name]

    @property
    def late_since(self) -> datetime | None:
        with self.timeline.database.autocommit() as connection:
            return definition(connection, ORG, NAME)["late_since"]

    def pending(self) -> list[datetime]:
        """The scheduled times that have a deadline to come."""
        return sorted(row["scheduled_for"] for row in self.timeline.stock.all(tables.deadlines))

    def edit(self, **changes: Any) -> None:
        edit_definition(self.timeline.database, ORG, NAME, changes, actor="tester")

    def end(self, state: str = "succeeded", **values: Any) -> None:
        """Start what waits and end it."""
        for run in self.timeline.start():
            self.timeline.end(run.id, state, **values)


@pytest.fixture
def watched(timeline: Timeline, emitted: list[Emitted]) -> Watched:
    return Watched(timeline, emitted)


async def test_a_definition_is_late_from_its_deadline_to_its_success(watched: Watched) -> None:
    watched.start("2027-01-04T00:00", **BY)
    await watched.go("2027-01-04T05:59")
    assert (watched.late_since, watched.told()) == (None, [])

    await watched.go("2027-01-04T06:00")
    [run] = watched.timeline.runs()
    assert watched.late_since == utc("2027-01-04T06:00")
    assert watched.told() == [
        {
            "org": ORG,
            "definition": NAME,
            "newest_run": run["id"],
            "scheduled_for": "2027-01-04T03:00:00.000000Z",
            "late_at": "2027-01-04T06:00:00.000000Z",
            "why": "waiting (due)",
        }
    ]
    await watched.go("2027-01-04T07:00")
    assert len(watched.told()) == 1

    watched.end()
    await watched.look()
    assert (watched.late_since, watched.told("schedule.done")) == (None, [{"org": ORG, "definition": NAME}])
    assert watched.timeline.stock.all(tables.deadlines) == []


async def test_a_run_that_succeeds_in_time_makes_nothing_late(watched: Watched) -> None:
    watched.start("2027-01-04T00:00", **BY)
    for day in range(4, 8):
        await watched.go(f"2027-01-0{day}T05:00")
        watched.end()

    await watched.go("2027-01-08T00:00")

    assert (watched.told(), watched.timeline.stock.all(tables.deadlines)) == ([], [])


async def test_a_retry_by_hand_that_succeeds_ends_it_and_one_that_fails_does_not(watched: Watched) -> None:
    watched.start("2027-01-04T00:00", **BY)
    await watched.go("2027-01-04T04:00")
    watched.end("failed", reason="error")
    await watched.go("2027-01-04T06:00")
    assert [each["why"] for each in watched.told()] == ["failed (error)"]

    [failed] = watched.timeline.runs()
    again = retry(watched.timeline.database, failed["id"], actor="tester")["id"]
    watched.end("failed", reason="error")
    await watched.look()
    assert watched.late_since is not None

    retry(watched.timeline.database, again, actor="tester")
    watched.end()
    await watched.look()
    assert watched.late_since is None


async def test_the_work_is_done_when_a_later_run_has_done_it(watched: Watched) -> None:
    watched.start("2027-01-04T00:00", **BY)
    for day in (4, 5):
        await watched.go(f"2027-01-0{day}T04:00")
        watched.end("failed", reason="error")
        await watched.go(f"2027-01-0{day}T12:00")
    # Late since the first day, and told once.
    assert (watched.late_since, len(watched.told())) == (utc("2027-01-04T06:00"), 1)

    run_now(watched.timeline.database, ORG, NAME, actor="tester")
    watched.end()
    await watched.look()
    assert watched.late_since is None


async def test_a_worker_that_was_down_at_the_deadline_finds_it_afterwards_once(watched: Watched) -> None:
    watched.start("2027-01-04T00:00", **BY, misfire="skip")
    await watched.go("2027-01-05T12:00", fires=False)
    await watched.look()

    assert watched.timeline.skipped() == {"missed": 2}
    assert [each["why"] for each in watched.told()] == ["skipped (missed)"]
    assert watched.late_since == utc("2027-01-04T06:00")


async def test_what_overlap_skips_is_late_although_the_run_before_succeeds(watched: Watched) -> None:
    watched.start("2027-01-04T00:30", schedule="0 */2 * * *", done_within="90m")
    watched.timeline.fire_until(utc("2027-01-04T02:10"))
    [run] = watched.timeline.start()
    await watched.go("2027-01-04T04:10")
    assert watched.timeline.skipped() == {"overlap": 1}
    assert [each["why"] for each in watched.told()] == ["running"]

    watched.timeline.end(run.id)
    await watched.look()
    assert watched.late_since is None
    await watched.go("2027-01-04T05:30")
    assert [each["why"] for each in watched.told()] == ["running", "skipped (overlap)"]


async def test_a_holiday_and_a_pause_are_not_late(watched: Watched) -> None:
    watched.start("2027-01-04T00:00", **BY)
    pause_definition(watched.timeline.database, ORG, NAME, actor="tester")
    await watched.go("2027-01-05T00:00")
    resume_definition(watched.timeline.database, ORG, NAME, actor="tester")
    set_org_state(watched.timeline.database, ORG, "paused", actor="tester")
    await watched.go("2027-01-06T00:00")
    set_org_state(watched.timeline.database, ORG, "active", actor="tester")

    assert (watched.told(), watched.timeline.stock.all(tables.deadlines)) == ([], [])

    # What has become a run before the pause is late.
    await watched.go("2027-01-06T04:00")
    pause_definition(watched.timeline.database, ORG, NAME, actor="tester")
    await watched.go("2027-01-06T06:00")
    assert len(watched.told()) == 1


@pytest.mark.parametrize("state", ["suspended", "removed"])
async def test_a_suspended_or_removed_org_has_nothing_late(watched: Watched, state: Any) -> None:
    watched.start("2027-01-04T00:00", **BY)
    await watched.go("2027-01-04T12:00")
    assert watched.late_since is not None
    await watched.go("2027-01-05T04:00")

    set_org_state(watched.timeline.database, ORG, state, actor="tester")

    assert watched.timeline.stock.all(tables.deadlines) == []
    assert watched.timeline.stock.all(tables.late_definitions) == []


async def test_an_edit_moves_deadlines_that_were_decided_before(watched: Watched) -> None:
    """A later time takes back what is late, an earlier one makes it late, and without any nothing is."""
    watched.start("2027-01-04T00:00", **BY)
    await watched.go("2027-01-04T07:00")
    assert watched.late_since == utc("2027-01-04T06:00")

    watched.edit(priority=1)
    assert watched.late_since == utc("2027-01-04T06:00")
    watched.edit(done_by="09:00")
    assert watched.late_since is None
    await watched.go("2027-01-04T09:00")
    assert (watched.late_since, len(watched.told())) == (utc("2027-01-04T09:00"), 2)

    watched.edit(done_by=None)
    assert watched.late_since is None
    assert watched.timeline.stock.all(tables.deadlines) == []
    # From now on only: the time before has no deadline to move.
    watched.edit(done_within="1h")
    await watched.go("2027-01-04T12:00")
    assert len(watched.told()) == 2

    await watched.go("2027-01-05T03:30")
    watched.edit(done_within="10m")
    await watched.look()
    assert watched.late_since == utc("2027-01-05T03:10")


async def test_deadlines_that_meet_after_an_edit_wait_for_the_last_scheduled_time(watched: Watched) -> None:
    watched.start("2027-01-04T00:30", schedule="0 1,3 * * *", done_within="3h", overlap="allow")
    await watched.go("2027-01-04T03:10")
    assert [at.hour for at in watched.pending()] == [1, 3]

    # 01:00 was due by 04:00, 03:00 by 06:00: both are due by 06:00 now.
    watched.edit(done_within=None, done_by="06:00")

    assert [at.hour for at in watched.pending()] == [3]


async def test_a_disabled_definition_is_not_late(watched: Watched) -> None:
    watched.start("2027-01-04T00:00", **BY)
    await watched.go("2027-01-04T07:00")

    watched.edit(enabled=False)

    assert watched.late_since is None


async def test_lists_and_the_morning_page_show_what_is_late(watched: Watched) -> None:
    watched.start("2027-01-04T00:00", **BY)

    def shown() -> tuple[list[Any], list[Any], list[Any]]:
        with watched.timeline.database.autocommit() as connection:
            page = overview(connection, watched.timeline.clock.now(), installation="")
            late_orgs = read(connection, ORGS, ALL_ORGS, Page(late=True))
            late = read(connection, DEFINITIONS, ALL_ORGS, Page(state="late"))
        matters = [row for row in page["matters"] if row["kind"] == "late"]
        return matters, [row["code"] for row in late_orgs], [row["name"] for row in late]

    assert shown() == ([], [], [])
    await watched.go("2027-01-04T06:00")
    [run] = watched.timeline.runs()
    watched.timeline.stock.change(tables.live_runs, run["id"], state="held", reason="held")

    [matter], orgs, definitions = shown()
    assert (orgs, definitions) == ([ORG], [NAME])
    assert matter["level"] == "bad"
    assert matter["title"] == "1 definition not done by its deadline"
    assert matter["about"] == f"{ORG}/{NAME} (due 2027-01-04 06:00 UTC). A run that succeeds ends it."
    assert matter["next"] == f"definitions show {ORG} {NAME}"
    assert matter["since"] == utc("2027-01-04T06:00")


async def test_check_names_what_is_due_again_before_its_deadline(watched: Watched) -> None:
    watched.start("2027-01-04T00:00", schedule="0 3 * * *", done_within="23h")
    assert list(odd_deadlines(watched.timeline.database)) == []

    watched.edit(done_within="30h")
    [found] = odd_deadlines(watched.timeline.database)

    assert found.ok
    assert found.detail.startswith(f"{ORG}/{NAME}: done_within 1d6h is longer than the 1d between")
    assert found.fix == "write a done_within of at most one period, or done_by"

    watched.edit(done_within="1s", spread="2h")
    [found] = odd_deadlines(watched.timeline.database)
    assert found.detail.startswith(f"{ORG}/{NAME}: its deadline passes before it fires, ")


async def test_the_preview_shows_the_deadlines(watched: Watched) -> None:
    watched.start("2027-01-04T00:00", **BY, timezone="Europe/Berlin")
    with watched.timeline.database.autocommit() as connection:
        row = definition(connection, ORG, NAME)
    [first, second] = preview_definition(row, [], None, 2, now=watched.timeline.clock.now())

    assert [first["deadline"], second["deadline"]] == [utc("2027-01-04T05:00"), utc("2027-01-05T05:00")]
