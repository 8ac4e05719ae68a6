"""Worker or zygote killed: no process of a run outlives them, in whatever session it is."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.fakes.answering import AnsweringWorker
from tests.fakes.hosting import Host, all_silent_within, all_up
from tests.fakes.running import child_pool, until, work
from worker.engine.runners.child import linux, pool
from worker.engine.runners.child.messages import Setup
from worker.engine.runners.child.pool import ChildPool
from worker.engine.runners.child.zygote_handle import ZygoteHandle
from worker.engine.runners.contract import StopSignal
from worker.errors import Busy
from worker.model.runs.outcome import HandedBack, Lost, Outcome, Succeeded
from worker.store.engine import lock_sqlite_file
from worker.telemetry.events import Emitted


@pytest.fixture
async def own_children(plugin_folder: Path) -> AsyncIterator[ChildPool]:
    """A runner for one test alone, which may kill its zygote."""
    async with child_pool() as runner:
        yield runner


async def family_of(children: ChildPool, folder: Path) -> asyncio.Task[Outcome]:
    """A run whose processes all write into the folder."""
    given = work("family", params={"folder": str(folder)})
    running = asyncio.create_task(children.run(given, AnsweringWorker(), StopSignal()))
    await all_up(folder)
    return running


async def replace_zygote(children: ChildPool) -> None:
    """Kill the zygote, and wait for the next one."""
    children.attach()
    first = children.zygote_pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await until(lambda: children.zygote_pid not in (None, first))


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Hosts that a test has started, to be ended after it."""
    started: list[Host] = []
    yield started
    for host in started:
        host.end()


async def test_the_workers_death_ends_every_process_of_its_runs(
    plugin_folder: Path, tmp_path: Path, hosts: list[Host]
) -> None:
    host = Host(plugin_folder, tmp_path)
    hosts.append(host)
    assert host.heard() == {"saved": {"step": 1}}
    await all_up(tmp_path)
    below = linux.descendants(linux.processes(), [host.zygote])
    assert len(below) == 4

    host.process.send_signal(signal.SIGKILL)

    await all_silent_within(tmp_path, 0.8)
    await until(lambda: linux.process_of(host.zygote) is None or gone(host.zygote), within=2)
    assert not [pid for pid in below if not gone(pid)]


def gone(pid: int) -> bool:
    process = linux.process_of(pid)
    return process is None or process.state == "Z"


async def test_a_stopped_zygote_does_not_keep_the_runs_of_a_dead_worker_alive_for_long(
    plugin_folder: Path, tmp_path: Path, hosts: list[Host]
) -> None:
    host = Host(plugin_folder, tmp_path)
    hosts.append(host)
    await all_up(tmp_path)
    os.kill(host.zygote, signal.SIGSTOP)
    host.process.kill()
    os.kill(host.zygote, signal.SIGCONT)

    await all_silent_within(tmp_path, 0.8)


async def test_the_zygotes_death_loses_its_runs_and_another_takes_its_place(
    own_children: ChildPool, tmp_path: Path, emitted: list[Emitted]
) -> None:
    running = await family_of(own_children, tmp_path)
    first = own_children.zygote_pid
    assert first is not None
    below = linux.descendants(linux.processes(), [first])

    os.kill(first, signal.SIGKILL)

    killed = time.monotonic()
    assert isinstance(await running, Lost)
    assert time.monotonic() - killed < 1
    assert [pid for pid in below if not gone(pid)] == []
    outcome = await own_children.run(work("ok_blocking"), AnsweringWorker(), StopSignal())
    assert isinstance(outcome, Succeeded)
    assert own_children.zygote_pid != first
    assert [event.event.name for event in emitted] == ["zygote.died", "zygote.started"]


async def test_a_zygote_that_dies_while_idle_is_replaced(own_children: ChildPool) -> None:
    await replace_zygote(own_children)

    outcome = await own_children.run(work("ok_blocking"), AnsweringWorker(), StopSignal())

    assert isinstance(outcome, Succeeded)


async def test_a_zygote_that_cannot_be_replaced_at_once_is_replaced_later(
    own_children: ChildPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What kills one, such as a lack of memory or processes, may also keep the next one from starting."""
    refused = list[Setup]()

    def refuse(setup: Setup) -> ZygoteHandle:
        refused.append(setup)
        if len(refused) < 3:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return ZygoteHandle(setup)

    monkeypatch.setattr(pool, "ZygoteHandle", refuse)
    monkeypatch.setattr(pool, "RESTART", 0.01)
    await replace_zygote(own_children)

    outcome = await own_children.run(work("ok_blocking"), AnsweringWorker(), StopSignal())

    assert isinstance(outcome, Succeeded)
    assert len(refused) == 3


async def test_a_zygotes_death_leaves_the_workers_own_children_alone(own_children: ChildPool) -> None:
    ours = subprocess.Popen(["sleep", "60"])
    try:
        await replace_zygote(own_children)

        assert ours.poll() is None
    finally:
        ours.kill()
        ours.wait()


async def test_the_lock_falls_only_when_the_last_process_of_a_run_is_gone(
    plugin_folder: Path, tmp_path: Path, hosts: list[Host]
) -> None:
    path, folder = tmp_path / "lock", tmp_path / "family"
    folder.mkdir()
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        host = Host(plugin_folder, folder, lock=lock.fileno())
        hosts.append(host)
        await all_up(folder)

    with open(path) as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        host.process.kill()
        await until(lambda: locked(other.fileno()), within=2)
    await all_silent_within(folder, 0)


def locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


async def test_a_run_cannot_release_the_lock_of_the_database(
    plugin_folder: Path, tmp_path: Path, hosts: list[Host]
) -> None:
    """The run gives up and closes all it has. A second worker is refused while the first one lives,
    and while the run of a dead one does."""
    url = f"sqlite:///{tmp_path}/worker.db"
    lock = lock_sqlite_file(url)
    host = Host(plugin_folder, tmp_path, handler="drops_locks", lock=lock.fd)
    hosts.append(host)
    lock.release()

    assert host.heard() == {"saved": {"dropped": ["worker.db.lock"]}}

    with pytest.raises(Busy, match="another worker"):
        lock_sqlite_file(url)
    [run] = linux.descendants(linux.processes(), [host.zygote])
    # Neither kills or ends the run before the lock is tried.
    for pid in (host.zygote, run):
        os.kill(pid, signal.SIGSTOP)
    host.process.kill()
    host.process.wait()
    with pytest.raises(Busy, match="another worker"):
        lock_sqlite_file(url)
    assert not gone(run)
    os.kill(host.zygote, signal.SIGCONT)
    await until(lambda: lockable(url), within=2)
    # Its descriptors are closed a moment before it is gone.
    await until(lambda: gone(run), within=2)


def test_whoever_inherits_the_descriptor_of_the_lock_can_release_it(tmp_path: Path) -> None:
    """The control: what a run did while it still had the worker's own descriptor."""
    url = f"sqlite:///{tmp_path}/worker.db"
    lock = lock_sqlite_file(url)
    release = f"import fcntl; fcntl.flock({lock.fd}, fcntl.LOCK_UN)"
    subprocess.run([sys.executable, "-c", release], pass_fds=[lock.fd], check=True)

    lock_sqlite_file(url).release()

    lock.release()


async def test_what_outlives_worker_and_zygote_keeps_the_next_worker_out(
    plugin_folder: Path, tmp_path: Path, hosts: list[Host]
) -> None:
    url = f"sqlite:///{tmp_path}/worker.db"
    lock = lock_sqlite_file(url)
    host = Host(plugin_folder, tmp_path, handler="forks_a_holder", lock=lock.fd)
    hosts.append(host)
    lock.release()
    holder = host.heard()["saved"]["holder"]
    try:
        # The zygote cannot sweep up: it stands still until it is killed.
        os.kill(host.zygote, signal.SIGSTOP)
        host.process.kill()
        host.process.wait()
        os.kill(host.zygote, signal.SIGKILL)
        await until(lambda: gone(host.zygote), within=2)

        with pytest.raises(Busy, match="runs of a worker that died"):
            lock_sqlite_file(url)
    finally:
        os.kill(holder, signal.SIGKILL)
    await until(lambda: lockable(url), within=2)


def lockable(url: str) -> bool:
    try:
        lock_sqlite_file(url).release()
    except Busy:
        return False
    return True


async def test_closing_ends_what_still_runs(own_children: ChildPool, tmp_path: Path) -> None:
    running = await family_of(own_children, tmp_path)

    await own_children.close()

    assert isinstance(await running, Lost)
    await all_silent_within(tmp_path, 0)


async def test_cancelling_the_runner_kills_the_run(own_children: ChildPool, tmp_path: Path) -> None:
    running = await family_of(own_children, tmp_path)

    running.cancel()

    await asyncio.gather(running, return_exceptions=True)
    await all_silent_within(tmp_path, 0.8)


async def test_a_run_that_ends_takes_its_family_with_it(own_children: ChildPool, tmp_path: Path) -> None:
    params = {"folder": str(tmp_path), "count": 1}

    outcome = await own_children.run(work("family", params=params), AnsweringWorker(), StopSignal())

    assert outcome == Succeeded(None)
    await all_silent_within(tmp_path, 0)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import os; os._exit(1)", "preload: the zygote died while importing this"),
        ("raise ValueError('no')", "preload: ValueError: no"),
        (
            "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()",
            "preload: its import",
        ),
    ],
)
async def test_a_preloaded_module_that_breaks_the_zygote_is_told_and_left_out(
    plugin_folder: Path, emitted: list[Emitted], source: str, error: str
) -> None:
    name = f"breaks_{abs(hash(source))}"
    (plugin_folder / f"{name}.py").write_text(source)
    async with child_pool(preload=[name]) as children:
        outcome = await children.run(work("ok_blocking"), AnsweringWorker(), StopSignal())

    assert isinstance(outcome, Succeeded)
    (told,) = [event.fields for event in emitted if event.event.name == "handler.broken"]
    assert told["distribution"] == name
    assert told["error"].startswith(error)


async def test_a_preloaded_distribution_is_there_before_its_runs(plugin_folder: Path) -> None:
    async with child_pool(preload=["acme-jobs"]) as children:
        outcome = await children.run(work("preloaded"), AnsweringWorker(), StopSignal())

    assert outcome == Succeeded("true")


async def test_a_run_that_waits_for_a_zygote_can_be_stopped(own_children: ChildPool) -> None:
    stop = StopSignal()
    stop.request("drain", 10)

    assert await own_children.run(work("ok"), AnsweringWorker(), stop) == HandedBack()


def test_a_worker_that_dies_before_its_zygote_is_ready_leaves_no_folder_and_no_traceback(tmp_path: Path):
    folder = tmp_path / "runs"
    folder.mkdir()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.close()
    setup = {"folder": str(folder), "parent": os.getpid(), "lock": None, "environment": ["PATH"]}
    setup |= {"preload": [], "max_freeze": 60.0}
    command = [
        sys.executable,
        "-P",
        "-m",
        "worker.engine.runners.child.zygote",
        str(theirs.fileno()),
        json.dumps(setup),
    ]

    with theirs:
        done = subprocess.run(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, capture_output=True, timeout=60
        )

    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert not folder.exists()
