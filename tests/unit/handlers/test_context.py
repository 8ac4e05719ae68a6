"""Context and BlockingContext: one set of members, and what they refuse."""

from __future__ import annotations

import inspect
import logging
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from tests.fakes.answering import AnsweringWorker
from tests.fakes.clock import START, ManualClock
from tests.fakes.running import NOW
from worker.guard.claims import Claims, Flag
from worker.handlers.blocking_context import BlockingContext, close_blocking_http
from worker.handlers.calls import Save
from worker.handlers.context import Context, close_http
from worker.handlers.given import BlockingCancellation, Cancellation, Given, HeldToken, Org, ThisRun
from worker.handlers.json_text import NotStorable
from worker.secret import AccessToken

MEMBERS = {
    "org",
    "run",
    "params",
    "settings",
    "claims",
    "flag",
    "secret",
    "http",
    "http_client",
    "complete",
    "public_http",
    "token",
    "checkpoint",
    "save",
    "step",
    "sleep",
    "wait_for",
    "spend",
    "budget",
    "map",
    "start",
    "gather",
    "as_ended",
    "map_runs",
    "state",
    "progress",
    "log",
    "deadline",
    "cancelled",
}


def given(clock: ManualClock, **properties: Any) -> Given[Any, Any]:
    ends = START + timedelta(hours=1)
    flags = {"agent-v2": Flag("boolean", True), "model": Flag("string", "big"), "off": Flag("boolean", False)}
    claims = Claims("org_acme", "client", frozenset(), properties, flags, START, ends)
    return Given(
        org=Org("org_acme", "Acme"),
        run=ThisRun("run-1", NOW, 1, 7, "key-1"),
        params={},
        settings={},
        checkpoint=None,
        deadline=NOW,
        api_origins=(),
        log=logging.getLogger("test"),
        held=HeldToken(AccessToken("text", ends), claims, clock),
    )


def blocking(clock: ManualClock, line: AnsweringWorker, **properties: Any) -> BlockingContext[Any, Any]:
    return BlockingContext(given(clock, **properties), line, BlockingCancellation())


def public(thing: Any) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


async def test_both_contexts_have_the_documented_members_with_the_same_parameters(clock: ManualClock) -> None:
    line = AnsweringWorker()
    waiting: Context[Any, Any] = Context(given(clock), line, Cancellation())
    blocks = blocking(clock, line)

    assert public(waiting) == public(blocks) == MEMBERS
    for name in ("flag", "token", "save", "progress"):
        ours, theirs = getattr(Context, name), getattr(BlockingContext, name)
        assert inspect.signature(ours).parameters == inspect.signature(theirs).parameters
    for name in ("token", "save"):
        assert inspect.iscoroutinefunction(getattr(Context, name))
        assert not inspect.iscoroutinefunction(getattr(BlockingContext, name))


def test_a_declared_secret_is_a_text_and_another_name_says_how_to_declare_it(clock: ManualClock) -> None:
    line = AnsweringWorker()
    data = replace(given(clock), secrets={"openai": "sk-1234567890"})
    for ctx in (
        Context(data, line, Cancellation()),
        BlockingContext(data, line, BlockingCancellation()),
    ):
        assert ctx.secret("openai") == "sk-1234567890"
        with pytest.raises(TypeError) as raised:
            ctx.secret("other")
        assert str(raised.value) == "ctx.secret('other') needs @job(..., secrets={'other'})"
    assert "sk-1234567890" not in repr(data)


async def test_the_clients_that_were_used_are_closed_at_the_end(clock: ManualClock) -> None:
    line = AnsweringWorker()
    waiting: Context[Any, Any] = Context(given(clock), line, Cancellation())
    blocks = blocking(clock, line)
    clients = [waiting.http, waiting.public_http, blocks.http, blocks.public_http]

    await close_http(waiting)
    close_blocking_http(blocks)

    assert all(client.is_closed for client in clients)


async def test_no_client_is_made_to_be_closed(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    for name in ("org_client", "blocking_org_client"):
        monkeypatch.setattr(f"worker.handlers.http.{name}", lambda *given: made.append(given))
    line = AnsweringWorker()

    await close_http(Context(given(clock), line, Cancellation()))
    close_blocking_http(blocking(clock, line))

    assert made == []


def test_both_say_alike_whether_to_stop() -> None:
    for cancelled in (Cancellation(), BlockingCancellation()):
        assert not cancelled.is_set()
        assert cancelled.reason is None
        cancelled.set("drain")
        cancelled.set("cancel")
        assert cancelled.is_set()
        assert cancelled.reason == "drain"
        assert callable(cancelled.wait)


def test_a_flag_has_its_value_and_is_off_where_it_is_absent(clock: ManualClock) -> None:
    ctx = blocking(clock, AnsweringWorker(), **{"beta-tools": "true", "seats": "12"})

    assert ctx.flag("agent-v2") is True
    assert ctx.flag("model") == "big"
    assert ctx.flag("off", default=True) is False
    assert ctx.flag("beta-tools") is True
    assert ctx.flag("absent") is False
    assert ctx.flag("absent", default="x") == "x"


def test_a_checkpoint_is_stored_as_json_text(clock: ManualClock) -> None:
    line = AnsweringWorker()

    blocking(clock, line).save({"done": 3, "who": "Zoë"})

    assert line.calls == [Save('{"done":3,"who":"Zoë"}', 1)]


@pytest.mark.parametrize("data", [float("nan"), "\ud800", "\0", object(), "x" * 1024 * 1024])
def test_a_checkpoint_that_no_database_takes_is_refused_here(clock: ManualClock, data: Any) -> None:
    line = AnsweringWorker()

    with pytest.raises(NotStorable, match="the checkpoint"):
        blocking(clock, line).save(data)
    assert line.saved == []


def test_progress_is_cut_to_what_can_be_sent(clock: ManualClock) -> None:
    line = AnsweringWorker()

    blocking(clock, line).progress(1, total=3, note="x" * 100_000 + "\0")

    done, total, note = line.progressed[0]
    assert (done, total) == (1, 3)
    assert len(note) == 64 * 1024  # it is not masked yet


@pytest.mark.parametrize("done", ["1", None, True, float("nan"), float("inf")])
def test_progress_is_a_number(clock: ManualClock, done: Any) -> None:
    with pytest.raises(ValueError, match="done is a finite number"):
        blocking(clock, AnsweringWorker()).progress(done)
