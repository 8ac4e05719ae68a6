"""Processes forked ahead of their runs hold nothing, serve one run each, and cost no run if they die."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.answering import AnsweringWorker
from tests.fakes.running import token, until, work
from worker.clock import SystemClock
from worker.engine.runners.child import linux
from worker.engine.runners.child.pool import ChildPool
from worker.engine.runners.child.sandbox import Planner
from worker.engine.runners.contract import StopSignal
from worker.model.runs.lease import Lease
from worker.model.runs.outcome import Cancelled, Failed, HandedBack, Outcome, Succeeded
from worker.telemetry.events import Emitted

# What a spare would hold of the worker's environment, and of the run before.
SECRETS = ("canary-database-url", "canary-of-another-org")
# Writes down that it ran, and says in which process.
WHO = """
import os
with open({file!r}, "a") as file:
    file.write("x")
result = os.getpid()
"""

# How often a pattern occurs in the writable memory of the process; it must not match itself.
LOOK = """
import re

def look(pattern):
    found = 0
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb") as memory:
        for line in maps.readlines():
            if " rw" in line:
                start, end = (int(number, 16) for number in line.split()[0].split("-"))
                memory.seek(start)
                found += len(re.findall(pattern, memory.read(end - start)))
    return found

"""


class Pool:
    """A pool with two spares, of which tests know the pids."""

    def __init__(self, **settings: Any) -> None:
        self.children = ChildPool(SystemClock(), spares=2, **settings)
        self.children.start()

    def below(self) -> dict[int, linux.Process]:
        table, zygote = linux.processes(), self.children.zygote_pid
        return {pid: table[pid] for pid in table if table[pid].parent == zygote and table[pid].state != "Z"}

    async def spares(self) -> list[int]:
        """The two spares, isolated and waiting for work, oldest first; no run is under way."""
        await until(lambda: len(self.below()) == 2 and all(map(waits, self.below())))
        return sorted(self.below(), key=lambda pid: self.below()[pid].started * 1000 + pid / 1e7)

    async def run(self, code: str, *, link: AnsweringWorker | None = None, **fields: Any) -> Outcome:
        given = work("code", params={"code": code}, **fields)
        return await self.children.run(given, link or AnsweringWorker(), StopSignal())

    async def result_of(self, code: str, **fields: Any) -> Any:
        outcome = await self.run(code, **fields)
        assert isinstance(outcome, Succeeded), outcome
        return None if outcome.result is None else json.loads(outcome.result)


@asynccontextmanager
async def opened(**settings: Any) -> AsyncIterator[Pool]:
    pool = Pool(**settings)
    try:
        yield pool
    finally:
        await pool.children.close()


def waits(pid: int) -> bool:
    """Whether a process is isolated: it has left the zygote's folder, and sleeps."""
    try:
        isolated = "orgworker-runs-" in os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return False
    process = linux.process_of(pid)
    return isolated and process is not None and process.state == "S"


async def stopped(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    await until(lambda: (found := linux.process_of(pid)) is not None and found.state == "T")


@pytest.fixture(scope="module")
async def running_pool(plugin_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pool]:
    """One for the tests of this module: a zygote that starts takes as long as ten of its runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKER_DATABASE__URL", f"postgresql://{SECRETS[0]}@somewhere")
        rules = replace(Planner([]).rules([], []), write=(str(tmp_path_factory.getbasetemp()),))
        started = Pool(sandbox=rules)
    yield started
    await started.children.close()


@pytest.fixture
async def pool(running_pool: Pool) -> Pool:
    """A pool that has had a run of another org, and two spares that were forked since the last test."""
    await running_pool.result_of("result = 1", token=token(SECRETS[1]))
    await running_pool.spares()
    await running_pool.result_of("result = 1")
    await running_pool.spares()
    return running_pool


async def test_ps_shows_zygote_spares_and_runs(pool: Pool) -> None:
    [first, second] = await pool.spares()
    names = [Path(f"/proc/{pid}/comm").read_text() for pid in (pool.children.zygote_pid, first, second)]

    assert names == ["orgworker-zyg\n", "orgworker-run\n", "orgworker-run\n"]
    assert await pool.result_of("result = open('/proc/self/comm').read()") == "orgworker-run\n"


def test_a_name_fits_and_a_longer_one_would_be_cut() -> None:
    """In an interpreter of its own, with the control: without a name it shows the interpreter's."""
    code = (
        "from worker.engine.runners.child import linux; own = open('/proc/self/comm'); print(own.read());"
        "linux._prctl(linux._PR_SET_NAME, b'orgworker-provision'); own.seek(0); print(own.read())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == [Path(sys.executable).name[:15], "orgworker-provi"]
    assert all(len(name.encode()) <= 15 for name in linux.ProcessName)


async def test_a_spare_serves_one_run_and_is_replaced(pool: Pool) -> None:
    first = await pool.spares()

    served = [await pool.result_of("import os; result = os.getpid()")]
    second = await pool.spares()
    served += [await pool.result_of("import os; result = os.getpid()")]

    assert served[0] in first
    assert served[0] not in second
    assert served[1] in second
    assert len({*first, *second, *await pool.spares()}) == 4


async def test_more_runs_than_spares_start_at_once(pool: Pool) -> None:
    spares = await pool.spares()

    codes = ["import os, time; time.sleep(0.2); result = os.getpid()"] * 12
    pids = await asyncio.gather(*map(pool.result_of, codes))

    assert len(set(pids)) == 12
    assert set(spares) <= set(pids)


async def test_the_limits_of_a_run_apply_before_its_module_is_imported(
    pool: Pool, plugin_folder: Path
) -> None:
    await pool.spares()
    (plugin_folder / "limited_jobs.py").write_text(
        "from resource import RLIMIT_CPU, RLIMIT_DATA, getrlimit\nfrom worker import job\n"
        "LIMITS = {'CPU': getrlimit(RLIMIT_CPU)[0], 'DATA': getrlimit(RLIMIT_DATA)[0]}\n"
        "@job('limits')\ndef limits(ctx): return LIMITS\n"
    )
    given = work(
        "limits",
        entry_point="limited_jobs:limits",
        memory=512 * 1024 * 1024,
        timeout_at=SystemClock().now() + timedelta(seconds=60),
    )

    outcome = await pool.children.run(given, AnsweringWorker(), StopSignal())

    assert isinstance(outcome, Succeeded), outcome
    limits = json.loads(outcome.result or "")
    assert 0 <= 3660 - limits["CPU"] / (os.cpu_count() or 1) <= 3
    assert 1024**3 < limits["DATA"] < 2 * 1024**3


async def test_the_memory_cap_of_a_run_applies_to_a_spare(pool: Pool) -> None:
    spares = await pool.spares()
    code = "import os, time; x = os.urandom(1024) * 200_000; ctx.save(os.getpid()); time.sleep(600)"
    link = AnsweringWorker()

    outcome = await pool.run(code, link=link, memory=64 * 1024 * 1024)

    assert isinstance(outcome, Failed)
    assert outcome.reason == "out_of_memory"
    assert not link.saved or link.saved[0] in spares


async def test_a_spare_holds_nothing_of_the_worker_or_of_an_org(pool: Pool) -> None:
    """Its memory, environment and descriptors, after another org's run, as the run finds them."""
    [spare, _] = await pool.spares()
    code = LOOK + "import os; result = [os.getpid(), look(b'cana[r]y-'), dict(os.environ)]"
    pid, found, environment = await pool.result_of(code)

    assert pid == spare
    assert found == 0
    assert environment.keys() <= {"PATH", "HOME", "LANG", "TZ", "TMPDIR"}


async def test_the_control_for_what_a_process_holds(pool: Pool) -> None:
    """The same look finds what a run does hold: its own token."""
    code = LOOK + "result = look(b'cana[r]y-own')"
    assert await pool.result_of(code, token=token("canary-own-token")) > 0


async def test_a_killed_spare_is_replaced_and_no_run_notices(pool: Pool, emitted: list[Emitted]) -> None:
    killed = await pool.spares()
    for pid in killed:
        os.kill(pid, signal.SIGKILL)

    assert await pool.result_of("import os; result = os.getpid()") not in killed

    assert not set(killed) & set(await pool.spares())
    assert {(event.event.name, event.fields.get("reason")) for event in emitted} <= {
        ("spare.died", "signal SIGKILL"),
        ("child.replaced", "signal SIGKILL"),
    }
    assert emitted


async def test_a_spare_killed_while_it_gets_its_run_loses_nothing(
    pool: Pool, tmp_path: Path, emitted: list[Emitted]
) -> None:
    """Its work lies in its socket when it dies: the run starts once, in another process."""
    spare, other = await pool.spares()
    await stopped(spare)
    file = tmp_path / "ran"
    running = asyncio.create_task(pool.result_of(WHO.format(file=str(file))))
    await asyncio.sleep(0.1)

    os.kill(spare, signal.SIGKILL)

    assert await running == other
    assert file.read_text() == "x"
    [event] = emitted
    assert (event.event.name, event.fields["org"]) == ("child.replaced", "org_acme")
    assert event.fields["reason"] == "signal SIGKILL"


async def test_both_spares_killed_while_they_get_runs(pool: Pool, tmp_path: Path) -> None:
    spares = await pool.spares()
    for spare in spares:
        await stopped(spare)
    files = [tmp_path / "a", tmp_path / "b"]
    runs = [asyncio.create_task(pool.result_of(WHO.format(file=str(file)))) for file in files]
    await asyncio.sleep(0.1)

    for spare in spares:
        os.kill(spare, signal.SIGKILL)

    assert not {await run for run in runs} & set(spares)
    assert [file.read_text() for file in files] == ["x", "x"]


async def test_a_run_whose_processes_die_unread_again_and_again_is_handed_back(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for spare in await pool.spares():
        await stopped(spare)
    monkeypatch.setattr("worker.engine.runners.child.pool.TRIES", 1)
    running = asyncio.create_task(pool.run("result = 1"))
    await asyncio.sleep(0.1)

    for pid in pool.below():
        os.kill(pid, signal.SIGKILL)

    outcome = await running
    assert outcome == HandedBack("no process could be started: 1 ended before they had read the run")


async def test_a_spare_killed_after_its_handler_was_called_fails_its_attempt(pool: Pool) -> None:
    spares = await pool.spares()
    link = AnsweringWorker()
    code = "import os, time; ctx.save(os.getpid()); time.sleep(600)"
    running = asyncio.create_task(pool.run(code, link=link))
    await until(lambda: link.saved)
    assert link.saved[0] in spares

    os.kill(link.saved[0], signal.SIGKILL)

    outcome = await running
    assert isinstance(outcome, Failed)
    assert (outcome.reason, outcome.detail) == ("handler_exited", "signal SIGKILL")


async def test_a_stopped_spare_does_not_keep_its_run(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.engine.runners.child.child_run.UNREAD", 0.1)
    spare, other = await pool.spares()
    await stopped(spare)
    file = tmp_path / "ran"

    assert await pool.result_of(WHO.format(file=str(file))) == other

    assert file.read_text() == "x"
    assert spare not in await pool.spares()


async def test_a_run_that_stops_itself_is_left_alone(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a process that has not read its work is checked."""
    monkeypatch.setattr("worker.engine.runners.child.child_run.UNREAD", 0.05)
    await pool.spares()
    link, stop = AnsweringWorker(), StopSignal()
    code = "import os, signal; ctx.save(os.getpid()); os.kill(os.getpid(), signal.SIGSTOP)"
    running = asyncio.create_task(pool.children.run(work("code", params={"code": code}), link, stop))
    await until(lambda: link.saved)
    await asyncio.sleep(0.3)
    assert not running.done()

    stop.request("cancel", 0)

    assert await running == Cancelled("requested")


async def test_a_run_can_be_stopped_before_its_spare_has_read_it(pool: Pool) -> None:
    for spare in await pool.spares():
        await stopped(spare)
    stop = StopSignal()
    running = asyncio.create_task(
        pool.children.run(work("code", params={"code": "result = 1"}), AnsweringWorker(), stop)
    )
    await asyncio.sleep(0.05)

    stop.request("cancel", 0)

    assert await running == Cancelled("requested")


async def test_spares_are_frozen_and_thawed_with_the_runs(
    plugin_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.engine.runners.child.child_run.UNREAD", 0.05)
    async with opened(max_freeze=timedelta(seconds=60)) as pool:
        pool.children.renewed(Lease.begun(timedelta(seconds=60), time.monotonic()))
        await pool.result_of("result = 1")
        spares = await pool.spares()
        pool.children.renewed(Lease.begun(timedelta(0), time.monotonic()))
        await until(lambda: all(pool.below()[pid].state == "T" for pid in spares))

        late = asyncio.create_task(pool.result_of("import os; result = os.getpid()"))
        await asyncio.sleep(0.3)
        assert not late.done()
        pool.children.renewed(Lease.begun(timedelta(seconds=60), time.monotonic()))

        assert await late in spares


async def test_spares_frozen_for_too_long_are_replaced(plugin_folder: Path) -> None:
    async with opened(max_freeze=timedelta(seconds=0.2)) as pool:
        pool.children.renewed(Lease.begun(timedelta(seconds=60), time.monotonic()))
        await pool.result_of("result = 1")
        old = await pool.spares()
        pool.children.renewed(Lease.begun(timedelta(0), time.monotonic()))
        await until(lambda: not set(old) & set(pool.below()))
        pool.children.renewed(Lease.begun(timedelta(seconds=60), time.monotonic()))

        # Those forked during the freeze may have been killed just now, with the same reason.
        assert not set(old) & set(await pool.spares())
        assert await pool.result_of("result = 1") == 1


async def test_the_zygotes_death_ends_its_spares_and_the_next_has_others(pool: Pool) -> None:
    old = await pool.spares()
    first = pool.children.zygote_pid
    assert first is not None

    os.kill(first, signal.SIGKILL)

    await until(lambda: pool.children.zygote_pid not in (None, first))
    assert not [pid for pid in old if (found := linux.process_of(pid)) and found.state != "Z"]
    assert await pool.result_of("result = 1") == 1
    assert not set(old) & set(await pool.spares())


async def test_a_run_that_the_zygotes_death_caught_unread_starts_with_the_next_one(
    pool: Pool, tmp_path: Path
) -> None:
    for spare in await pool.spares():
        await stopped(spare)
    file = tmp_path / "ran"
    running = asyncio.create_task(pool.result_of(WHO.format(file=str(file))))
    await asyncio.sleep(0.05)
    zygote = pool.children.zygote_pid
    assert zygote is not None

    os.kill(zygote, signal.SIGKILL)

    assert await running
    assert file.read_text() == "x"


async def test_closing_ends_the_spares(plugin_folder: Path) -> None:
    pool = Pool()
    await pool.result_of("result = 1")
    spares = await pool.spares()
    folders = [Path(os.readlink(f"/proc/{pid}/cwd")) for pid in spares]
    before = len(os.listdir("/proc/self/fd"))

    await pool.children.close()

    assert not [pid for pid in spares if linux.process_of(pid)]
    assert not [folder for folder in folders if folder.exists()]
    assert len(os.listdir("/proc/self/fd")) < before


async def test_spares_that_cannot_be_isolated_are_not_forked_in_a_loop(
    plugin_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened() as pool:
        await pool.result_of("result = 1")
        await pool.spares()
        numbers = []
        for _ in range(10):
            for pid in pool.below():
                os.kill(pid, signal.SIGKILL)
            numbers.append(len(pool.below()))
            await asyncio.sleep(0.05)
        # Half a second: they were killed once, and are replaced after a pause.
        assert numbers.count(0) >= 5
        await pool.spares()


async def test_a_replaced_file_of_the_system_replaces_the_spares(plugin_folder: Path, tmp_path: Path) -> None:
    """A resolv.conf that is replaced while spares wait, as by a change of the network."""
    file = tmp_path / "resolv.conf"
    file.write_text("old")
    rules = Planner([]).rules([], [])
    async with opened(sandbox=replace(rules, read=(*rules.read, str(file)))) as pool:
        await pool.result_of("result = 1")
        old = await pool.spares()
        file.with_name("new").write_text("new")
        file.with_name("new").rename(file)
        await until(lambda: not set(old) & set(pool.below()))

        assert await pool.result_of(f"result = open({str(file)!r}).read()") == "new"
