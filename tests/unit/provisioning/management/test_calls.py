"""Requests to a management API: what is sent again and what never, pauses, rate, token, hostile answers."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from tests.fakes.clock import ManualClock, settle
from worker.errors import ConfigurationError, IssuerUnavailable, ProviderUnavailable, Throttled, Unclear
from worker.features.provisioning.management.calls import CONNECT_TRIES, TOKEN_TRIES, TRIES, Calls, Response
from worker.outbound import open_client
from worker.secret import Secret

ORIGIN = "https://acme.kinde.com"
ROUTE = "/api/v1/applications"
Handler = Callable[[httpx.Request], httpx.Response]


class Tokens:
    """Satisfies Bearer; a rejected token is replaced if `renews`."""

    def __init__(self, *, renews: bool = True) -> None:
        self.renews = renews
        self.current = 1
        self.calls: list[Secret | None] = []
        self.faults: list[Exception] = []

    async def __call__(self, *, rejected: Secret | None = None) -> Secret:
        self.calls.append(rejected)
        if self.faults:
            raise self.faults.pop(0)
        if rejected is not None and self.renews:
            self.current += 1
        return Secret(f"management-token-{self.current}")


class Server:
    """Answers requests from a list; the last answer stays."""

    def __init__(self, clock: ManualClock, *answers: httpx.Response | Exception) -> None:
        self.clock = clock
        self.answers = list(answers)
        self.seen: list[tuple[float, httpx.Request]] = []
        self.open = self.most_open = 0
        self.waits = 0.0

    async def handle(self, request: httpx.Request) -> httpx.Response:
        self.seen.append((self.clock.monotonic(), request))
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            if self.waits:
                await self.clock.sleep(self.waits)
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            if isinstance(answer, Exception):
                raise answer
            return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)
        finally:
            self.open -= 1


async def allowed() -> None:
    """Every change is this installation's."""


def calls_of(server: Server, tokens: Tokens | None = None, **options: Any) -> Calls:
    client = open_client(httpx.MockTransport(server.handle))
    values = {
        "permit": allowed,
        "clock": server.clock,
        "per_second": 1_000,
        "reset_headers": ("RateLimit-Reset",),
    } | options
    return Calls("main", ORIGIN, client, tokens or Tokens(), **values)


async def finished(clock: ManualClock, work: Awaitable[Any], *, most: float = 4_000) -> Any:
    """The result of the work; time passes until it is done."""
    task = asyncio.ensure_future(work)
    passed = 0.0
    while not task.done() and passed < most:
        await settle()
        if not task.done():
            clock.advance(0.25)
            passed += 0.25
    assert task.done(), "still waiting"
    return await task


def ok(body: Any = None) -> httpx.Response:
    return httpx.Response(200, content=json.dumps(body if body is not None else {"code": "OK"}))


def read(calls: Calls) -> Awaitable[Response]:
    return calls.read(ROUTE, ROUTE, scope="read:applications", query={"page_size": "500"})


def write(calls: Calls, **options: Any) -> Awaitable[Response]:
    return calls.write("POST", ROUTE, ROUTE, scope="create:applications", body={"name": "an app"}, **options)


FAILURES = {
    "cut": httpx.RemoteProtocolError("peer closed connection without sending complete message body"),
    "timeout": httpx.ReadTimeout("no answer"),
    "reset": httpx.ReadError("reset"),
    "500": httpx.Response(500, content="secret words of the provider"),
    "503": httpx.Response(503),
    "408": httpx.Response(408),
    "half": httpx.Response(200, content='{"code": "OK", "application": {"id'),
    "html": httpx.Response(200, content="<html>"),
    "redirect": httpx.Response(302, headers={"Location": "https://evil.example/"}),
}
each_failure = pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)


@each_failure
async def test_a_read_is_repeated_after_any_failure(clock: ManualClock, failure: Any):
    server = Server(clock, failure, failure, ok({"applications": []}))

    response = await finished(clock, read(calls_of(server)))

    assert response.body == {"applications": []}
    assert [str(request.url) for _, request in server.seen] == [f"{ORIGIN}{ROUTE}?page_size=500"] * 3


@each_failure
async def test_a_write_without_a_clear_answer_is_sent_once(clock: ManualClock, failure: Any):
    """It may have been carried out: sent again, it could make a second application."""
    server = Server(clock, failure, ok())

    with pytest.raises(Unclear) as raised:
        await finished(clock, write(calls_of(server)))

    assert len(server.seen) == 1
    assert "secret words" not in f"{raised.value}"
    assert "management-token" not in repr(raised.value)


@each_failure
async def test_a_repeatable_write_is_repeated_and_ends_unclear(clock: ManualClock, failure: Any):
    once = Server(clock, failure, ok())
    assert (await finished(clock, write(calls_of(once), repeatable=True))).ok
    always = Server(clock, failure)

    with pytest.raises(Unclear):
        await finished(clock, write(calls_of(always), repeatable=True))

    assert (len(once.seen), len(always.seen)) == (2, TRIES)


async def test_a_write_that_was_never_sent_is_repeated(clock: ManualClock):
    """Without a connection nothing was carried out: neither of the API nor of the token endpoint."""
    server, tokens = Server(clock, httpx.ConnectError("refused"), ok()), Tokens()
    tokens.faults = [IssuerUnavailable("no token now")]

    assert (await finished(clock, write(calls_of(server, tokens)))).ok

    assert len(server.seen) == 2


async def test_a_provider_that_stays_away_ends_the_read(clock: ManualClock):
    server = Server(clock, httpx.ConnectError("refused"))

    with pytest.raises(ProviderUnavailable, match="no connection") as raised:
        await finished(clock, read(calls_of(server)))

    assert len(server.seen) == CONNECT_TRIES
    assert not isinstance(raised.value, Unclear)


async def test_an_issuer_that_gives_no_token_ends_the_write(clock: ManualClock):
    server, tokens = Server(clock, ok()), Tokens()
    tokens.faults = [IssuerUnavailable("no token now") for _ in range(TOKEN_TRIES)]

    with pytest.raises(IssuerUnavailable):
        await finished(clock, write(calls_of(server, tokens)))

    assert server.seen == []


@pytest.mark.parametrize("header", ["Retry-After", "RateLimit-Reset"])
@pytest.mark.parametrize("send", [read, write])
async def test_a_throttle_pauses_all_requests_as_long_as_asked(
    clock: ManualClock, send: Callable[[Calls], Awaitable[Response]], header: str
):
    """429 says that nothing was carried out, so a write is sent again, too."""
    server = Server(clock, httpx.Response(429, headers={header: "7"}), ok())
    calls = calls_of(server)
    first = asyncio.ensure_future(send(calls))
    await settle()

    await finished(clock, asyncio.gather(first, read(calls), read(calls)))

    times = [at for at, _ in server.seen]
    assert len(times) == 4
    assert all(at - times[0] >= 7 for at in times[1:])
    assert max(times) - times[0] < 9


async def test_throttles_without_a_time_double_the_pause_and_end(clock: ManualClock):
    server = Server(clock, httpx.Response(429))

    with pytest.raises(Throttled) as raised:
        await finished(clock, read(calls_of(server)))

    times = [at for at, _ in server.seen]
    pauses = [round(later - earlier) for earlier, later in itertools.pairwise(times)]
    assert pauses[:7] == [1, 2, 4, 8, 16, 32, 60]
    assert len(times) == 13
    assert "[issuers.main.management]" in raised.value.fix


async def test_a_pause_of_hours_is_reported_at_once(clock: ManualClock):
    server = Server(clock, httpx.Response(429, headers={"Retry-After": "7200"}))

    with pytest.raises(Throttled) as raised:
        await finished(clock, read(calls_of(server)))

    assert raised.value.retry_after == 7200
    assert len(server.seen) == 1


async def test_the_rate_and_the_connections_are_bounded(clock: ManualClock):
    server = Server(clock, ok())
    server.waits = 1.0
    calls = calls_of(server, per_second=10, connections=4)

    await finished(clock, asyncio.gather(*(read(calls) for _ in range(40))))

    times = [at for at, _ in server.seen]
    assert server.most_open == 4
    assert max(sum(start <= at < start + 1 for at in times) for start in times) <= 10


async def test_a_rejected_token_is_replaced_once(clock: ManualClock):
    for status in (401, 403):
        server, tokens = Server(clock, httpx.Response(status), ok()), Tokens()

        await finished(clock, write(calls_of(server, tokens)))

        sent = [request.headers["Authorization"] for _, request in server.seen]
        assert sent == ["Bearer management-token-1", "Bearer management-token-2"]


async def test_credentials_without_the_scope_are_denied_with_its_name(clock: ManualClock):
    for renews, requests in ((True, 2), (False, 1)):
        server, tokens = Server(clock, httpx.Response(403)), Tokens(renews=renews)

        with pytest.raises(ConfigurationError) as raised:
            await finished(clock, write(calls_of(server, tokens)))

        assert "create:applications" in raised.value.fix
        assert len(server.seen) == requests


async def test_a_throttled_token_is_waited_for(clock: ManualClock):
    server, tokens = Server(clock, ok()), Tokens()
    tokens.faults = [Throttled("slower", retry_after=20.0)]
    began = clock.monotonic()

    await finished(clock, read(calls_of(server, tokens)))

    assert clock.monotonic() - began >= 20


async def test_an_oversize_answer_is_not_read(clock: ManualClock):
    server = Server(clock, ok({"applications": ["x" * 5_000_000]}))

    with pytest.raises(ProviderUnavailable, match="too_large"):
        await finished(clock, read(calls_of(server)))


async def test_an_error_with_an_oversize_body_is_its_status(clock: ManualClock):
    server = Server(clock, httpx.Response(404, text="x" * 5_000_000))

    missing = await finished(clock, read(calls_of(server)))

    assert (missing.status, missing.body) == (404, {})


async def test_a_refusal_is_returned_with_its_code_and_not_counted(clock: ManualClock):
    server = Server(clock, httpx.Response(400, json={"errors": [{"code": "APPLICATION_NOT_FOUND"}]}), ok())
    calls = calls_of(server)

    refused = await finished(clock, read(calls))
    await finished(clock, read(calls))

    assert (refused.ok, refused.status) == (False, 400)
    assert calls.carried_out == {f"GET {ROUTE}": 1}
    assert "APPLICATION_NOT_FOUND" not in repr(refused)
