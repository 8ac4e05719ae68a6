"""What counts towards a run's memory cap besides what it has mapped itself, and ends with the run."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest

from tests.fakes.answering import AnsweringWorker
from tests.fakes.running import work
from tests.fakes.unprivileged import in_account
from worker.engine.runners.child import linux
from worker.engine.runners.child.pool import ChildPool
from worker.engine.runners.contract import StopSignal
from worker.model.runs.outcome import Failed, Outcome, Succeeded

MIB = 1024 * 1024
CAP = 128 * MIB
# No page of it is mapped.
IN_MEMORY = """
import os, time
held = os.memfd_create("hidden")
for _ in range(200):
    os.write(held, bytes(1 << 20))
"""
# A grandchild of the handler that the zygote adopts, since the handler's process is no subreaper any more.
LEAVES = """
import ctypes, os, select, time
ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)
watched, held = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        {change}
        taken = b"x" * ({taken} << 20)
        time.sleep(60)
    os._exit(0)
os.close(held)
os.wait()
result = "ended" if select.select([watched], [], [], {patience})[0] else "alive"
"""


async def run(children: ChildPool, code: str, memory: int | None) -> Outcome:
    given = work("code", params={"code": code}, memory=memory)
    return await children.run(given, AnsweringWorker(), StopSignal())


async def test_a_file_in_memory_counts_towards_the_cap(children: ChildPool) -> None:
    outcome = await run(children, IN_MEMORY + "time.sleep(60)", CAP)

    assert isinstance(outcome, Failed)
    assert outcome.reason == "out_of_memory"
    # The control: without a cap it gets all of it.
    assert await run(children, IN_MEMORY + "result = os.fstat(held).st_blocks >> 11", None) == Succeeded(
        "200"
    )


@contextlib.contextmanager
def holding_a_file_in_memory(*, mapped: bool = False, hidden: bool = False) -> Iterator[int]:
    """A process that has 200 MiB in such a file."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        held = os.memfd_create("hidden")
        for _ in range(200):
            os.write(held, bytes(MIB))
        if mapped:
            import mmap

            view = mmap.mmap(held, 200 * MIB)
            view.find(b"x")
        (linux.hide_memory if hidden else linux.show_memory)()
        os.write(writer, b"x")
        signal.pause()
    os.read(reader, 1)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)


def counted(pid: int, own: int) -> dict[str, int]:
    """What a process uses: without its files, as the control, and with them."""
    files = linux.MemoryFiles()
    files.look([pid])
    return {
        "without": linux.memory([pid], own=own, limit=0) // MIB,
        "with": linux.memory([pid], own=own, limit=0, files=files.size([pid])) // MIB,
        "files": files.size([pid, pid]) // MIB,
    }


def test_a_file_in_memory_is_found_among_the_descriptors() -> None:
    own = linux.resident(os.getpid())
    with holding_a_file_in_memory() as pid:
        found = counted(pid, own)

    assert found["files"] == 200
    assert found["with"] == found["without"] + 200


def test_a_file_that_is_mapped_counts_once() -> None:
    own = linux.resident(os.getpid())
    with holding_a_file_in_memory(mapped=True) as pid:
        found = counted(pid, own)

    assert found["files"] == 200
    assert found["with"] == found["without"] >= 200


@pytest.mark.parametrize("hidden", [False, True])
def test_the_account_can_look_only_if_the_process_does_not_hide_its_memory(hidden: bool) -> None:
    """So a run in the sandbox, which protects it from other runs, does not."""

    def look() -> int:
        files = linux.MemoryFiles()
        with holding_a_file_in_memory(hidden=hidden) as pid:
            files.look([pid])
            return files.size([pid]) // MIB

    assert in_account(look) == (0 if hidden else 200)


async def test_a_run_in_the_sandbox_does_not_hide_its_memory(children: ChildPool) -> None:
    code = "import ctypes; result = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)"

    assert await run(children, code, None) == Succeeded("1")


def test_a_look_is_bounded_and_the_next_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a run with thousands of descriptors does not keep the zygote from its lease."""
    read: list[str] = []
    readlink = os.readlink

    def counted_readlink(path: str) -> str:
        read.append(path)
        return readlink(path)

    files = linux.MemoryFiles()
    with holding_a_file_in_memory() as pid:
        monkeypatch.setattr(os, "readlink", counted_readlink)
        monkeypatch.setattr(linux, "MAX_LOOKED_AT", 2)
        looks = 0
        while not files.size([pid]):
            before = len(read)
            files.look([pid])
            looks += 1
            assert len(read) - before <= 2
            assert looks < 1000

        assert looks > 1
        files.look([])
        assert files.size([pid]) == 0


async def test_a_process_that_leaves_its_run_counts_towards_the_cap(children: ChildPool) -> None:
    outcome = await run(children, LEAVES.format(change="", taken=200, patience=60), CAP)

    assert isinstance(outcome, Failed)
    assert outcome.reason == "out_of_memory"
    assert left_behind(children) <= 1  # the spare


async def test_a_process_that_leaves_run_and_session_is_killed(children: ChildPool) -> None:
    code = LEAVES.format(change="os.setsid()", taken=1, patience=30)

    assert await run(children, code, CAP) == Succeeded('"ended"')


async def test_the_control_leaves_it_alone_without_a_cap(children: ChildPool) -> None:
    """It is no descendant of the run, whose memory alone was counted; and it ends with the run at last."""
    code = LEAVES.format(change="os.setsid()", taken=1, patience=0.5)

    assert await run(children, code, None) == Succeeded('"alive"')
    assert left_behind(children) <= 1


def left_behind(children: ChildPool) -> int:
    assert children.zygote_pid is not None
    return len(linux.descendants(linux.processes(), [children.zygote_pid]))
