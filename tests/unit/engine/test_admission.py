"""Admission says when the database lets this worker admit, and not before."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from tests.fakes.clock import ManualClock, settle
from tests.unit.engine.runs import admission, admitted, ended
from worker.engine.attempt.inflight import InflightRuns
from worker.errors import StoreUnavailable
from worker.model.runs.run import AdmittedRun, Isolation


class Store:
    """Has no run for anybody, and is away for as many calls as it is told."""

    def __init__(self, away: int) -> None:
        self.away = away

    async def admit(
        self, offered: Mapping[str, int | None], free: Mapping[Isolation, int]
    ) -> Sequence[AdmittedRun]:
        if self.away:
            self.away -= 1
            raise StoreUnavailable("the database is away")
        return ()


async def test_ready_is_what_the_database_answered_and_again_after_each_outage(clock: ManualClock):
    store, told = Store(away=1), list[bool]()
    admitting = admission(
        store, InflightRuns(), clock, slots={"child": 1}, on_taking=lambda: told.append(admitting.taking)
    )
    task = asyncio.create_task(admitting.run())
    seen = []
    for away in (0, 0, 0, 1, 0):
        await settle()
        seen.append((admitting.taking, len(told)))
        store.away += away
        admitting.wake.set()
    await settle()
    task.cancel()

    assert seen == [(False, 0), (True, 1), (True, 1), (True, 1), (False, 1)]
    assert told == [True, True]


async def test_nothing_is_admitted_while_no_broker_could_send_its_requests(clock: ManualClock):
    faults: list[str | None] = ["exit code 1"]
    inflight_runs, started = InflightRuns(), list[str]()

    def start(runs: Sequence[AdmittedRun]) -> None:
        for run in runs:
            inflight_runs.add(run)
            started.append(run.id)

    given = {"slots": {"inline": 2}, "start": start, "fault": lambda: faults[0]}
    admitting = admission(Backlog(), inflight_runs, clock, **given)
    task = asyncio.create_task(admitting.run())
    await settle()
    assert (started, admitting.taking) == ([], False)

    faults[0] = None
    admitting.wake.set()
    await settle()
    assert (started, admitting.taking) == (["r1", "r2"], True)

    faults[0] = "exit code 1"
    assert admitting.begin([ended("r1")])[1] == {}  # nor with the ends
    task.cancel()


async def test_only_the_slots_of_runs_that_end_here_are_filled_with_their_ends(clock: ManualClock):
    """All others are filled by the loop itself, which may be waiting for the database."""
    inflight_runs, started = InflightRuns(), list[str]()

    def start(runs: Sequence[AdmittedRun]) -> None:
        for run in runs:
            inflight_runs.add(run)
            started.append(run.id)

    admitting = admission(Backlog(), inflight_runs, clock, slots={"inline": 2}, start=start)
    assert admitting.begin([ended("r1")])[1] == {}  # it does not run yet
    task = asyncio.create_task(admitting.run())
    await settle()
    assert started == ["r1", "r2"]

    ends = [ended("r1"), ended("r2", fencing_token=7), ended("gone")]
    assert admitting.begin(ends)[1] == {"inline": 1}
    task.cancel()
    await settle()
    assert not task.done()  # what is admitted with the ends has to be stopped too
    admitting.end([admitted("r3")])
    await settle()

    assert task.done()
    assert started == ["r1", "r2", "r3"]
    assert admitting.begin(ends)[1] == {}


async def test_no_slots_are_filled_with_ends_while_no_more_runs_wait(clock: ManualClock):
    inflight_runs = InflightRuns()
    admitting = admission(Store(away=0), inflight_runs, clock, slots={"inline": 2})
    inflight_runs.add(admitted("r1", isolation="inline"))
    task = asyncio.create_task(admitting.run())
    await settle()

    assert admitting.begin([ended("r1")])[1] == {}
    task.cancel()


class Backlog:
    """Has a run for each free slot."""

    async def admit(
        self, offered: Mapping[str, int | None], free: Mapping[Isolation, int]
    ) -> Sequence[AdmittedRun]:
        return [admitted(f"r{number + 1}", isolation="inline") for number in range(free["inline"])]
