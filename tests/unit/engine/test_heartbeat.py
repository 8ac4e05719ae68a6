"""A renewal counts from its question, and contact is broken by any renewal that did not come through."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from tests.fakes.clock import ManualClock
from tests.unit.engine.runs import admitted
from worker.engine.attempt.inflight import InflightRuns
from worker.engine.loops.heartbeat import Heartbeat
from worker.engine.loops.reconciler import Renewal
from worker.errors import StoreUnavailable
from worker.model.runs.lease import Lease
from worker.model.runs.run import OwnedRun
from worker.telemetry.events import Emitted


class Store:
    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.takes = 0.0
        self.away = False
        self.registered = True

    def renew(self) -> tuple[bool, Sequence[OwnedRun]]:
        self.clock.advance(self.takes)
        if self.away:
            raise StoreUnavailable("away")
        return self.registered, []


class Bench:
    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.store = Store(clock)
        self.leases: list[Lease] = []
        self.renewals: list[Renewal] = []
        self.inflight_runs = InflightRuns()
        self.heartbeat = Heartbeat(
            self.store,
            self.inflight_runs,
            clock,
            duration=timedelta(seconds=30),
            renew=5.0,
            on_lease=self.leases.append,
            on_renewal=self.renewals.append,
        )
        self.heartbeat.begin()

    def contact(self) -> float:
        return self.heartbeat.lease.unbroken_contact(self.clock.monotonic())


async def test_the_lease_counts_from_the_question_not_from_the_answer(clock: ManualClock) -> None:
    bench = Bench(clock)
    bench.store.takes = 4.0
    asked = clock.monotonic()

    bench.heartbeat.beat()

    assert bench.leases[-1].expires_at == asked + 30.0


async def test_a_renewal_says_what_was_held_before_it_was_sent(clock: ManualClock) -> None:
    bench = Bench(clock)
    bench.inflight_runs.add(admitted("r1", fencing_token=7))

    renewal = bench.heartbeat.beat()

    assert renewal is not None and dict(renewal.held) == {"r1": 7}


async def test_one_failed_renewal_breaks_the_contact(clock: ManualClock, emitted: list[Emitted]) -> None:
    bench = Bench(clock)
    clock.advance(10)
    assert bench.contact() == 10.0

    bench.store.away = True
    assert bench.heartbeat.beat() is None
    assert bench.contact() == 0.0

    bench.store.away = False
    bench.heartbeat.beat()
    clock.advance(3)
    assert bench.contact() == 3.0
    assert [event.event.name for event in emitted] == ["lease.late"]


async def test_a_renewal_after_the_lease_has_passed_says_that_it_was_lost(
    clock: ManualClock, emitted: list[Emitted]
) -> None:
    bench = Bench(clock)
    clock.advance(31)

    bench.heartbeat.beat()

    assert [event.event.name for event in emitted] == ["lease.lost"]
    assert bench.contact() == 0.0


async def test_the_lease_is_not_told_while_a_held_run_is_anothers(clock: ManualClock) -> None:
    """Told at once it would thaw the run, which has to be killed first."""
    bench = Bench(clock)
    told = list(bench.leases)
    bench.inflight_runs.add(admitted("r1"))

    renewal = bench.heartbeat.beat()

    assert renewal is not None and renewal.lease.expires_at == clock.monotonic() + 30.0
    assert bench.leases == told


async def test_a_lease_that_was_given_up_is_not_told_again(clock: ManualClock) -> None:
    bench = Bench(clock)
    told = list(bench.leases)
    bench.store.registered = False
    clock.advance(31)

    bench.heartbeat.beat()

    assert bench.leases == told
    assert bench.contact() == 0.0


async def test_contact_is_broken_once_the_lease_has_passed(clock: ManualClock) -> None:
    """A worker that was stopped must not recover others' runs before it has renewed."""
    bench = Bench(clock)
    clock.advance(29)
    assert bench.contact() == 29.0

    clock.advance(2)

    assert bench.contact() == 0.0


async def test_recovery_waits_for_a_whole_lease_after_a_failed_renewal(clock: ManualClock) -> None:
    bench = Bench(clock)

    def pass_time(seconds: int) -> None:
        for _ in range(seconds // 5):
            clock.advance(5)
            bench.heartbeat.beat()

    pass_time(30)
    assert bench.heartbeat.may_recover()

    bench.store.away = True
    pass_time(5)
    bench.store.away = False
    pass_time(30)
    assert not bench.heartbeat.may_recover()
    pass_time(5)
    assert bench.heartbeat.may_recover()
