"""Handlers that do what handlers must not do: each ends alone, with an outcome of its own."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.answering import AnsweringWorker
from tests.fakes.running import until, work
from worker.engine.runners.child import linux
from worker.engine.runners.child.pool import ChildPool
from worker.engine.runners.contract import StopSignal
from worker.engine.runners.output import CAP
from worker.model.runs.outcome import Failed, Outcome, Succeeded, TimedOut

KILL = "import os, signal; os.kill(os.getpid(), signal.SIG"
HUGE = "result = 'x' * 50_000_000"


@pytest.fixture(autouse=True)
async def _neighbour_and_worker_are_unharmed(children: ChildPool) -> Any:
    """After each test nothing of its run is left, and two other runs succeed in the same zygote.

    The first may have the spare of before; the second has one that was forked after it.
    """
    if not left_behind(children):
        await with_its_spare(children)
    before = os.getpid(), len(os.listdir("/proc/self/fd"))
    yield
    await with_its_spare(children)
    await with_its_spare(children)
    assert before == (os.getpid(), len(os.listdir("/proc/self/fd")))


async def with_its_spare(children: ChildPool) -> None:
    """Have the pool fork its spare; besides it there is nothing below the zygote."""
    assert isinstance(await children.run(work("ok_blocking"), AnsweringWorker(), StopSignal()), Succeeded)
    assert len(left_behind(children)) <= 1
    await until(lambda: len(left_behind(children)) == 1)


def left_behind(children: ChildPool) -> set[int]:
    """All processes below the zygote."""
    assert children.zygote_pid is not None
    return linux.descendants(linux.processes(), [children.zygote_pid])


async def run(
    children: ChildPool, handler: str, *, link: AnsweringWorker | None = None, **params: Any
) -> Outcome:
    return await children.run(work(handler, params=params), link or AnsweringWorker(), StopSignal())


@pytest.mark.parametrize(
    ("handler", "params", "detail"),
    [
        ("code", {"code": "import os; os._exit(0)"}, "exit code 0"),
        ("code", {"code": "import os; os._exit(3)"}, "exit code 3"),
        ("code", {"code": "import sys; sys.exit(0)"}, "exit code 0"),
        ("code", {"code": "import sys; sys.exit(3)"}, "exit code 3"),
        ("code_async", {"code": "import sys; sys.exit(0)"}, "exit code 0"),
        ("code_async", {"code": "import sys; sys.exit(3)"}, "exit code 3"),
        ("sys_exit_in_a_task", {}, "exit code 4"),
        ("code", {"code": "import sys; sys.exit('last words')"}, "exit code 1"),
        ("segfault", {}, "signal SIGSEGV"),
        ("code", {"code": f"import faulthandler; faulthandler.disable(); {KILL}SEGV)"}, "signal SIGSEGV"),
        ("code", {"code": f"{KILL}KILL)"}, "signal SIGKILL"),
        ("code", {"code": "import os; os.closerange(0, 4096)"}, "its channel to the worker was closed"),
    ],
)
async def test_a_process_that_ends_early_is_handler_exited(
    children: ChildPool, handler: str, params: dict[str, Any], detail: str
) -> None:
    outcome = await run(children, handler, **params)

    assert isinstance(outcome, Failed)
    assert (outcome.reason, outcome.detail) == ("handler_exited", detail)
    assert detail in outcome.error.message


@pytest.mark.parametrize(
    ("handler", "code", "kind", "message"),
    [
        ("code_async", "raise KeyboardInterrupt", "KeyboardInterrupt", ""),
        ("code", "raise BaseException('odd')", "BaseException", "odd"),
        ("bad_message", "", "process_jobs.bad_message.<locals>.Odd", "(its message cannot be formatted)"),
        (
            "code",
            r"raise ValueError('a \udc80 lone \0 NUL')",
            "ValueError",
            "a ? lone � NUL",
        ),
        ("recurses", "", "RecursionError", "maximum recursion depth exceeded"),
    ],
)
async def test_whatever_is_raised_is_an_error_of_the_handler(
    children: ChildPool, handler: str, code: str, kind: str, message: str
) -> None:
    outcome = await run(children, handler, **({"code": code} if code else {}))

    assert isinstance(outcome, Failed)
    assert outcome.reason == "error"
    assert outcome.error.type == kind
    assert outcome.error.message.startswith(message)
    assert len(outcome.error.trace) < 20_000


async def test_recursion_without_a_limit_is_a_crash(children: ChildPool) -> None:
    outcome = await run(children, "recurses_deeper")

    assert isinstance(outcome, Failed)
    # From 3.12 on the interpreter guards its own stack and raises RecursionError in time.
    assert (outcome.reason, outcome.detail) in [("handler_exited", "signal SIGSEGV"), ("error", None)]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("result = float('nan')", "the result is not JSON: NaN and infinity cannot be written as JSON"),
        ("result = [float('-inf')]", "the result is not JSON: NaN and infinity cannot be written as JSON"),
        (r"result = 'a \ud800 surrogate'", "the result contains a lone surrogate, which is not valid text"),
        (
            r"result = {'key': '\0'}",
            "the result contains a NUL character, which databases cannot store",
        ),
        (HUGE, "the result is 47.7 MiB of JSON; the maximum is 1 MiB"),
        ("result = object()", "the result is not JSON: a object cannot be written as JSON"),
        (
            "result = {(1, 2): 3}",
            "the result is not JSON: keys must be str, int, float, bool or None, not tuple",
        ),
        ("result = []; result.append(result)", "the result is not JSON: Circular reference detected"),
        ("result = b'bytes'", "the result is not JSON: a bytes cannot be written as JSON"),
        ("result = 10**5000", "the result is not JSON: Exceeds the limit"),
    ],
)
async def test_a_result_that_cannot_be_stored_is_result_invalid(
    children: ChildPool, code: str, message: str
) -> None:
    outcome = await run(children, "code", code=code)

    assert isinstance(outcome, Failed)
    assert outcome.reason == "result_invalid"
    assert outcome.error.message.startswith(message)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("from process_jobs import Report; result = Report()", '{"at":1}'),
        (r"result = {'text': 'a \\u0000 that is none'}", '{"text":"a \\\\u0000 that is none"}'),
    ],
)
async def test_a_result_that_only_looks_bad_is_stored(children: ChildPool, code: str, text: str) -> None:
    assert await run(children, "code", code=code) == Succeeded(text)


@pytest.mark.parametrize(
    ("handler", "result"),
    [
        ("changes_everything", '"changed"'),
        ("leaves_threads", '"left"'),
        ("leaves_tasks", '"left"'),
        ("forks_fifty", '"forked"'),
        ("fork_returns", '"from the run"'),
        ("fork_returns_async", '"from the run, 0"'),
        ("fork_exits_async", "5"),
    ],
)
async def test_what_a_handler_leaves_behind_ends_with_it(
    children: ChildPool, handler: str, result: str
) -> None:
    assert await run(children, handler) == Succeeded(result)
    assert len(left_behind(children)) <= 1  # the spare


async def test_files_that_take_the_channels_number_are_not_written_to(
    children: ChildPool, tmp_path: Path
) -> None:
    outcome = await run(children, "closes_and_opens", folder=str(tmp_path))

    assert isinstance(outcome, Failed)
    assert [path.name for path in tmp_path.iterdir() if path.stat().st_size] == []


@pytest.mark.parametrize("handler", ["deaf", "holds_gil", "sleeps_in_c", "stubborn"])
async def test_what_cannot_be_interrupted_is_killed_at_the_end_of_the_grace(
    children: ChildPool, tmp_path: Path, handler: str
) -> None:
    stop = StopSignal()
    running = work(handler, params={"folder": str(tmp_path)})

    task = asyncio.create_task(children.run(running, AnsweringWorker(), stop))
    await until((tmp_path / "up").exists)
    asked = time.monotonic()
    stop.request("timeout", 0.5)

    assert isinstance(await task, TimedOut)
    assert 0.2 < time.monotonic() - asked < 3


async def test_a_run_over_its_cap_of_memory_is_killed(children: ChildPool) -> None:
    greedy = work("takes_memory", params={"count": 200}, memory=128 * 1024 * 1024)

    outcome = await children.run(greedy, AnsweringWorker(), StopSignal())

    assert isinstance(outcome, Failed)
    assert outcome.reason == "out_of_memory"


async def test_memory_of_a_runs_own_processes_counts(children: ChildPool) -> None:
    greedy = work("children_take_memory", params={"count": 2}, memory=150 * 1024 * 1024)

    outcome = await children.run(greedy, AnsweringWorker(), StopSignal())

    assert isinstance(outcome, Failed)
    assert outcome.reason == "out_of_memory"
    assert "150 MiB" in outcome.error.message


async def test_memory_that_is_taken_faster_than_watched_is_refused_by_the_kernel(children: ChildPool) -> None:
    params = {"code": "result = len(bytearray(4_000_000_000))"}
    greedy = work("code", params=params, memory=256 * 1024 * 1024)

    outcome = await children.run(greedy, AnsweringWorker(), StopSignal())

    assert isinstance(outcome, Failed)
    assert outcome.reason == "out_of_memory"


async def test_memory_below_the_cap_is_left_alone(children: ChildPool) -> None:
    modest = work("takes_memory", params={"count": 3}, memory=256 * 1024 * 1024)
    link = AnsweringWorker()

    assert await children.run(modest, link, StopSignal()) == Succeeded('"3 times 10 MiB"')
    assert link.peak_memory > 30 * 1024 * 1024


async def test_a_flood_of_output_keeps_its_head_and_tail_and_counts_the_rest(children: ChildPool) -> None:
    link = AnsweringWorker()

    assert await run(children, "prints", link=link, count=50_000) == Succeeded('"printed"')

    assert link.lines[0] == ("info", "stdout", "first")
    assert link.lines[-1] == ("info", "stdout", "last")
    told = next(text for level, source, text in link.lines if source == "log")
    dropped = int(told.split()[0])
    assert dropped + len(link.lines) - 1 == 50_002
    assert CAP * 0.8 < len(link.text()) <= CAP + 200


async def test_the_worker_has_its_memory_back_after_50_mb_of_output_and_a_huge_result(
    children: ChildPool,
) -> None:
    async def once(lines: int) -> None:
        assert await run(children, "prints", count=lines) == Succeeded('"printed"')
        assert isinstance(await run(children, "code", code=HUGE), Failed)

    await once(20_000)
    gc.collect()
    before = linux.resident(os.getpid())

    await once(500_000)

    gc.collect()
    assert linux.resident(os.getpid()) - before < 8 * 1024 * 1024


async def test_a_crash_keeps_its_last_words(children: ChildPool) -> None:
    link = AnsweringWorker()

    await run(children, "segfault", link=link)

    assert ("info", "stdout", "about to crash") in link.lines
    assert "Fatal Python error: Segmentation fault" in link.text()
    assert "process_jobs.py" in link.text()


async def test_output_below_python_is_kept_line_by_line(children: ChildPool) -> None:
    link = AnsweringWorker()

    outcome = await run(children, "writes_raw", link=link)

    assert isinstance(outcome, Failed)
    assert sorted(link.lines) == [
        ("error", "log", "the handler ended without a result: exit code 7"),
        ("error", "stderr", ""),
        ("error", "stderr", "words in two writes"),
        ("info", "stdout", "not � text, no line endfrom a subprocess"),
    ]
