"""Incarnations: alive while the database is away, and ended in an order in which nothing is lost."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fakes.clock import ManualClock, settle
from tests.fakes.manager import Manager
from tests.unit.engine.runs import admitted, ended
from worker.engine.attempt.inflight import InflightRun, InflightRuns
from worker.engine.attempt.plan import HandlerRegistry
from worker.engine.attempt.run_log import RunLogWriter
from worker.engine.incarnation import (
    FAREWELL,
    TELL_AGAIN,
    Incarnation,
    ProcessTools,
    farewell,
    run_incarnations,
)
from worker.engine.loops import maintenance, reading
from worker.engine.loops.dispatcher import Dispatcher
from worker.engine.loops.reconciler import Renewal
from worker.engine.loops.step_writer import StepWriter
from worker.engine.signals import Signals
from worker.errors import StoreUnavailable
from worker.features.hosts.control import ControlUnavailable
from worker.handlers.catalogue import HandlerEntry
from worker.ids import RunId, WorkerId
from worker.model.runs.lease import Lease
from worker.model.runs.outcome import EndedAttempt
from worker.model.runs.run import OwnedRun
from worker.telemetry.events import Emitted
from worker.telemetry.vitals import Vitals


class Children:
    broker = None

    def attach(self) -> None:
        """Nothing runs here."""

    async def close(self) -> None:
        self.closed = True

    def renewed(self, lease: Lease) -> None:
        """Nothing is frozen."""

    def take_describing(self) -> None:
        """No process describes handlers."""


class Health:
    def starting(self) -> None:
        self.vitals: Vitals | None = None

    def watch(self, vitals: Vitals) -> None:
        self.vitals = vitals


class Files:
    every = 60.0

    def look(self) -> None:
        """No file is watched."""


def process_of(clock: Any, kind: Any = "worker", farewell: float = 0.0) -> ProcessTools:
    return ProcessTools(
        kind,
        Children(),  # type: ignore[arg-type]
        Manager(),
        clock,
        Health(),
        Files(),
        {"child": 1, "inline": 0},
        timedelta(seconds=5),
        farewell=farewell,
    )


class Ends:
    """Ends as it is told: with an exit code, without one for a lost lease, or with an error."""

    def __init__(self, end: int | Exception | None) -> None:
        self._end = end

    async def run(self) -> int | None:
        if isinstance(self._end, Exception):
            raise self._end
        return self._end


class Sleeps:
    """A clock whose sleeps take no time; during the one numbered `stop_at` SIGTERM comes."""

    def __init__(self, stop_at: int = 0) -> None:
        self.count = 0
        self._stop_at = stop_at

    def monotonic(self) -> float:
        return float(self.count)

    async def sleep(self, seconds: float) -> None:
        self.count += 1
        if self.count == self._stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        await settle()


AWAY = StoreUnavailable("the database is away")


async def lived(clock: Sleeps, *ends: int | Exception | None) -> tuple[int, list[str]]:
    """The exit code, and what the service manager was told, where the incarnations end so."""
    process, left = process_of(clock), [Ends(end) for end in ends]

    @asynccontextmanager
    async def begin() -> AsyncIterator[Any]:
        yield left.pop(0)

    code = await run_incarnations(begin, process, waiting="waiting for the database")
    assert process.children.closed  # type: ignore[attr-defined]
    return code, process.notifier.told  # type: ignore[attr-defined]


async def test_the_watchdog_is_fed_while_the_next_incarnation_waits_for_the_database():
    code, told = await lived(Sleeps(), None, AWAY, AWAY, 0)

    assert code == 0
    assert told == ["waiting for the database", "alive"] * 2


async def test_it_ends_when_it_is_told_to_although_the_database_is_away():
    clock = Sleeps(stop_at=1)

    code, _ = await lived(clock, None, AWAY, AWAY)

    assert (code, clock.count) == (0, 1)


async def test_the_first_start_needs_the_database():
    with pytest.raises(StoreUnavailable):
        await lived(Sleeps(), AWAY)


class Workers:
    """Workers that answer only from the given try on."""

    def __init__(self, back_at: int) -> None:
        self.tries = 0
        self._back_at = back_at

    async def tell(self) -> None:
        self.tries += 1
        if self.tries < self._back_at:
            raise ControlUnavailable("no worker answers unregister: ConnectError")


@dataclass
class Count:
    """Signals without a process."""

    count: int = 1


async def say_farewell(workers: Workers, seconds: float, requests: Count | None = None) -> bool:
    clock = ManualClock()
    requests = requests or Count()
    until = clock.monotonic() + seconds
    saying = asyncio.create_task(farewell(workers.tell, requests, clock, until=until))  # type: ignore[arg-type]
    await settle()
    while not saying.done():
        await clock.pass_time(TELL_AGAIN)
    return await saying


async def test_a_host_tells_workers_that_restart_until_one_hears_that_it_has_stopped():
    workers = Workers(back_at=7)

    assert await say_farewell(workers, FAREWELL)
    assert workers.tries == 7
    # The control: told once, as before, nobody has heard it.
    assert not await say_farewell(Workers(back_at=7), 0.0)


async def test_the_farewell_ends_in_time_and_at_a_second_signal():
    away, twice = Workers(back_at=1000), Workers(back_at=1000)

    assert not await say_farewell(away, FAREWELL)
    assert away.tries == FAREWELL / TELL_AGAIN + 1
    assert not await say_farewell(twice, FAREWELL, Count(2))
    assert twice.tries == 1


async def nothing_installed(**given: object) -> AsyncIterator[list[HandlerEntry]]:
    for entries in ():
        yield entries


class Life:
    """An incarnation with one run, which ends once it is asked to stop. Keeps what happens, in order."""

    def __init__(self, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, kind: Any = "worker") -> None:
        monkeypatch.setattr(reading, "distributions", list)
        monkeypatch.setattr(reading, "read_catalogue", nothing_installed)
        self.happened: list[str] = []
        self.wake, self.taking, self.ticked_at = asyncio.Event(), True, clock.monotonic()
        self.process, signals = process_of(clock, kind), Signals()
        tools: Any = SimpleNamespace(run_log=RunLogWriter(self, clock), clock=clock, prepare=self._prepare)
        self.dispatcher: Dispatcher[Any] = Dispatcher(
            tools,
            self._attempt,
            InflightRuns(),
            self,
            on_free=signals.slots_free,
            on_end=lambda ended, inflight: None,
            report=lambda ended, inflight: self.happened.append("the end is written"),
        )
        signals.draining.calls(lambda: self.happened.append("draining"))
        self.incarnation = Incarnation(
            self.process,
            WorkerId("w1"),
            self,
            self,
            {"admission": self},
            self.dispatcher,
            StepWriter(self, clock),
            HandlerRegistry(),
            self,
            signals,
            timedelta(seconds=30),
            60.0,
            leave=self._leave,
            cancel=self.dispatcher.cancel,
        )
        self.incarnation.resources.callback(self.happened.append, "closed")
        self.living = asyncio.create_task(self.incarnation.run())

    # the source

    async def run(self) -> None:
        try:
            self.dispatcher.start([admitted("r1")])
            await asyncio.Event().wait()
        finally:
            self.happened.append("nothing is taken")

    async def _prepare(self, runs: object) -> None: ...

    async def _attempt(self, inflight: InflightRun, tools: object) -> EndedAttempt:
        await inflight.stop.requested.wait()
        return ended("r1")

    # the sink and the catalogue

    def renew(self) -> tuple[bool, Sequence[OwnedRun]]:
        return True, ()

    async def finish(self, ends: Sequence[EndedAttempt]) -> set[RunId]:
        return {end.run_id for end in ends}

    async def hand_back(self, owned: Sequence[OwnedRun]) -> None: ...
    async def put(self, entries: object) -> None: ...
    async def offer(self, names: object) -> None: ...
    async def complete(self, known: object) -> None: ...
    async def append_logs(self, rows: object) -> None: ...
    async def write_progress(self, rows: object) -> None: ...
    async def store_steps(self, rows: object) -> Any: ...
    async def load_steps(self, run_id: object, after: int) -> Any: ...
    async def step_totals(self, run_id: object) -> Any: ...

    async def _leave(self) -> None:
        self.happened.append("left")


@pytest.mark.parametrize("kind", ["worker", "host"])
async def test_a_drain_ends_what_brings_work_then_writes_closes_and_leaves(
    clock: ManualClock, monkeypatch: pytest.MonkeyPatch, emitted: list[Emitted], kind: str
):
    life = Life(clock, monkeypatch, kind)
    await settle()
    assert life.happened == []

    life.incarnation.stop()

    assert await life.living == 0
    assert life.happened == ["nothing is taken", "draining", "the end is written", "closed", "left"]
    assert life.process.notifier.told[-1] == "stopping: 15"  # type: ignore[attr-defined]
    assert [one.event.name for one in emitted] == ["worker.draining", f"{kind}.stopped"]


LOST = Renewal({}, (), registered=False, lease=Lease.begun(timedelta(0), 0.0))


@pytest.mark.parametrize("lost", [False, True], ids=["drain", "lease lost"])
async def test_a_chore_that_has_begun_ends_before_the_worker_does(
    clock: ManualClock, monkeypatch: pytest.MonkeyPatch, lost: bool
):
    """What it has stored would never be reported: another worker finds nothing new."""
    life = Life(clock, monkeypatch)
    begun, stored = asyncio.Event(), asyncio.Event()

    async def chore() -> None:
        begun.set()
        await stored.wait()
        life.happened.append("the chore has reported")

    life.incarnation.housekeeping.every(0.001, "chore", chore)
    await begun.wait()

    if lost:
        life.incarnation._renewed(LOST)
    else:
        life.incarnation.stop()
    await settle()
    assert "the end is written" in life.happened
    stored.set()

    assert await life.living == (None if lost else 0)
    last = ["closed"] if lost else ["closed", "left"]
    assert life.happened[-len(last) - 1 :] == ["the chore has reported", *last]


async def test_a_chore_that_does_not_end_is_cancelled_in_time(
    clock: ManualClock, monkeypatch: pytest.MonkeyPatch
):
    life = Life(clock, monkeypatch)
    monkeypatch.setattr(maintenance, "LAST_CHORES", 0.0)
    begun = asyncio.Event()

    async def chore() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            life.happened.append("the chore is cancelled")

    life.incarnation.housekeeping.every(0.001, "chore", chore)
    await begun.wait()

    life.incarnation.stop()

    assert await life.living == 0
    assert "the chore is cancelled" in life.happened


async def test_without_its_lease_an_incarnation_announces_no_drain_and_is_not_ended_by_name(
    clock: ManualClock, monkeypatch: pytest.MonkeyPatch
):
    life = Life(clock, monkeypatch)
    await settle()

    life.incarnation._renewed(LOST)

    assert await life.living is None
    assert {"draining", "left"}.isdisjoint(life.happened)
    assert "closed" in life.happened
    assert life.wake.is_set()


async def test_it_is_ready_once_and_each_signal_wakes_its_own_listeners(
    clock: ManualClock, monkeypatch: pytest.MonkeyPatch
):
    life = Life(clock, monkeypatch)
    signals = life.incarnation.signals
    await settle()
    for each, wakes in (
        (signals.runs_due, True),
        (signals.handlers_changed, True),
        (signals.slots_free, True),
        (signals.lease_answered, True),
        (signals.fired, False),  # the wiring decides whom it wakes
        (signals.draining, False),
    ):
        life.wake.clear()
        each()
        assert life.wake.is_set() is wakes
    signals.ready()
    signals.ready()
    life.incarnation.stop()
    await life.living

    told = life.process.notifier.told  # type: ignore[attr-defined]
    assert [line for line in told if line.startswith("ready")] == ["ready: runs: 1 of 1 child; lease: 30 s"]
