"""What a worker holds and what the database says it owns are brought together, renewal by renewal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import pytest

from tests.unit.engine.runs import admitted
from worker.engine.attempt.inflight import InflightRuns
from worker.engine.loops.reconciler import Reconciler, Renewal
from worker.ids import RunId
from worker.model.runs.lease import Lease
from worker.model.runs.run import OwnedRun

LEASE = Lease.begun(timedelta(seconds=30), 9.0)


class Bench:
    """A reconciler over inflight_runs, and what it asked for."""

    def __init__(self) -> None:
        self.inflight_runs = InflightRuns()
        self.handed_back: list[str] = []
        self.cancelled: list[tuple[str, str]] = []
        self.leases: list[Lease] = []
        self.killed_at_lease: list[list[bool]] = []
        self.lost = 0
        self.reconciler = Reconciler(
            self.inflight_runs,
            self,
            cancel=lambda run_id, reason: self.cancelled.append((run_id, reason)),
            on_lease=self.lease,
            on_lost=self.lose,
        )

    def lease(self, lease: Lease) -> None:
        self.leases.append(lease)
        self.killed_at_lease.append([held.stop.killed for held in self.inflight_runs])

    def lose(self) -> None:
        self.lost += 1

    async def hand_back(self, owned: Sequence[OwnedRun]) -> None:
        # From here on another process may start them.
        assert all(
            self.inflight_runs.is_late(admitted(run.id, fencing_token=run.fencing_token)) for run in owned
        )
        self.handed_back.extend(run.id for run in owned)

    async def renewal(
        self, *owned: OwnedRun, held: dict[RunId, int] | None = None, registered: bool = True
    ) -> None:
        held = self.inflight_runs.fencing_tokens() if held is None else held
        await self.reconciler.reconcile(Renewal(held, owned, registered, LEASE))


def owned(name: str, fencing_token: int = 1, cancel_reason: str | None = None) -> OwnedRun:
    return OwnedRun(RunId(name), fencing_token, cancel_reason)


async def test_what_is_held_and_owned_is_left_alone() -> None:
    bench = Bench()
    held = bench.inflight_runs.add(admitted())

    await bench.renewal(owned("r1"))

    assert not held.stop.killed
    assert bench.handed_back == []


@pytest.mark.parametrize(
    ("owns", "held", "killed"),
    [([], None, True), ([owned("r1", fencing_token=2)], None, True), ([], {}, False)],
    ids=["not owned", "held under an older fencing token", "admitted after the question was sent"],
)
async def test_what_was_asked_for_and_is_not_owned_is_killed(
    owns: list[OwnedRun], held: dict[RunId, int] | None, killed: bool
) -> None:
    bench = Bench()
    run = bench.inflight_runs.add(admitted(fencing_token=1))

    await bench.renewal(*owns, held=held)

    assert run.stop.killed is killed


async def test_owned_but_not_held_is_handed_back_at_the_second_renewal() -> None:
    bench = Bench()

    await bench.renewal(owned("lost"))
    assert bench.handed_back == []
    await bench.renewal(owned("lost"))

    assert bench.handed_back == ["lost"]


async def test_owned_but_not_held_once_only_is_left_alone() -> None:
    bench = Bench()

    await bench.renewal(owned("ending"))
    await bench.renewal()
    await bench.renewal(owned("ending"))

    assert bench.handed_back == []


async def test_a_run_that_was_written_between_question_and_answer_is_not_handed_back() -> None:
    bench = Bench()
    for _ in range(2):
        await bench.renewal(owned("r1"), held={RunId("r1"): 1})

    assert bench.handed_back == []


async def test_a_cancel_request_reaches_the_run() -> None:
    bench = Bench()
    bench.inflight_runs.add(admitted())

    await bench.renewal(owned("r1", cancel_reason="suspended"))

    assert bench.cancelled == [("r1", "suspended")]


async def test_what_is_lost_is_killed_before_the_lease_thaws_the_rest() -> None:
    bench = Bench()
    bench.inflight_runs.add(admitted("r1"))
    bench.inflight_runs.add(admitted("r2"))

    await bench.renewal(owned("r2"))

    assert bench.leases == [LEASE]
    assert bench.killed_at_lease == [[True, False]]


async def test_a_renewal_that_finds_all_as_it_was_leaves_the_lease_to_the_heartbeat() -> None:
    bench = Bench()
    bench.inflight_runs.add(admitted())

    await bench.renewal(owned("r1"))

    assert bench.leases == []


async def test_an_incarnation_that_was_given_up_kills_everything_and_thaws_nothing() -> None:
    bench = Bench()
    held = bench.inflight_runs.add(admitted())

    await bench.renewal(registered=False)

    assert held.stop.killed
    assert (bench.lost, bench.leases) == (1, [])


async def test_a_run_on_its_way_to_a_host_is_not_handed_back() -> None:
    bench = Bench()
    bench.reconciler.is_placed = lambda run: run.id == "placed"

    for _ in range(3):
        await bench.renewal(owned("placed"), owned("lost"))

    assert set(bench.handed_back) == {"lost"}
