"""Tokens ahead of time: what is prepared, when, in which order, and what is left to the runs."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

import pytest

from tests.fakes.clock import ManualClock, utc
from worker.engine.attempt.plan import HandlerRegistry
from worker.engine.loops.token_renewal import LEFT, TokenRenewal
from worker.handlers.catalogue import HandlerEntry
from worker.ids import DefinitionId, OrgId
from worker.model.orgs import TokenWant
from worker.model.runs.run import Upcoming

AHEAD = timedelta(minutes=15)


class Schedule:
    """What is due next; satisfies `UpcomingStore`."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.definitions: list[Upcoming] = []
        self.workers = 1
        self.queries = 0

    def add(
        self, number: int, due_in: float, *, org: str = "", timezone: str | None = None, **spec: Any
    ) -> None:
        self.definitions.append(
            Upcoming(
                DefinitionId(f"d{number:06}"),
                OrgId(f"o{number:06}"),
                org or f"org_{number}",
                "main",
                self.clock.now() + timedelta(seconds=due_in),
                json.dumps({"handler": "acme.note", "schedule": "@hourly"} | spec),
                self.clock.now() + timedelta(seconds=due_in),
                timezone,
            )
        )

    async def upcoming(
        self, after: tuple[datetime, DefinitionId] | None, ahead: timedelta, limit: int
    ) -> tuple[datetime, Sequence[Upcoming]]:
        self.queries += 1
        now = self.clock.now()
        place = (now, DefinitionId("")) if after is None else after
        found = sorted(
            (each for each in self.definitions if place < key(each) <= (now + ahead, DefinitionId("z"))),
            key=key,
        )
        return now, found[:limit]

    async def live_workers(self) -> int:
        return self.workers


def key(each: Upcoming) -> tuple[datetime, DefinitionId]:
    return each.next_fire_at, each.definition_id


class Preparer:
    """Notes what is prepared; `room` is the answer of `ahead_in`, `again` that of `prepare`, once each."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.prepared: list[tuple[str, float, float]] = []
        self.scopes: list[frozenset[str]] = []
        self.also_ask: list[frozenset[str]] = []
        self.rate = 10_000
        self.again: dict[str, float] = {}
        self.workers: list[int] = []
        # Orgs whose token is stored and lives long enough, and how many were asked for in each query.
        self.covered: set[str] = set()
        self.looked_up: list[int] = []
        self._sent: dict[int, int] = {}

    async def not_covered(self, wanted: Sequence[TokenWant]) -> list[TokenWant]:
        self.looked_up.append(len(wanted))
        return [want for want in wanted if want.org.code not in self.covered]

    async def prepare(self, want: TokenWant) -> float | None:
        second = int(self.clock.monotonic())
        self._sent[second] = self._sent.get(second, 0) + 1
        self.prepared.append((want.org.code, self.clock.monotonic(), want.covers))
        self.scopes.append(want.scopes)
        self.also_ask.append(want.also_ask)
        return self.again.pop(want.org.code, None)

    def ahead_in(self, issuer: str) -> float:
        return 1.0 if self._sent.get(int(self.clock.monotonic()), 0) >= self.rate else 0.0

    def share(self, workers: int) -> None:
        self.workers.append(workers)


@pytest.fixture
def schedule(clock: ManualClock) -> Schedule:
    return Schedule(clock)


@pytest.fixture
def preparer(clock: ManualClock) -> Preparer:
    return Preparer(clock)


@pytest.fixture
def renewal(clock: ManualClock, schedule: Schedule, preparer: Preparer) -> Iterator[TokenRenewal]:
    handlers = HandlerRegistry()
    handlers.add(HandlerEntry("acme.note", "acme", "1", "acme:note", scopes=("read:kb",)))
    handlers.add(HandlerEntry("acme.other", "acme", "1", "acme:other", scopes=("write:kb",)))
    yield TokenRenewal(schedule, preparer, handlers, clock, random.Random(7), AHEAD)


async def pass_time(renewal: TokenRenewal, clock: ManualClock, seconds: int) -> None:
    """As the loop does, each second."""
    for second in range(seconds):
        if second % 5 == 0:
            await renewal.look()
        await renewal.work()
        clock.advance(1)


async def test_a_full_hour_is_prepared_before_it_spread_over_the_time(clock, schedule, preparer, renewal):
    """Nothing is left to do in the last fifteenth."""
    start = clock.monotonic()
    for number in range(3000):
        schedule.add(number, 900)

    await pass_time(renewal, clock, 901)

    times = sorted(at - start for _, at, _ in preparer.prepared)
    assert len({org for org, _, _ in preparer.prepared}) == len(times) == 3000
    assert times[-1] <= 900 * 14 / 15 + 1
    per_minute = [sum(60 * minute <= at < 60 * (minute + 1) for at in times) for minute in range(14)]
    assert max(per_minute) < 1.3 * 3000 / 14
    assert all(covers == pytest.approx(900 - (at - start) + LEFT) for _, at, covers in preparer.prepared)


async def test_stored_tokens_are_looked_up_together_and_not_prepared(clock, schedule, preparer, renewal):
    for number in range(3000):
        schedule.add(number, 900)
    preparer.covered = {f"org_{number}" for number in range(2990)}

    await pass_time(renewal, clock, 5)

    assert preparer.looked_up == [1000, 1000, 1000]
    await pass_time(renewal, clock, 896)
    assert {org for org, _, _ in preparer.prepared} == {f"org_{number}" for number in range(2990, 3000)}


async def test_what_another_worker_has_prepared_meanwhile_is_not_prepared(clock, schedule, preparer, renewal):
    for number in range(10):
        schedule.add(number, 900)
    await renewal.look()
    preparer.covered = {f"org_{number}" for number in range(10)}

    await pass_time(renewal, clock, 901)

    assert preparer.prepared == []


async def test_what_comes_within_reach_later_is_prepared_once(clock, schedule, preparer, renewal):
    schedule.add(1, 60)
    schedule.add(2, 1000)
    schedule.add(3, 5000)

    await pass_time(renewal, clock, 2000)

    assert [org for org, _, _ in preparer.prepared] == ["org_1", "org_2"]


async def test_the_soonest_and_the_highest_priority_go_first(clock, schedule, preparer, renewal):
    """If the issuer allows only a few requests a second."""
    preparer.rate = 1
    schedule.add(1, 50)
    schedule.add(2, 40)
    schedule.add(3, 40, priority=5)
    schedule.add(4, 30)

    await pass_time(renewal, clock, 20)

    assert [org for org, _, _ in preparer.prepared] == ["org_4", "org_3", "org_2", "org_1"]
    assert len({int(at) for _, at, _ in preparer.prepared}) == 4


async def test_claims_that_must_be_newer_are_left_to_the_run(clock, schedule, preparer, renewal):
    schedule.add(1, 100, max_claims_age="5m")
    schedule.add(2, 100, max_claims_age="15m")

    await pass_time(renewal, clock, 100)

    assert [org for org, _, _ in preparer.prepared] == ["org_2"]


async def test_nothing_is_prepared_for_what_the_calendar_skips(clock, schedule, preparer, renewal):
    """On the date of the definition's zone, else the org's."""
    clock.set(utc("2030-12-24T22:50"))
    dates = {"calendar": "holidays", "calendar_dates": ["2030-12-25"]}
    schedule.add(1, 600, **dates, timezone="Europe/Berlin")
    schedule.add(2, 600, **dates)
    schedule.add(3, 540, **dates, timezone="Europe/Berlin")

    await pass_time(renewal, clock, 700)

    assert {org for org, _, _ in preparer.prepared} == {"org_2", "org_3"}


async def test_the_scopes_are_those_that_the_run_asks_for(clock, schedule, preparer, renewal):
    """Else its token would be another one."""
    schedule.add(1, 30)
    schedule.add(2, 31, scopes=["admin:kb"])
    variant = {"flag": "agent-v2", "equals": True, "handler": "acme.other"}
    schedule.add(3, 32, variants=[variant])
    schedule.add(4, 33, handler="acme.unknown")

    await pass_time(renewal, clock, 33)

    assert preparer.scopes == [{"read:kb"}, {"admin:kb"}, {"read:kb"}]
    assert preparer.also_ask == [frozenset(), frozenset(), {"write:kb"}]


async def test_an_org_that_is_not_active_and_a_spec_of_another_release_are_passed(
    clock, schedule, preparer, renewal
):
    schedule.add(1, 30, unknown_key=True)
    schedule.add(2, 30)
    schedule.definitions[-1] = Upcoming(
        *(
            None if name == "org_code" else value
            for name, value in (
                (name, getattr(schedule.definitions[-1], name)) for name in Upcoming.__slots__
            )
        )
    )
    schedule.add(3, 30)

    await pass_time(renewal, clock, 30)

    assert [org for org, _, _ in preparer.prepared] == ["org_3"]


async def test_a_token_that_would_not_live_long_enough_is_prepared_later(clock, schedule, preparer, renewal):
    schedule.add(1, 600)
    preparer.again["org_1"] = 300

    await pass_time(renewal, clock, 600)

    (_, first, _), (_, second, _) = preparer.prepared
    assert second - first == pytest.approx(300, abs=1)


async def test_what_is_due_already_is_left_to_its_run(clock, schedule, preparer, renewal):
    preparer.rate = 0
    schedule.add(1, 20)
    await pass_time(renewal, clock, 21)
    preparer.rate = 10

    await pass_time(renewal, clock, 5)

    assert preparer.prepared == []
