"""A host's requests go to one worker until it does not answer, then to the next one."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from tests.fakes.clock import settle
from worker.errors import AnswerTooLarge, LeaseLost, RequestRejected, StoreUnavailable, Unavailable
from worker.features.hosts.control import (
    AsyncControl,
    BlockingControl,
    ControlDenied,
    Controls,
    ControlUnavailable,
)
from worker.features.hosts.wire import Malformed

URLS = ("http://a:1", "http://b:2")


class Workers(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Answers requests as `answers` say, by host; an exception is raised."""

    def __init__(self, **answers: httpx.Response | Exception | list[httpx.Response | Exception]) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self.requests: list[httpx.Request] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request.url.host)
        self.requests.append(request)
        answer = self.answers[request.url.host]
        if isinstance(answer, list):
            answer = answer.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return self.handle_request(request)


def ok(**message: object) -> httpx.Response:
    return httpx.Response(200, content=json.dumps(message).encode())


def problem(status: int, code: str) -> httpx.Response:
    return httpx.Response(
        status, content=json.dumps({"error": {"code": code, "message": "it is so", "fix": "do it"}}).encode()
    )


@pytest.fixture
def controls(clock) -> Controls:
    return Controls(URLS, "the-token", clock)


async def test_a_request_carries_token_and_incarnation(controls):
    workers = Workers(a=ok(renewed=True))
    controls.incarnation = "w1"

    assert await AsyncControl(controls, transport=workers).call("renew", {"x": "é"}) == {"renewed": True}

    (request,) = workers.requests
    assert str(request.url) == "http://a:1/attempts/v1/renew"
    assert request.headers["authorization"] == "Bearer the-token"
    assert request.headers["orgworker-incarnation"] == "w1"
    assert json.loads(request.content) == {"x": "é"}


async def test_the_next_worker_is_asked_and_stays_in_use(controls, emitted):
    workers = Workers(a=httpx.ConnectError("refused"), b=ok())
    control = AsyncControl(controls, transport=workers)

    await control.call("save", {})
    await control.call("save", {})

    assert workers.asked == ["a", "b", "b"]
    assert [event.event.name for event in emitted] == ["control.lost", "control.back"]


@pytest.mark.parametrize("answer", [httpx.ReadTimeout("slow"), httpx.Response(503), httpx.Response(429)])
async def test_without_an_answer_it_is_unavailable(controls, answer):
    workers = Workers(a=answer, b=httpx.ConnectError("refused"))

    with pytest.raises(ControlUnavailable, match="no worker answers save"):
        await AsyncControl(controls, transport=workers).call("save", {})
    assert workers.asked == ["a", "b"]


async def test_a_worker_without_its_database_is_not_the_last_word(controls):
    workers = Workers(a=problem(503, "database_unavailable"), b=ok(saved=True))

    assert await AsyncControl(controls, transport=workers).call("save", {}) == {"saved": True}


async def test_a_connection_that_was_just_closed_is_opened_again(controls):
    workers = Workers(a=[httpx.RemoteProtocolError("closed"), ok(saved=True)])

    assert await AsyncControl(controls, transport=workers).call("save", {}) == {"saved": True}
    assert workers.asked == ["a", "a"]


async def test_runs_are_not_taken_twice(controls):
    """The first worker may have admitted runs whose answer was lost."""
    workers = Workers(a=httpx.ReadTimeout("slow"), b=ok())

    with pytest.raises(ControlUnavailable):
        await AsyncControl(controls, transport=workers).call("take", {}, repeat=False)
    assert workers.asked == ["a"]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (problem(409, "lease_lost"), LeaseLost),
        (problem(401, "token"), ControlDenied),
        (problem(403, "denied"), ControlDenied),
        (problem(422, "invalid"), Malformed),
        (problem(404, "not_found"), Unavailable),
        (problem(401, "request_rejected"), RequestRejected),
        (problem(422, "answer_too_large"), AnswerTooLarge),
        (problem(503, "database_unavailable"), StoreUnavailable),
        # Of this address, perhaps by another host: what has ended is repeated.
        (problem(429, "too_many_requests"), ControlUnavailable),
        (problem(500, "unexpected"), Unavailable),
        (httpx.Response(200, content=b"<html>"), ControlUnavailable),
    ],
)
async def test_an_answer_becomes_an_error(controls, answer, error):
    with pytest.raises(error) as raised:
        await AsyncControl(controls, transport=Workers(a=answer, b=answer)).call("save", {})
    assert type(raised.value) is error


async def test_a_token_is_in_no_error(controls):
    with pytest.raises(ControlDenied) as raised:
        await AsyncControl(controls, transport=Workers(a=problem(401, "token"))).call("register", {})
    assert "the-token" not in f"{raised.value!r} {raised.value.fix}"


def test_the_heartbeats_tries_share_its_deadline(controls, clock):
    workers = Workers(a=httpx.ReadTimeout("slow"), b=ok(registered=True))
    control = BlockingControl(controls, 6.0, transport=workers)

    assert control.call("renew", {}) == {"registered": True}

    assert [request.extensions["timeout"]["read"] for request in workers.requests] == [3.0, 6.0]
    assert [request.extensions["timeout"]["connect"] for request in workers.requests] == [3.0, 3.0]


class Hanging(Workers):
    """Never answers at `a`."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.host == "a":
            self.asked.append("a")
            await asyncio.Event().wait()
        return self.handle_request(request)


async def test_what_waits_at_a_worker_that_hangs_ends_when_the_heartbeat_finds_out(controls):
    """Otherwise the host would take no runs before the end of its long poll."""
    workers = Hanging(a=httpx.ReadTimeout("hangs"), b=ok(registered=True))
    control = AsyncControl(controls, transport=workers)
    taking = asyncio.create_task(control.call("take", {}, repeat=False))
    saving = asyncio.create_task(control.call("save", {}))
    await settle()

    await asyncio.to_thread(BlockingControl(controls, 1.0, transport=workers).call, "renew", {})

    with pytest.raises(ControlUnavailable, match="no worker answers take"):
        await taking
    assert await saving == {"registered": True}
    assert workers.asked == ["a", "a", "a", "b", "b"]


async def test_a_call_that_is_cancelled_stays_cancelled(controls):
    control = AsyncControl(controls, transport=Hanging())
    taking = asyncio.create_task(control.call("take", {}, repeat=False))
    await settle()

    taking.cancel()

    with pytest.raises(asyncio.CancelledError):
        await taking
