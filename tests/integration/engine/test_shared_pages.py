"""A zygote prepared for many runs: they work as ever, copy few pages, and the zygote is as it was."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.answering import AnsweringWorker
from tests.fakes.running import child_pool, claims, work
from worker.engine.runners.child.messages import Setup
from worker.engine.runners.child.pool import ChildPool
from worker.engine.runners.child.sandbox import Planner
from worker.engine.runners.contract import StopSignal
from worker.model.runs.outcome import Succeeded

FAULTS = "import resource; result = resource.getrusage(resource.RUSAGE_SELF).ru_minflt"
# Prints what preparing leaves behind, in a process of its own.
LEFT = """
import logging, os, signal, sys, threading
from worker.engine.runners.child import shared_pages

def state():
    return {
        "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "streams": [id(sys.stdin), id(sys.stdout), id(sys.stderr)],
        "logging": [logging.getLogger().level, list(map(id, logging.getLogger().handlers))],
        "signals": [repr(signal.getsignal(number)) for number in range(1, 32)],
    }

signal.signal(signal.SIGTERM, signal.SIG_IGN)
before = state()
slices = len(list(shared_pages.share_pages()))
assert slices > 20 or sys.version_info < (3, 12), slices
assert state() == before, (before, state())
text, number, kind = "a text " + str(os.getpid()), 10**30, type("Kind", (), {})
found = [{"x": [text, number]}, kind(), lambda: text]
assert eval("found[2]()", {"found": found}) is text
del found, kind
print("same")
sys.stdout.flush()
os._exit(0)
"""


# A zygote that shares its pages for ever in slices, or in one that ends when a pipe is written to.
SHARES = """
import os, sys
from worker.engine.runners.child import zygote

def share_pages():
    if sys.argv[3] == "at once":
        os.read(int(sys.argv[4]), 1)
    while sys.argv[3] == "in slices":
        yield

zygote.share_pages = share_pages
zygote.main()
"""


async def faults(plugin_folder: Path, share_after: int | None) -> list[int]:
    """The page faults of 16 runs until their handlers are called, one after another, without spares.

    The zygote may still share its pages while the first of them run.
    """
    found = []
    async with child_pool(share_after=share_after) as children:
        for _ in range(16):
            outcome = await children.run(
                work("code", params={"code": FAULTS}), AnsweringWorker(), StopSignal()
            )
            assert isinstance(outcome, Succeeded)
            found.append(int(outcome.result or ""))
    return found


async def test_a_run_copies_fewer_pages(plugin_folder: Path) -> None:
    """The control is a zygote that was not prepared. Python 3.11 has no immortal objects."""
    ratio = min(await faults(plugin_folder, 0)) / min(await faults(plugin_folder, None))

    assert ratio < (0.75 if sys.version_info >= (3, 12) else 1.0)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.11 has no immortal objects")
async def test_pages_are_shared_only_once_some_runs_have_begun(plugin_folder: Path) -> None:
    found = await faults(plugin_folder, 3)

    assert min(found[3:]) < 0.85 * min(found[:3]), found


def test_the_zygote_is_as_it_was() -> None:
    done = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stdout, done.stderr) == (0, "same\n", "")


@pytest.mark.parametrize("slices", ["in slices", "at once"])
def test_runs_are_frozen_while_pages_are_shared(slices: str, tmp_path: Path) -> None:
    """The control shares them at once: then nothing is frozen before the end of that."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(30)
    go_on, over = os.pipe()
    setup = Setup(parent=os.getpid(), folder=str(tmp_path), max_freeze=600, share_after=0)
    command = [sys.executable, "-c", SHARES, str(theirs.fileno()), setup.as_json(), slices, str(go_on)]
    with ours, theirs, subprocess.Popen(command, pass_fds=(theirs.fileno(), go_on)) as zygote:
        assert json.loads(ours.recv(10_000))["op"] == "ready"
        ours.send(json.dumps({"op": "lease", "freeze_at": time.monotonic()}).encode())
        try:
            if slices == "in slices":
                assert json.loads(ours.recv(10_000))["op"] == "frozen"
            else:
                assert not select.select([ours], [], [], 0.5)[0]
                os.write(over, b"x")
                assert json.loads(ours.recv(10_000))["op"] == "frozen"
        finally:
            zygote.kill()
            for number in (go_on, over):
                os.close(number)


@pytest.fixture(scope="module")
async def prepared(plugin_folder: Path) -> AsyncIterator[ChildPool]:
    async with child_pool(sandbox=Planner([]).rules([], []), share_after=0, spares=1) as children:
        yield children


async def test_runs_of_a_prepared_zygote_work_as_ever(prepared: ChildPool) -> None:
    for _ in range(3):
        link = AnsweringWorker()
        given = work("ok", claims=claims(max_tokens="5"), checkpoint={"done": 3})

        outcome = await prepared.run(given, link, StopSignal())

        assert isinstance(outcome, Succeeded), outcome
        found: dict[str, Any] = json.loads(outcome.result or "")
        assert found["settings"] == {"model_version": "gpt-4", "max_tokens": 5}
        assert found["token"] == "token-one"
        assert ("info", "stdout", "printed") in link.lines


@pytest.mark.parametrize(
    ("code", "result"),
    [
        ("import threading; result = threading.active_count()", 2),
        # Modules that the zygote has imported can be replaced, changed and collected.
        (
            "import gc, json, sys; del sys.modules['json'], json; gc.collect(); import json as new; "
            "result = new.loads('1')",
            1,
        ),
        ("import gc, decimal; decimal.x = [1]; del decimal.x; result = gc.collect() >= 0", True),
        ("import os; pid = os.fork() or os._exit(7); result = os.waitpid(pid, 0)[1] >> 8", 7),
        ("import random; result = len({random.random() for _ in range(5)})", 5),
        ("import subprocess, sys; result = subprocess.run([sys.executable, '-c', '1']).returncode", 0),
    ],
)
async def test_a_run_of_a_prepared_zygote_may_do_anything(
    prepared: ChildPool, code: str, result: Any
) -> None:
    outcome = await prepared.run(work("code", params={"code": code}), AnsweringWorker(), StopSignal())

    assert isinstance(outcome, Succeeded), outcome
    assert json.loads(outcome.result or "null") == result
