"""`ctx.http`: the token goes to the listed origins, is renewed once on a 401, and goes nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import httpx
import pytest

from tests.fakes.answering import AnsweringWorker
from tests.fakes.clock import ManualClock
from tests.unit.handlers.test_context import given as context_given
from worker.guard.claims import Claims
from worker.handlers.blocking_context import BlockingContext
from worker.handlers.calls import AskToken
from worker.handlers.context import Context
from worker.handlers.given import BlockingCancellation, Cancellation, Given, HeldToken
from worker.handlers.http import origin_of
from worker.secret import AccessToken

API = "https://api.acme.com"
# Unencrypted: where the operator allows it, and on this machine.
PLAIN = ["http://plain.acme.com"]
LOOPBACK = ["http://127.0.0.1:8000", "http://[::1]:8000", "http://localhost:8000"]
Answer = Callable[[httpx.Request], httpx.Response]


class Minting:
    """A line to the worker: each renewal gives the next token."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.asked: list[bool] = []
        self.held = HeldToken(*self.granted(), clock)

    def granted(self) -> tuple[AccessToken, Claims]:
        now = self.clock.now()
        ends = now + timedelta(seconds=100)
        token = AccessToken(f"token-{len(self.asked)}", ends)
        return token, Claims("org_acme", "client", frozenset(), {}, {}, now, ends)

    def take(self, call: AskToken) -> tuple[AccessToken, Claims]:
        self.asked.append(call.fresh)
        return self.granted()

    def port(self) -> AnsweringWorker:
        return AnsweringWorker({AskToken: self.take})


def given(line: Minting, origins: list[str], base_url: str = "") -> Given[Any, Any]:
    return replace(
        context_given(line.clock),
        api_origins=tuple(origins),
        held=line.held,
        insecure_origins=tuple(PLAIN),
        api_base_url=base_url,
    )


class Caller:
    """Sends through the async or the blocking client, and keeps what arrived where."""

    def __init__(self, kind: str, clock: ManualClock, answer: Answer) -> None:
        self.arrived: list[httpx.Request] = []
        self.authorizations: list[str | None] = []

        def handle(request: httpx.Request) -> httpx.Response:
            self.arrived.append(request)
            self.authorizations.append(request.headers.get("Authorization"))
            return answer(request)

        transport = httpx.MockTransport(handle)
        origins = [API, *PLAIN, *LOOPBACK, "http://unlisted.acme.com"]
        self._client: Any
        self.line = line = Minting(clock)
        transports = {"http": transport}
        if kind == "async":
            self._client = Context(given(line, origins), line.port(), Cancellation(), transports).http
        else:
            cancelled = BlockingCancellation()
            self._client = BlockingContext(given(line, origins), line.port(), cancelled, transports).http

    async def send(self, method: str, url: str, **options: Any) -> httpx.Response:
        response = self._client.request(method, url, **options)
        return await response if isinstance(self._client, httpx.AsyncClient) else response


Make = Callable[[Answer], Caller]


@pytest.fixture(params=["async", "blocking"])
def make(request: pytest.FixtureRequest, clock: ManualClock) -> Make:
    return lambda answer: Caller(request.param, clock, answer)


def ok(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200)


def to(location: str, status: int = 302) -> Answer:
    def answer(request: httpx.Request) -> httpx.Response:
        if str(request.url).startswith(location):
            return httpx.Response(200)
        return httpx.Response(status, headers={"Location": location})

    return answer


async def test_a_listed_origin_gets_the_token_and_the_idempotency_key(make: Make) -> None:
    caller = make(ok)

    await caller.send("POST", f"{API}/articles", json={})

    assert caller.authorizations == ["Bearer token-0"]
    assert caller.arrived[0].headers["Idempotency-Key"] == "key-1"


async def test_a_base_url_is_for_relative_urls_of_http_alone(clock: ManualClock) -> None:
    arrived: list[tuple[str, bool]] = []

    def handle(request: httpx.Request) -> httpx.Response:
        arrived.append((str(request.url), "Authorization" in request.headers))
        return httpx.Response(200)

    transport = httpx.MockTransport(handle)
    line = Minting(clock)
    transports = {"http": transport, "public_http": transport}
    ctx = Context(given(line, [API], f"{API}/v1"), line.port(), Cancellation(), transports)
    blocks = BlockingContext(given(line, [API], API), line.port(), BlockingCancellation(), transports)

    await ctx.http.get("/articles")
    await ctx.http.get("https://evil.example/articles")
    blocks.http.get("/v2/articles")

    assert str(ctx.public_http.base_url) == ""
    assert arrived == [
        (f"{API}/v1/articles", True),
        ("https://evil.example/articles", False),
        (f"{API}/v2/articles", True),
    ]


ORIGINS = {
    "another origin": [
        *("https://evil.example/", "http://api.acme.com/", "https://api.acme.com:8443/"),
        *("https://api.acme.com.evil.example/", "https://api.acme.com@evil.example/"),
        *("https://sub.api.acme.com/", "https://acme.com/"),
    ],
    "another unencrypted one, though listed": [
        *("http://unlisted.acme.com/x", "http://plain.acme.com:8080/x"),
    ],
    "the origin by scheme, host and port": ["https://API.acme.com/x", "https://api.acme.com:443/x"],
    "unencrypted where that is allowed": [f"{origin}/x" for origin in (*PLAIN, *LOOPBACK)],
}


@pytest.mark.parametrize(("which", "url"), [(which, url) for which, urls in ORIGINS.items() for url in urls])
async def test_a_token_goes_to_its_origins_only(make: Make, which: str, url: str) -> None:
    caller = make(ok)

    await caller.send("GET", url)

    assert caller.authorizations == [None if which.startswith("another") else "Bearer token-0"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_to_another_origin_carries_no_token(make: Make, status: int) -> None:
    caller = make(to("https://evil.example/", status))

    await caller.send("POST", f"{API}/x", json={}, follow_redirects=True)

    assert caller.authorizations == ["Bearer token-0", None]


async def test_a_redirect_from_http_to_https_of_the_same_host_carries_no_token_where_that_is_not_listed(
    make: Make,
) -> None:
    caller = make(to("https://plain.acme.com/"))

    await caller.send("GET", "http://plain.acme.com/x", follow_redirects=True)

    assert caller.authorizations == ["Bearer token-0", None]


async def test_a_redirect_back_from_elsewhere_carries_no_token(make: Make) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        places = {"/start": "https://evil.example/", "/": f"{API}/victim"}
        location = places.get(request.url.path)
        return httpx.Response(302, headers={"Location": location}) if location else httpx.Response(200)

    caller = make(answer)

    await caller.send("GET", f"{API}/start", follow_redirects=True)

    assert caller.authorizations == ["Bearer token-0", None, None]


async def test_a_redirect_within_the_origin_keeps_the_token(make: Make) -> None:
    caller = make(to(f"{API}/there"))

    await caller.send("GET", f"{API}/here", follow_redirects=True)

    assert caller.authorizations == ["Bearer token-0", "Bearer token-0"]


async def test_a_401_mints_a_fresh_token_once(make: Make) -> None:
    caller = make(lambda request: httpx.Response(401))

    response = await caller.send("POST", f"{API}/x", json={"a": 1})

    assert response.status_code == 401
    assert caller.authorizations == ["Bearer token-0", "Bearer token-1"]
    assert [request.content for request in caller.arrived] == [b'{"a":1}', b'{"a":1}']
    assert caller.line.asked == [True]


async def test_a_401_to_a_token_that_was_renewed_meanwhile_mints_none(make: Make) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.headers["Authorization"] != "Bearer token-0":
            return httpx.Response(200)
        held = caller.line.held
        held.token = AccessToken("token-9", held.token.expires_at)
        return httpx.Response(401)

    caller = make(answer)

    response = await caller.send("GET", f"{API}/x")

    assert response.status_code == 200
    assert caller.authorizations == ["Bearer token-0", "Bearer token-9"]
    assert caller.line.asked == []


async def test_a_401_from_elsewhere_mints_none(make: Make) -> None:
    caller = make(lambda request: httpx.Response(401))

    await caller.send("GET", "https://evil.example/")

    assert caller.line.asked == []
    assert len(caller.arrived) == 1


async def test_a_streamed_body_is_not_sent_twice(make: Make) -> None:
    caller = make(lambda request: httpx.Response(401))

    async def chunks() -> Any:
        yield b"x"

    content = chunks() if isinstance(caller._client, httpx.AsyncClient) else iter([b"x"])
    response = await caller.send("POST", f"{API}/x", content=content)

    assert response.status_code == 401
    assert len(caller.arrived) == 1


async def test_a_token_is_renewed_ahead_of_its_expiry(make: Make, clock: ManualClock) -> None:
    caller = make(ok)

    await caller.send("GET", f"{API}/x")
    clock.advance(79)
    await caller.send("GET", f"{API}/x")
    clock.advance(2)
    await caller.send("GET", f"{API}/x")

    assert caller.authorizations == ["Bearer token-0", "Bearer token-0", "Bearer token-1"]
    assert caller.line.asked == [False]


async def test_an_authorization_of_the_handlers_own_is_left_alone(make: Make) -> None:
    caller = make(ok)

    await caller.send("GET", "https://llm.example/", headers={"Authorization": "Bearer mine"})
    await caller.send("GET", f"{API}/x", headers={"Authorization": "Bearer mine"})

    assert caller.authorizations == ["Bearer mine", "Bearer mine"]


async def test_an_idempotency_key_of_the_handlers_own_is_sent_instead(make: Make) -> None:
    caller = make(ok)

    await caller.send("POST", f"{API}/x", headers={"Idempotency-Key": "mine"})

    assert caller.arrived[0].headers["Idempotency-Key"] == "mine"


def test_an_origin_has_its_schemes_port_by_default() -> None:
    assert origin_of("https://Api.Acme.com/path") == ("https", "api.acme.com", 443)
    assert origin_of("http://127.0.0.1:8000") == ("http", "127.0.0.1", 8000)
    assert origin_of("http://[::1]:8000") == ("http", "::1", 8000)
