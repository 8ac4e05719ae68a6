"""Runs of dead workers are taken only after one whole lease of unbroken contact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

from tests.fakes.clock import ManualClock
from worker.engine.loops.reconciler import recover_dead_workers
from worker.model.runs.lease import Lease
from worker.model.runs.run import Recovered

LEASE = timedelta(seconds=30)


class Store:
    def __init__(self) -> None:
        self.calls = 0

    async def recover(self, still: Callable[[], bool]) -> Sequence[Recovered]:
        self.calls += 1
        return []


async def test_living_owners_get_a_whole_lease_to_renew_first(clock: ManualClock) -> None:
    store = Store()
    lease = Lease.begun(LEASE, clock.monotonic())

    def renew() -> None:
        nonlocal lease
        lease = lease.renewed(clock.monotonic(), clock.monotonic())

    async def pass_time(seconds: int) -> None:
        for _ in range(seconds):
            await clock.pass_time(1, step=1)
            await recover_dead_workers(
                store,
                may_recover=lambda: lease.may_recover(clock.monotonic()),
                on_recovered=lambda recovered: None,
            )
            renew()

    await pass_time(28)
    assert store.calls == 0

    lease = lease.missed()
    renew()
    await pass_time(28)
    assert store.calls == 0

    await pass_time(4)
    assert store.calls > 0
