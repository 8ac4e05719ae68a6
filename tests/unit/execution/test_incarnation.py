"""A worker whose lease was lost and whose database is away: alive, and ready to be told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass
from typing import Any

import pytest

from tests.fakes.clock import ManualClock, settle
from worker.errors import StoreUnavailable
from worker.execution.hosts.control import ControlUnavailable
from worker.execution.incarnation import FAREWELL, TELL_AGAIN, Signals, farewell, run_incarnations
from worker.telemetry.vitals import Notifier

pytestmark = pytest.mark.anyio


class Manager(Notifier):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__("")
        self.told: list[str] = []

    def status(self, text: str) -> None:
        self.told.append(text)

    def alive(self) -> None:
        self.told.append("alive")


class Children:
    def attach(self) -> None:
        """Nothing runs here."""

    async def close(self) -> None:
        self.closed = True


class Incarnation:
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

    async def sleep(self, seconds: float) -> None:
        self.count += 1
        if self.count == self._stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        await settle()


AWAY = StoreUnavailable("the database is away")


async def lived(clock: Sleeps, *ends: int | Exception | None) -> tuple[int, list[str]]:
    """The exit code, and what the service manager was told, where the incarnations end so."""
    manager, left = Manager(), list(ends)
    children, fakes = Children(), [Incarnation(end) for end in left]

    def incarnate(signals: Signals) -> Any:
        return fakes.pop(0)

    code = await run_incarnations(incarnate, children, manager, clock, waiting="waiting for the database")  # type: ignore[arg-type]
    assert children.closed
    return code, manager.told


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


async def say_farewell(workers: Workers, seconds: float, signals: Count | None = None) -> bool:
    clock = ManualClock()
    signals = signals or Count()
    until = clock.monotonic() + seconds
    saying = asyncio.create_task(farewell(workers.tell, signals, clock, until=until))  # type: ignore[arg-type]
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
