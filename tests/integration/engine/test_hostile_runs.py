"""Handlers that speak to the worker themselves: what a run's process reports is a claim.

They use the channel of their own process, which no sandbox can keep from them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import pytest

from tests.fakes.answering import AnsweringWorker
from tests.fakes.running import work
from worker.engine.runners import contract
from worker.engine.runners.child.child_process import ChildProcess
from worker.engine.runners.child.pool import ChildPool
from worker.engine.runners.contract import GivenErrors, StopSignal
from worker.errors import IssuerUnavailable
from worker.model.runs.outcome import Failed, HandedBack, NoToken, Outcome, Refused, Succeeded

CHANNEL = """
import json, struct
from worker.engine.runners.child import main
from worker.handlers.calls import AskToken
channel = main._channel
def say(kind, **fields):
    channel.send({"op": "end", "outcome": {"kind": kind, **fields}})
def raw(body):
    channel._own_channel().sendall(struct.pack("!II", len(body), 0) + body)
"""
REFUSED = CHANNEL + 'say("Refused", reason="org_mismatch", detail=None, message="forged")'
HANDED_BACK = CHANNEL + 'say("HandedBack", detail=None)'
YEARS = CHANNEL + 'say("NoToken", retry_after=1e8, detail="forged")'


async def run(children: ChildPool, code: str, services: AnsweringWorker | None = None) -> Outcome:
    given = work("code", params={"code": code})
    return await children.run(given, services or AnsweringWorker(), StopSignal())


@pytest.fixture
def believing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Turn the defence off."""

    def believe(reported: Outcome, stop: StopSignal, errors: GivenErrors) -> Outcome:
        return reported

    return lambda: monkeypatch.setattr(contract, "believed", believe)


@pytest.mark.parametrize("code", [REFUSED, HANDED_BACK, YEARS])
async def test_a_forged_outcome_is_handler_exited(children: ChildPool, code: str) -> None:
    services = AnsweringWorker()

    outcome = await run(children, code, services)

    assert isinstance(outcome, Failed)
    assert outcome.reason == "handler_exited"
    assert "forged" not in str(outcome)
    assert str(outcome.detail) in services.text()


async def test_control_without_the_check_it_counts(
    children: ChildPool, believing: Callable[[], None]
) -> None:
    believing()

    assert isinstance(await run(children, REFUSED), Refused)
    assert await run(children, HANDED_BACK) == HandedBack()
    assert isinstance(await run(children, YEARS), NoToken)


async def test_a_run_without_a_token_waits_as_long_as_the_worker_says(children: ChildPool) -> None:
    services = AnsweringWorker(refuses=IssuerUnavailable("away", retry_after=7.0))

    asking = "try:\n    channel.request(AskToken(True)).result()\nexcept Exception:\n    pass\n"
    outcome = await run(children, f"{CHANNEL}{asking}{YEARS}", services)

    assert isinstance(outcome, NoToken)
    assert (outcome.retry_after.total_seconds(), outcome.detail) == (7.0, "issuer_unavailable")


async def test_what_is_not_a_message_ends_the_run_and_no_other(children: ChildPool) -> None:
    hostile = b'{"op":"steps","n":1,"after":Infinity}'

    outcome = await run(children, f"{CHANNEL}raw({hostile!r})\nimport time; time.sleep(60)")

    assert isinstance(outcome, Failed)
    assert (outcome.reason, outcome.detail) == ("handler_exited", "it sent an invalid message")
    assert await run(children, "result = 1") == Succeeded("1")


class Receiver:
    def __init__(self) -> None:
        self.data = b""

    def on_data(self, data: bytes) -> None:
        self.data += data

    def on_output(self, source: str, data: bytes) -> None: ...
    def on_room(self) -> None: ...


async def last_words() -> bytes:
    """What the worker has of a process that sent something and ended, while reading was paused."""
    process, receiver = ChildProcess(1, "", lambda message: None), Receiver()
    descriptors = await process.open()
    process.serve(receiver, {"op": "work"})
    process.pause_reading()
    theirs = socket.socket(fileno=descriptors[0])
    theirs.recv(1_000)
    theirs.sendall(b"its last words")
    theirs.close()
    for descriptor in descriptors[1:]:
        os.close(descriptor)

    process.send({"op": "answer"})  # it cannot be written
    await process.drained(20)

    process.close()
    return receiver.data


async def test_an_answer_that_comes_too_late_does_not_lose_the_outcome() -> None:
    assert await last_words() == b"its last words"


async def test_control_asyncio_drops_what_was_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChildProcess, "_read_rest", lambda self: None)

    assert await last_words() == b""


async def test_nothing_of_a_flood_is_dropped(children: ChildPool) -> None:
    """More messages than the worker reads at once, and a large result after them."""
    services = AnsweringWorker()
    flood = b'{"op":"progress","done":1,"total":null,"note":null}'
    code = f"{CHANNEL}for _ in range(3_000): raw({flood!r})\nresult = [[] for _ in range(100_000)]"

    outcome = await run(children, code, services)

    assert outcome == Succeeded("[" + ",".join(["[]"] * 100_000) + "]")
    assert len(services.progressed) == 3_000
