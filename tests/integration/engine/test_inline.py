"""Handlers inline in the worker's loop: what they can do to it, and what they cannot."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.answering import AnsweringWorker
from tests.fakes.running import until, work
from worker.clock import SystemClock
from worker.engine.runners.contract import StopSignal
from worker.engine.runners.inline import Inline
from worker.model.runs.outcome import Cancelled, Failed, HandedBack, Lost, Outcome, Succeeded, TimedOut
from worker.telemetry.events import Emitted

pytestmark = pytest.mark.usefixtures("plugin_folder")

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="fresh")


@pytest.fixture
def inline() -> Inline:
    return Inline(SystemClock())


async def run(inline: Inline, handler: str, *, link: AnsweringWorker | None = None, **params: Any) -> Outcome:
    return await inline.run(work(handler, params=params), link or AnsweringWorker(), StopSignal())


async def test_context_variables_are_fresh(inline: Inline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    VARIABLE.set("the worker's own")

    async def look(ctx: Any) -> None:
        seen.append(VARIABLE.get())

    import process_jobs  # type: ignore[import-not-found]

    monkeypatch.setattr(process_jobs.ok, "function", look)
    await run(inline, "ok")

    assert seen == ["fresh"]


@pytest.mark.parametrize(
    ("code", "reason", "detail"),
    [
        ("import sys; sys.exit(3)", "handler_exited", "exit code 3"),
        ("raise KeyboardInterrupt", "error", None),
        ("import httpx; raise httpx.ConnectError('connection refused')", "error", None),
    ],
)
async def test_what_is_raised_ends_the_run_and_not_the_worker(
    inline: Inline, code: str, reason: str, detail: str | None
) -> None:
    outcome = await run(inline, "code_async", code=code)

    assert isinstance(outcome, Failed)
    assert (outcome.reason, outcome.detail) == (reason, detail)


async def test_a_handler_that_listens_ends_by_itself(inline: Inline, tmp_path: Path) -> None:
    stop, link = StopSignal(), AnsweringWorker()
    task = asyncio.create_task(inline.run(work("patient", params={"folder": str(tmp_path)}), link, stop))
    await until((tmp_path / "up").exists)

    stop.request("drain", 30)

    assert await task == HandedBack()
    assert link.saved == [{"reason": "drain"}]


async def test_half_the_grace_is_left_to_clean_up(inline: Inline, tmp_path: Path) -> None:
    stop, link = StopSignal(), AnsweringWorker()
    task = asyncio.create_task(inline.run(work("cleaning", params={"folder": str(tmp_path)}), link, stop))
    await until((tmp_path / "up").exists)

    stop.request("timeout", 0.4)

    assert isinstance(await task, TimedOut)
    assert link.saved == ["cleaned"]


async def test_a_handler_that_swallows_its_cancellation_is_given_up_and_cut_off(
    inline: Inline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import process_jobs

    late: list[str] = []

    async def clings(ctx: Any) -> None:
        (tmp_path / "up").touch()
        for _ in range(4):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                continue
        try:
            await ctx.save("too late")
        except BaseException as error:
            late.append(type(error).__name__)

    monkeypatch.setattr(process_jobs.ok, "function", clings)
    monkeypatch.setattr("worker.engine.runners.inline.LAST_STEPS", 0.1)
    monkeypatch.setattr("worker.engine.runners.inline.NAG", 0.05)
    stop, link = StopSignal(), AnsweringWorker()
    task = asyncio.create_task(inline.run(work("ok"), link, stop))
    await until((tmp_path / "up").exists)

    stop.request("cancel", 0.1)

    assert await task == Cancelled("requested")
    await until(lambda: late)
    assert late == ["LeaseLost"]
    assert link.saved == []


async def test_a_run_whose_lease_is_lost_is_cancelled_at_once(inline: Inline, tmp_path: Path) -> None:
    stop = StopSignal()
    given = work("patient", params={"folder": str(tmp_path)})
    task = asyncio.create_task(inline.run(given, AnsweringWorker(), stop))
    await until((tmp_path / "up").exists)
    began = time.monotonic()

    stop.kill()

    assert isinstance(await task, Lost)
    assert time.monotonic() - began < 0.5


async def test_a_handler_that_blocks_the_loop_is_named_and_not_stopped(
    inline: Inline, monkeypatch: pytest.MonkeyPatch, emitted: list[Emitted]
) -> None:
    import process_jobs

    async def blocks(ctx: Any) -> float:
        await asyncio.sleep(0.1)
        began, seen = time.monotonic(), len(blocked(emitted))
        while len(blocked(emitted)) == seen and time.monotonic() < began + 30:
            time.sleep(0.01)
        return time.monotonic() - began

    async def blocks_in_a_task(ctx: Any) -> Any:
        return await asyncio.create_task(blocks(ctx), name="of its own")

    monkeypatch.setattr(process_jobs.ok, "function", blocks)
    first = await run(inline, "ok")
    await asyncio.sleep(0.3)
    monkeypatch.setattr(process_jobs.ok, "function", blocks_in_a_task)
    second = await run(inline, "ok")

    told = blocked(emitted)
    assert [fields["handler"] for fields in told] == ["ok", "ok"]
    for outcome, fields in zip((first, second), told, strict=True):
        assert isinstance(outcome, Succeeded)
        assert "blocks" in fields["where"]
        # Reported while it still blocked. The loop's last tick was up to 0.25 s before.
        assert 1 <= fields["seconds"] < float(str(outcome.result)) + 0.4


def blocked(emitted: list[Emitted]) -> list[Mapping[str, Any]]:
    """The fields of each `loop.blocked`."""
    return [event.fields for event in emitted if event.event.name == "loop.blocked"]


async def test_a_handler_that_holds_the_interpreter_is_named_once_it_lets_go(
    inline: Inline, monkeypatch: pytest.MonkeyPatch, emitted: list[Emitted]
) -> None:
    import process_jobs

    async def counts(ctx: Any) -> int:
        until, turns = time.monotonic() + 30, 0
        while not blocked(emitted) and time.monotonic() < until:
            turns += sum(range(5_000_000))
        return bool(turns)

    monkeypatch.setattr(process_jobs.ok, "function", counts)
    assert await run(inline, "ok") == Succeeded("true")

    assert [fields["handler"] for fields in blocked(emitted)] == ["ok"]
