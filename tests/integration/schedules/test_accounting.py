"""Whatever happens: per UTC day, instants due = scheduled runs + skip counts; none twice, none early."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fakes.clock import ManualClock, utc
from tests.fakes.closing import close_definition
from tests.fakes.stock import HANDLER
from tests.fakes.timeline import NAME, ORG, Timeline, days
from worker.model.definitions.definition import Definition, parse_definition
from worker.model.definitions.file import DefinitionsFile, parse_file
from worker.model.definitions.zones import parse_zone
from worker.model.runs.fire import spread_of
from worker.operations.apply import apply
from worker.operations.definitions import (
    edit_definition,
    pause_definition,
    resume_definition,
)
from worker.operations.orgs import set_org_state
from worker.store import tables

# Hours before the clocks of Berlin go forward.
START = utc("2026-03-28T20:59:30.25")

SCHEDULES = st.sampled_from(
    ["*/10 * * * *", "every 7m", "30 2 * * *", "0 */6 * * *", "@hourly", "every 90s", "15,45 1-3 * * *"]
)
KEYS = st.fixed_dictionaries(
    {},
    optional={
        "schedule": SCHEDULES,
        "misfire": st.sampled_from(["once", "skip", "all"]),
        "misfire_limit": st.integers(1, 7),
        "misfire_within": st.sampled_from(["5m", "2h", "10h"]),
        "misfire_grace": st.sampled_from(["0s", "60s", "1h"]),
        "overlap": st.sampled_from(["skip", "queue_one", "replace", "allow"]),
        "spread": st.sampled_from(["off", "auto", "20m"]),
        "timezone": st.sampled_from(["UTC", "Europe/Berlin"]),
        "priority": st.integers(0, 3),
        "enabled": st.booleans(),
        "calendar": st.sampled_from(["holidays", None]),
    },
)
HOLIDAY = ["2026-03-29"]
DATES = st.lists(st.sampled_from(["2026-03-28", "2026-03-29", "2026-03-30", "2026-03-31"]), max_size=3)
SECONDS = st.one_of(st.integers(1, 120), st.integers(60, 7200), st.integers(3600, 40_000))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("edit"), KEYS),
        st.tuples(st.just("dates"), DATES),
        st.tuples(st.just("up"), st.integers(1, 7200)),
        st.tuples(st.just("down"), SECONDS),
        st.tuples(st.just("back"), st.integers(1, 7200)),
        st.tuples(
            st.sampled_from(["pause", "resume", "org_pause", "org_resume", "start", "end", "fire"]), st.none()
        ),
    ),
    min_size=3,
    max_size=14,
)


class Expected:
    """The instants that are due, by the rule alone: those named while everything was active."""

    def __init__(self, now: datetime) -> None:
        self.due: set[datetime] = set()
        self.closed: set[datetime] = set()
        self.dates = HOLIDAY
        self.keys: dict[str, Any] = {"schedule": "*/10 * * * *", "calendar": "holidays"}
        self.paused = False
        self.org_active = True
        self._since = now - timedelta(microseconds=1)
        self._fired = self._since

    @property
    def _definition(self) -> Definition:
        values = {"org": ORG, "name": NAME, "handler": HANDLER} | self.keys
        return parse_definition(values, entry="expected")

    def says(self, keys: Mapping[str, Any]) -> bool:
        """Whether the definition says all that already; an edit then changes nothing."""
        values = {"org": ORG, "name": NAME, "handler": HANDLER} | self.keys | keys
        return parse_definition(values, entry="expected") == self._definition

    @property
    def _active(self) -> bool:
        return self._definition.enabled and not self.paused and self.org_active

    def fired(self, now: datetime) -> None:
        """A worker fired: what has come, its spread passed, stays decided if the clock goes back."""
        definition = self._definition
        spread = spread_of(ORG, NAME, definition.schedule, definition.trigger(), definition.spread)
        self._fired = max(self._fired, now - spread)

    def settle(self, now: datetime) -> None:
        """Before a change: what has come until now is due by the rule that was in force."""
        if self._active:
            until = max(now, self._fired)
            come = {at for at in self._definition.trigger().between(self._since, until) if at > self._since}
            self.due |= come
            if self.keys.get("calendar") is not None:
                zone = parse_zone(self.keys.get("timezone", "UTC"))
                self.closed |= {at for at in come if at.astimezone(zone).date().isoformat() in self.dates}

    def start(self, now: datetime) -> None:
        """After a change: from now on, and never behind what was due already."""
        self._since = self._fired = max(now, max(self.due, default=now))


@contextmanager
def new_timeline(migrated: Path) -> Iterator[Timeline]:
    with tempfile.TemporaryDirectory() as folder:
        for path in migrated.parent.glob(f"{migrated.name}*"):
            shutil.copy(path, Path(folder) / path.name)
        timeline = Timeline(f"sqlite:///{Path(folder) / migrated.name}", ManualClock(START))
        try:
            yield timeline
        finally:
            timeline.close()


@pytest.mark.feature("calendars")
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
def test_every_instant_due_is_a_run_or_counted_in_a_skip(
    migrated_sqlite_file: Path, steps: list[tuple[str, Any]]
) -> None:
    with new_timeline(migrated_sqlite_file) as timeline:
        apply(timeline.database, calendar(HOLIDAY), actor="tester")
        timeline.define(schedule="*/10 * * * *", calendar="holidays")
        expected = Expected(START)
        for step, value in steps:
            take(timeline, expected, step, value)
            nothing_is_early(timeline)
        expected.settle(timeline.clock.now())
        close_definition(timeline.database, ORG, NAME, actor="tester")

        assert timeline.accounted() == dict(days(expected.due))
        instants = timeline.instants()
        assert len(instants) == len(set(instants))
        assert set(instants) <= expected.due
        on_calendar = set()
        for skip in timeline.skips():
            within = {at for at in expected.due if skip["skipped_from"] <= at <= skip["skipped_until"]}
            assert {skip["skipped_from"], skip["skipped_until"]} <= within
            if skip["reason"] == "calendar":
                assert skip["count"] == len(within)
                on_calendar |= within
        assert on_calendar == expected.closed


def calendar(dates: list[str]) -> DefinitionsFile:
    return parse_file(f'[[calendar]]\nname = "holidays"\ndates = {dates}\n')


def take(timeline: Timeline, expected: Expected, step: str, value: Any) -> None:
    """One step, in the installation and in what is expected of it."""
    clock, database = timeline.clock, timeline.database
    match step:
        case "up":
            timeline.fire_until(clock.now() + timedelta(seconds=value))
            expected.fired(clock.now())
        case "down":
            clock.advance(value)
        case "back":
            clock.set(clock.now() - timedelta(seconds=value))
        case "fire":
            timeline.fire()
            expected.fired(clock.now())
        case "start":
            timeline.start()
        case "end" if timeline.running:
            timeline.end(min(timeline.running))
        case "dates" if set(value) != set(expected.dates):
            edits = expected.keys.get("calendar") is not None
            # Definitions that do not name it stay as they are.
            with changed(timeline, expected) if edits else nullcontext():
                apply(database, calendar(value), actor="tester")
            expected.dates = value
        case "edit" if not expected.says(value):
            with changed(timeline, expected, keys=value):
                edit_definition(database, ORG, NAME, value, actor="tester")
        case "pause" if not expected.paused:
            with changed(timeline, expected, paused=True):
                pause_definition(database, ORG, NAME, actor="tester")
        case "resume" if expected.paused:
            with changed(timeline, expected, paused=False):
                resume_definition(database, ORG, NAME, actor="tester")
        case "org_pause" if expected.org_active:
            with changed(timeline, expected, org_active=False):
                set_org_state(database, ORG, "paused", actor="tester")
        case "org_resume" if not expected.org_active:
            with changed(timeline, expected, org_active=True):
                set_org_state(database, ORG, "active", actor="tester")


@contextmanager
def changed(
    timeline: Timeline,
    expected: Expected,
    *,
    keys: Mapping[str, Any] | None = None,
    **values: bool,
) -> Iterator[None]:
    now = timeline.clock.now()
    expected.settle(now)
    yield
    expected.keys |= keys or {}
    for name, value in values.items():
        setattr(expected, name, value)
    expected.start(now)


def nothing_is_early(timeline: Timeline) -> None:
    for run in timeline.stock.all(tables.live_runs):
        assert run["available_at"] >= run["scheduled_for"]
    for run in timeline.runs():
        assert run["created_at"] >= run["scheduled_for"]
