"""Admission says when the database lets this worker admit, and not before."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from tests.fakes.clock import ManualClock, settle
from worker.errors import StoreUnavailable
from worker.execution.attempts.handler_registry import HandlerRegistry
from worker.execution.attempts.inflight import InflightRuns
from worker.execution.loops.admission import Admission
from worker.runs.run import AdmittedRun, Isolation

pytestmark = pytest.mark.anyio


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
        on_admitting=lambda: told.append(admission.admitting),
    )
    task = asyncio.create_task(admission.run())
    seen = []
    for away in (0, 0, 0, 1, 0):
        await settle()
        seen.append((admission.admitting, len(told)))
        store.away += away
        admission.wake.set()
    await settle()
    task.cancel()

    assert seen == [(False, 0), (True, 1), (True, 1), (True, 1), (False, 1)]
    assert told == [True, True]
