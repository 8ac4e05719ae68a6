"""Admission says when the database lets this worker admit, and not before."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from tests.fakes.clock import ManualClock, settle
from tests.unit.execution.runs import admitted, ended
from worker.engine.attempt.inflight import InflightRuns
from worker.engine.attempt.plan import HandlerRegistry
from worker.engine.loops.admission import Admission
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
    admission = Admission(
        store,
        InflightRuns(),
        HandlerRegistry(),
        clock,
        slots={"child": 1},
        poll=60.0,
        start=lambda run: None,
        on_taking=lambda: told.append(admission.taking),
    )
    task = asyncio.create_task(admission.run())
    seen = []
    for away in (0, 0, 0, 1, 0):
        await settle()
        seen.append((admission.taking, len(told)))
        store.away += away
        admission.wake.set()
    await settle()
    task.cancel()

    assert seen == [(False, 0), (True, 1), (True, 1), (True, 1), (False, 1)]
    assert told == [True, True]


async def test_only_the_slots_of_runs_that_end_here_are_filled_with_their_ends(clock: ManualClock):
    """All others are filled by the loop itself, which may be waiting for the database."""
    inflight_runs, started = InflightRuns(), list[str]()

    def start(runs: Sequence[AdmittedRun]) -> None:
        for run in runs:
            inflight_runs.add(run)
            started.append(run.id)

    admission = Admission(
        Backlog(),
        inflight_runs,
        HandlerRegistry(),
        clock,
        slots={"inline": 2},
        poll=60.0,
        start=start,
        on_taking=lambda: None,
    )
    assert admission.begin([ended("r1")])[1] == {}  # it does not run yet
    task = asyncio.create_task(admission.run())
    await settle()
    assert started == ["r1", "r2"]

    ends = [ended("r1"), ended("r2", fencing_token=7), ended("gone")]
    assert admission.begin(ends)[1] == {"inline": 1}
    task.cancel()
    await settle()
    assert not task.done()  # what is admitted with the ends has to be stopped too
    admission.end([admitted("r3")])
    await settle()

    assert task.done()
    assert started == ["r1", "r2", "r3"]
    assert admission.begin(ends)[1] == {}


async def test_no_slots_are_filled_with_ends_while_no_more_runs_wait(clock: ManualClock):
    inflight_runs = InflightRuns()
    admission = Admission(
        Store(away=0),
        inflight_runs,
        HandlerRegistry(),
        clock,
        slots={"inline": 2},
        poll=60.0,
        start=lambda runs: None,
        on_taking=lambda: None,
    )
    inflight_runs.add(admitted("r1", isolation="inline"))
    task = asyncio.create_task(admission.run())
    await settle()

    assert admission.begin([ended("r1")])[1] == {}
    task.cancel()


class Backlog:
    """Has a run for each free slot."""

    async def admit(
        self, offered: Mapping[str, int | None], free: Mapping[Isolation, int]
    ) -> Sequence[AdmittedRun]:
        return [admitted(f"r{number + 1}", isolation="inline") for number in range(free["inline"])]
