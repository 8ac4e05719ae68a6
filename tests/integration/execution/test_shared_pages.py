"""A zygote prepared for many runs: they work as ever, copy few pages, and the zygote is as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.answering import AnsweringWorker
from tests.fakes.running import claims, work
from worker.clock import SystemClock
from worker.execution.runners.child.pool import ChildPool
from worker.execution.runners.child.sandbox import Planner
from worker.execution.runners.contract import StopSignal
from worker.runs.outcome import Succeeded

FAULTS = "import resource; result = resource.getrusage(resource.RUSAGE_SELF).ru_minflt"
# Prints what preparing leaves behind, in a process of its own.
LEFT = """
import logging, os, signal, sys, threading
from worker.execution.runners.child import shared_pages

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
shared_pages.rehearse()
shared_pages.share_pages()
assert state() == before, (before, state())
text, number, kind = "a text " + str(os.getpid()), 10**30, type("Kind", (), {})
found = [{"x": [text, number]}, kind(), lambda: text]
assert eval("found[2]()", {"found": found}) is text
del found, kind
print("same")
sys.stdout.flush()
os._exit(0)
"""


async def faults(plugin_folder: Path, share_after: int | None, *, runs: int = 2) -> int:
    """The page faults of the last of some runs until its handler is called, without spares."""
    children = ChildPool(SystemClock(), share_after=share_after)
    children.start()
    try:
        for _ in range(runs):
            outcome = await children.run(
                work("code", params={"code": FAULTS}), AnsweringWorker(), StopSignal()
            )
    finally:
        await children.close()
    assert isinstance(outcome, Succeeded)
    return int(outcome.result or "")


async def test_a_run_copies_fewer_pages(plugin_folder: Path) -> None:
    """The control is a zygote that was not prepared. Python 3.11 has no immortal objects."""
    ratio = await faults(plugin_folder, 0) / await faults(plugin_folder, None)

    assert ratio < (0.75 if sys.version_info >= (3, 12) else 1.0)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.11 has no immortal objects")
async def test_pages_are_shared_only_once_some_runs_have_begun(plugin_folder: Path) -> None:
    before, after = await faults(plugin_folder, 3, runs=3), await faults(plugin_folder, 3, runs=4)

    assert after < 0.85 * before


def test_the_zygote_is_as_it_was() -> None:
    done = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stdout, done.stderr) == (0, "same\n", "")


@pytest.fixture(scope="module")
async def prepared(plugin_folder: Path) -> AsyncIterator[ChildPool]:
    children = ChildPool(SystemClock(), sandbox=Planner([]).rules([], []), share_after=0, spares=1)
    children.start()
    yield children
    await children.close()


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
        # Nothing of the rehearsal is left in a run.
        ("import sys; result = [name for name in sys.modules if 'rehearsal' in name]", []),
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
