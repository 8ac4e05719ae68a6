"""A lease that is not renewed: the zygote freezes the runs, thaws them, or kills them in the end."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from tests.fakes.answering import AnsweringWorker
from tests.fakes.hosting import FAMILY, Host, all_silent_within, all_up, all_writing
from tests.fakes.running import sizes, until, work
from worker.clock import SystemClock
from worker.engine.runners.child.pool import ChildPool
from worker.engine.runners.contract import StopSignal
from worker.model.runs.lease import Lease
from worker.model.runs.outcome import Cancelled, Lost, Outcome, Succeeded
from worker.telemetry.events import Emitted

LEASE = 2.0


class Run:
    """A run of the family, under a lease that the test renews by hand."""

    def __init__(self, plugin: Path, folder: Path, max_freeze: float) -> None:
        self.children = ChildPool(SystemClock(), max_freeze=timedelta(seconds=max_freeze))
        self.children.start()
        self.folder = folder
        self.stop = StopSignal()
        self.renew(60)
        given = work("family", params={"folder": str(folder)})
        self.task: asyncio.Task[Outcome] = asyncio.create_task(
            self.children.run(given, AnsweringWorker(), self.stop)
        )

    def renew(self, seconds: float) -> None:
        self.children.renewed(Lease.begun(timedelta(seconds=seconds), time.monotonic()))

    def frozen(self) -> float:
        return self.stop.frozen_seconds(time.monotonic())


@pytest.fixture
async def run(plugin_folder: Path, tmp_path: Path) -> AsyncIterator[Run]:
    started = Run(plugin_folder, tmp_path, max_freeze=60)
    await all_up(tmp_path)
    yield started
    await started.children.close()
    await started.task


async def test_runs_stand_still_from_four_fifths_of_the_lease_on_and_go_on_when_it_is_renewed(
    run: Run, emitted: list[Emitted]
) -> None:
    run.renew(LEASE)
    await asyncio.sleep(LEASE * 0.6)
    await all_writing(run.folder)
    assert run.frozen() == 0

    await until(run.frozen, within=LEASE)
    await all_silent_within(run.folder, 0.05)
    assert not run.task.done()

    run.renew(60)
    await all_writing(run.folder)
    stood = run.frozen()
    assert stood > 0.3
    await asyncio.sleep(0.1)
    assert run.frozen() == stood
    assert [(event.event.name, event.fields["runs"]) for event in emitted] == [
        ("children.frozen", 1),
        ("children.thawed", 1),
    ]


async def test_a_frozen_run_can_be_killed(run: Run) -> None:
    run.renew(0)
    await until(run.frozen)

    run.stop.request("cancel", 0)

    assert await run.task == Cancelled("requested")
    await all_silent_within(run.folder, 0)


async def test_a_run_that_starts_while_all_are_frozen_waits_as_well(run: Run) -> None:
    run.renew(0)
    await until(run.frozen)

    late = asyncio.create_task(run.children.run(work("ok_blocking"), AnsweringWorker(), StopSignal()))
    await asyncio.sleep(0.3)
    assert not late.done()
    run.renew(60)

    assert isinstance(await late, Succeeded)


async def test_a_run_frozen_for_longer_than_max_freeze_is_killed(plugin_folder: Path, tmp_path: Path) -> None:
    run = Run(plugin_folder, tmp_path, max_freeze=0.5)
    await all_up(tmp_path)

    run.renew(0)

    assert await run.task == Lost("frozen for longer than max_freeze")
    await all_silent_within(tmp_path, 0)
    await run.children.close()


async def test_a_worker_that_stands_still_alone_lets_its_runs_stand_still_in_time(
    plugin_folder: Path, tmp_path: Path
) -> None:
    host = Host(plugin_folder, tmp_path, lease=1.0)
    try:
        await all_up(tmp_path)
        await asyncio.sleep(1.2)
        await all_writing(tmp_path)

        os.kill(host.process.pid, signal.SIGSTOP)
        await all_silent_within(tmp_path, 1.0)

        os.kill(host.process.pid, signal.SIGCONT)
        await all_writing(tmp_path)
        assert set(sizes(tmp_path)) == FAMILY
    finally:
        host.end()
    await all_silent_within(tmp_path, 0.8)


async def test_a_zygote_that_was_stopped_goes_by_the_newest_lease_that_it_missed(
    run: Run, emitted: list[Emitted]
) -> None:
    assert run.children.zygote_pid is not None
    os.kill(run.children.zygote_pid, signal.SIGSTOP)
    for seconds in (0.01, 0.02, 60):
        run.renew(seconds)
    await asyncio.sleep(0.1)  # the first two are over then
    os.kill(run.children.zygote_pid, signal.SIGCONT)

    await all_writing(run.folder)
    assert "children.frozen" not in [event.event.name for event in emitted]
