"""A handler in a process of its own: what it gets, what it sees, what its answers mean."""

from __future__ import annotations

import asyncio
import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.fakes.answering import AnsweringWorker
from tests.fakes.running import NOW, claims, token, until, work
from worker.clock import SystemClock
from worker.engine.runners.child.pool import ChildPool
from worker.engine.runners.contract import StopSignal
from worker.errors import LeaseLost
from worker.model.runs.outcome import Failed, Lost, NoHandler, Outcome, Refused, Succeeded


def result(outcome: Outcome) -> Any:
    assert isinstance(outcome, Succeeded), outcome
    return None if outcome.result is None else json.loads(outcome.result)


async def test_an_async_handler_gets_all_its_context_says(children: ChildPool) -> None:
    link = AnsweringWorker()
    given = work("ok", claims=claims(max_tokens="5", other="x"), checkpoint={"done": 3})

    outcome = await children.run(given, link, StopSignal())

    assert result(outcome) == {
        "org": ["org_acme", "Acme"],
        "run": [given.run_id, 1, 7, "key-1"],
        "scheduled_for": NOW.isoformat(),
        "settings": {"model_version": "gpt-4", "max_tokens": 5},
        "flag": True,
        "checkpoint": {"done": 3},
        "token": "token-one",
        "deadline": given.timeout_at.isoformat(),
    }
    assert link.has_started
    assert link.saved == [{"done": 1}]
    assert link.progressed == [(1, 2, "half way")]
    assert link.peak_memory > 10_000_000


async def test_a_handler_that_blocks_has_the_same_methods(children: ChildPool) -> None:
    link = AnsweringWorker()

    outcome = await children.run(work("ok_blocking"), link, StopSignal())

    assert result(outcome) == {"org": "org_acme", "token": "token-one", "max_tokens": 1000}
    assert link.saved == [{"done": 1}]
    assert link.progressed == [(1, None, None)]


async def test_what_is_printed_and_logged_reaches_the_runs_log(children: ChildPool) -> None:
    link = AnsweringWorker()

    await children.run(work("ok"), link, StopSignal())

    assert set(link.lines) == {
        ("info", "stdout", "printed"),
        ("error", "stderr", "complained"),
        ("warning", "log", "logged\nin two lines"),
        ("info", "log", "a library says"),
    }


async def test_a_run_sees_nothing_of_the_worker(children: ChildPool) -> None:
    seen = result(await children.run(work("surroundings"), AnsweringWorker(), StopSignal()))

    assert seen["environment"].keys() <= {"PATH", "HOME", "LANG", "TZ", "TMPDIR"}
    assert seen["environment"]["HOME"] == seen["environment"]["TMPDIR"] == seen["cwd"]
    # Besides the standard streams: its channel, its loop's epoll and pair of sockets, its own /proc/self.
    proc, *kinds = sorted(kind for number, kind in seen["descriptors"].items() if int(number) > 2)
    assert proc.startswith("/proc/")
    assert kinds == ["anon_inode", "socket", "socket", "socket"]
    assert [seen["descriptors"][number] for number in "012"] == ["/dev/null", "pipe", "pipe"]
    assert seen["session"]
    assert seen["stdin"] == ""
    assert not [name for name in seen["modules"] if name.startswith(("worker.store", "worker.tokens"))]
    assert "sqlalchemy" not in seen["modules"]
    folder = Path(seen["cwd"])
    assert folder.parent.name.startswith("orgworker-")


async def test_a_run_has_limits_of_its_own(children: ChildPool) -> None:
    given = work(
        "surroundings", memory=512 * 1024 * 1024, timeout_at=SystemClock().now() + timedelta(seconds=60)
    )

    limits = result(await children.run(given, AnsweringWorker(), StopSignal()))["limits"]

    assert limits["NOFILE"] == [1024, 8192]
    assert max(limits["CORE"]) <= 1  # 0 if that is the limit of this process
    soft, hard = limits["CPU"]
    # An hour beyond the timeout on every processor, then SIGXCPU, then SIGKILL.
    assert 0 <= 3660 - soft / (os.cpu_count() or 1) <= 3
    assert hard == soft + 5
    assert 1024**3 < limits["DATA"][0] < 2 * 1024**3


async def test_a_runs_folder_is_empty_at_first_and_gone_afterwards(children: ChildPool) -> None:
    first = result(await children.run(work("surroundings"), AnsweringWorker(), StopSignal()))
    second = result(await children.run(work("surroundings"), AnsweringWorker(), StopSignal()))

    assert first["cwd"] != second["cwd"]
    await until(lambda: not Path(first["cwd"]).exists() and not Path(second["cwd"]).exists())


async def test_a_text_leaves_the_process_uncut_until_it_is_masked(children: ChildPool) -> None:
    """A secret at the place where an error and a line are cut is whole when the worker masks it."""
    secret = "canary-5ecret-value-0123456789"
    code = (
        "import logging; secret = 'canary-5ecret-value-0123456789'\n"
        "logging.getLogger('x').warning('.' * 16380 + secret + '.' * 9000)\n"
        "raise ValueError('.' * 3990 + secret + '.' * 9000)"
    )
    link = AnsweringWorker()

    outcome = await children.run(work("code", params={"code": code}), link, StopSignal())

    assert isinstance(outcome, Failed)
    assert outcome.error.message == "." * 3990 + secret + "." * 9000
    assert secret in outcome.error.trace
    assert ("warning", "log", "." * 16380 + secret + "." * 9000) in link.lines


async def test_a_property_that_does_not_fit_is_refused_by_name_before_the_handler(
    children: ChildPool,
) -> None:
    link = AnsweringWorker()

    outcome = await children.run(work("ok", claims=claims(max_tokens="many-secret")), link, StopSignal())

    assert isinstance(outcome, Refused)
    assert (outcome.reason, outcome.detail) == ("settings_invalid", "max_tokens")
    assert "max_tokens" in outcome.message
    assert "many-secret" not in outcome.message
    assert not link.has_started


async def test_a_handler_that_is_gone_is_no_handler(children: ChildPool) -> None:
    missing = work("ok", entry_point="no_such_module:ok")
    outcome = await children.run(missing, AnsweringWorker(), StopSignal())
    assert isinstance(outcome, NoHandler)

    missing = work("ok", entry_point="process_jobs:nothing")
    outcome = await children.run(missing, AnsweringWorker(), StopSignal())
    assert isinstance(outcome, NoHandler)


async def test_a_token_at_its_end_is_renewed_and_the_claims_follow(children: ChildPool) -> None:
    link = AnsweringWorker(renewed=(token("token-two"), claims(n="two")))
    old = work("renew", token=token("token-one", timedelta(minutes=-1)), claims=claims(n="one"))

    assert result(await children.run(old, link, StopSignal())) == ["one", "token-two", "two"]
    assert link.tokens_asked == [False]


async def test_a_lost_lease_ends_a_run_that_saves(children: ChildPool) -> None:
    def lost(data: str) -> None:
        raise LeaseLost("a newer fencing token exists")

    assert isinstance(await children.run(work("ok"), AnsweringWorker(on_save=lost), StopSignal()), Lost)


async def test_progress_is_thinned_out_but_the_last_is_shown(children: ChildPool) -> None:
    link = AnsweringWorker()

    await children.run(work("hurries", params={"count": 20_000}), link, StopSignal())

    assert len(link.progressed) < 100
    assert link.progressed[-1] == (19_999, None, None)


async def test_errors_carry_type_message_and_the_handlers_own_trace(children: ChildPool) -> None:
    outcome = await children.run(work("connects"), AnsweringWorker(), StopSignal())

    assert isinstance(outcome, Failed)
    assert outcome.error.type == "httpx.ConnectError"
    assert outcome.error.message == "connection refused"
    assert "process_jobs.py" in outcome.error.trace
    assert "worker/engine" not in outcome.error.trace


async def test_many_runs_at_once_keep_apart(children: ChildPool) -> None:
    runs = [work("ok_blocking", org_code=f"org_{number}") for number in range(30)]
    outcomes = await asyncio.gather(*(children.run(run, AnsweringWorker(), StopSignal()) for run in runs))

    assert [result(outcome)["org"] for outcome in outcomes] == [f"org_{number}" for number in range(30)]


async def test_a_handler_may_use_processes_of_its_own(children: ChildPool) -> None:
    assert result(await children.run(work("pools"), AnsweringWorker(), StopSignal())) == [1, 2, 1, 2]
