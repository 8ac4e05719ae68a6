"""Runs of dead workers are taken only after one whole lease of unbroken contact."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from tests.fakes.clock import ManualClock, settle
from worker.execution.recovery import Recovery
from worker.runs.firing import Recovered

pytestmark = pytest.mark.anyio


class Store:
    def __init__(self) -> None:
        self.calls = 0

    async def recover(self) -> Sequence[Recovered]:
        self.calls += 1
        return []


async def test_living_owners_get_a_whole_lease_to_renew_first(clock: ManualClock) -> None:
    store = Store()
    contact_since = clock.monotonic()
    recovery = Recovery(
        store,
        clock,
        lease=30.0,
        poll=1.0,
        unbroken_contact=lambda: clock.monotonic() - contact_since,
        on_recovered=lambda recovered: None,
    )
    task = asyncio.create_task(recovery.run())
    await settle()

    await clock.pass_time(30, step=1)
    assert store.calls == 0

    contact_since = clock.monotonic()
    await clock.pass_time(30, step=1)
    assert store.calls == 0

    await clock.pass_time(2, step=1)
    assert store.calls > 0
    task.cancel()
