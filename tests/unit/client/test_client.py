"""The client of the API, in both colours: what it sends, makes of answers, and never gives away."""

from __future__ import annotations

import json
import logging
import pickle
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from tests.unit.client.api import TOKEN, URL, FakeApi, problem, raised
from worker import client as package
from worker.client import (
    AsyncClient,
    BadAnswer,
    Client,
    ClientError,
    ConfigurationError,
    Conflict,
    Denied,
    InvalidRequest,
    NotFound,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    WaitTimeout,
    plans,
)
from worker.client import client as module
from worker.client.plans import EventReader, Listen, Reply, Retries, Send, Sleep

RUN = {"id": "run-1", "org": "org_a", "definition": "export", "state": "waiting", "attempt": 0}
Answer = Callable[[httpx.Request], httpx.Response]


class Colour:
    """A client of either colour, called alike."""

    def __init__(self, kind: str, answer: Answer, **how: Any) -> None:
        how = {"retry_for": 0} | how
        transport = httpx.MockTransport(answer)
        self.is_async = kind == "async"
        self.client: Any = (AsyncClient if self.is_async else Client)(URL, TOKEN, transport=transport, **how)

    async def __call__(self, name: str, *args: Any, **more: Any) -> Any:
        found = getattr(self.client, name)(*args, **more)
        return await found if self.is_async else found


@pytest.fixture(params=["sync", "async"])
def made(request: pytest.FixtureRequest) -> Callable[..., Colour]:
    return lambda answer, **how: Colour(request.param, answer, **how)


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, without making them."""
    found: list[float] = []

    async def nap(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr(module.time, "sleep", found.append)
    monkeypatch.setattr(module.asyncio, "sleep", nap)
    return found


async def test_a_start_is_one_request_with_its_key(made: Callable[..., Colour]):
    api = FakeApi()

    at = datetime(2030, 1, 1, tzinfo=UTC)
    started = await made(api)("start", "org_a", "export", {"page": 1}, key="order-1", not_before=at)

    [request] = api.requests
    assert (request.method, str(request.url)) == ("POST", f"{URL}/api/v1/definitions/org_a/export/run")
    assert request.headers["idempotency-key"] == "order-1"
    assert json.loads(request.content) == {"params": {"page": 1}, "not_before": "2030-01-01T00:00:00+00:00"}
    assert (started.run.id, started.key, started.replayed, started.run.has_ended) == (
        "run-1", "order-1", None, False,
    )  # fmt: skip


async def test_a_key_of_other_params_is_the_first_run_and_the_answer_says_so(made: Callable[..., Colour]):
    client = made(FakeApi())
    answers = [await client("start", "org_a", "export", {"page": page}, key="k") for page in (1, 1, 2)]

    assert [answer.run.id for answer in answers] == ["run-1"] * 3
    assert [answer.replayed for answer in answers] == [None, "same", "other"]


@pytest.mark.parametrize(
    "fault", [problem(503, "busy"), httpx.ReadError("lost"), httpx.Response(502, text="<html>")]
)
async def test_a_start_is_repeated_with_its_own_key_until_it_is_answered(
    made: Callable[..., Colour], naps: list[float], fault: Any
):
    """Also without a key of the caller: each call is one run."""
    api, faults = FakeApi(), [fault] * 3
    api.after = lambda what: faults.pop() if faults else None

    started = await made(api, retry_for=30)("start", "org_a", "export")

    assert (len(api.requests), len(api.runs), started.replayed) == (4, 1, "same")
    assert len({request.headers["idempotency-key"] for request in api.requests}) == 1
    assert len(naps) == 3 and naps[0] < naps[2] <= 0.8


async def test_a_limit_says_when_to_try_again(made: Callable[..., Colour], naps: list[float]):
    api, faults = FakeApi(), [problem(429, "too_many_requests", Retry_After=7)]
    api.before = lambda what: faults.pop() if faults else None

    await made(api, retry_for=30)("start", "org_a", "export")

    assert naps == [7.0]


async def test_a_server_cannot_make_a_client_sleep_for_days(made: Callable[..., Colour], naps: list[float]):
    answer = problem(429, "too_many_requests", Retry_After=999_999_999)

    with pytest.raises(TooManyRequests) as caught:
        await made(lambda request: answer, retry_for=30)("start", "org_a", "export")

    assert (naps, caught.value.retry_after) == ([], plans.LONGEST_RETRY_AFTER)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "usage", InvalidRequest),
        (401, "token", Unauthorized),
        (403, "denied", Denied),
        (404, "not_found", NotFound),
        (409, "conflict", Conflict),
        (422, "definition", InvalidRequest),
        (429, "too_many_requests", TooManyRequests),
        (503, "database_unavailable", Unavailable),
        (500, "unexpected", Unavailable),
    ],
)
async def test_a_problem_is_a_type_with_its_fix(
    made: Callable[..., Colour], status: int, code: str, kind: type[ClientError]
):
    answer = problem(status, code, field="params.page")

    with pytest.raises(kind) as caught:
        await made(lambda request: answer)("run", "run-1")

    error = caught.value
    assert (error.status, error.code, error.field) == (status, code, "params.page")
    assert (error.message, error.fix) == (f"the detail of {code}", "the fix")
    assert error.is_final == (status in (400, 404, 422))
    assert error.transient == (status in (429, 500, 503))


# ---- a hostile server, or another one


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(302, headers={"location": "https://evil.test/"}),
        httpx.Response(307, headers={"location": "/elsewhere"}),
        httpx.Response(404, text="nginx"),
        httpx.Response(200, text="<html>"),
        httpx.Response(200, json=[]),
        httpx.Response(200, json={**RUN, "state": 7}),
        httpx.Response(200, json={**RUN, "started_at": "yesterday"}),
        httpx.Response(200, json={**RUN, "started_at": "2030-01-01T00:00:00"}),
        httpx.Response(200, json={**RUN, "error": "x"}),
        httpx.Response(200, content=b"[" * 100_000),
        httpx.Response(200, content=b"1" * 5_000_000),
        httpx.Response(200, headers={"content-encoding": "gzip"}, content=b""),
    ],
)
async def test_what_is_not_the_api_is_a_bad_answer(made: Callable[..., Colour], answer: httpx.Response):
    asked = []

    def serve(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return raised(answer)

    with pytest.raises(BadAnswer):
        await made(serve, retry_for=30)("run", "run-1")

    # Neither followed nor repeated.
    assert asked == [f"{URL}/api/v1/runs/run-1"]


async def test_a_run_of_another_definition_is_no_answer(made: Callable[..., Colour]):
    answer = httpx.Response(201, json={**RUN, "org": "org_b"})

    with pytest.raises(BadAnswer, match="another definition"):
        await made(lambda request: answer)("start", "org_a", "export")


@pytest.mark.parametrize("name", ["", ".", "..", "x" * 201])
async def test_a_name_cannot_lead_to_another_address(made: Callable[..., Colour], name: str):
    client = made(lambda request: pytest.fail("it was sent"))

    for call in (("start", name, "export"), ("start", "org_a", name), ("run", name)):
        with pytest.raises(InvalidRequest):
            await client(*call)


async def test_a_slash_stays_within_its_segment(made: Callable[..., Colour]):
    asked = []

    def serve(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.raw_path)
        return problem(404, "not_found")

    with pytest.raises(NotFound):
        await made(serve)("start", "a/../../x", "b?c#d")

    assert asked == [b"/api/v1/definitions/a%2F..%2F..%2Fx/b%3Fc%23d/run"]


@pytest.mark.parametrize("key", ["", "x" * 201, "a\nb", "é", " a", "\x00"])
def test_a_key_that_no_header_can_carry_is_refused(key: str):
    with pytest.raises(InvalidRequest, match="key"):
        Client(URL, TOKEN).start("org_a", "export", key=key)


@pytest.mark.parametrize(
    "params", [[1], {"a": float("nan")}, {"a": object()}, {"a": "x" * 70_000}, {"a": {1, 2}}]
)
def test_params_that_are_no_json_or_too_large_are_refused(params: Any):
    with pytest.raises(InvalidRequest, match="params"):
        Client(URL, TOKEN).start("org_a", "export", params)


# ---- the token


async def test_the_token_is_in_nothing_that_people_see(
    made: Callable[..., Colour], caplog: pytest.LogCaptureFixture, naps: list[float]
):
    """A canary: logs at the finest level, errors with their causes, and reprs; a server sends it back."""
    caplog.set_level(logging.DEBUG)
    texts: list[str] = []
    echoes: list[Any] = [
        problem(422, "definition", detail=f"bad {TOKEN}", fix=TOKEN, field=TOKEN),
        problem(401, TOKEN),
        httpx.Response(500, text=TOKEN),
        httpx.Response(302, headers={"location": f"https://evil.test/{TOKEN}"}),
        httpx.Response(200, json={**RUN, "state": "failed", "error": {"message": TOKEN}}),
        httpx.ConnectError(f"no {URL}"),
    ]
    for echo in echoes:

        def serve(request: httpx.Request, echo: Any = echo) -> httpx.Response:
            assert request.headers["authorization"] == f"Bearer {TOKEN}"
            if isinstance(echo, Exception):
                raise echo
            return echo

        client = made(serve)
        texts.append(repr(client.client))
        try:
            texts.append(repr(await client("run", "run-1")))
        except ClientError as error:
            texts += [*traceback.format_exception(error), repr(error), repr(vars(error))]
            assert (
                error.__context__ is None
                or error.__suppress_context__
                or TOKEN not in repr(error.__context__)
            )
    texts += [record.getMessage() for record in caplog.records]

    assert [text for text in texts if TOKEN in text] == []
    with pytest.raises(TypeError, match="token"):
        pickle.dumps(made(lambda request: echoes[2]).client)


@pytest.mark.parametrize(
    ("url", "more"),
    [
        ("http://jobs.acme.com", {}),
        ("ftp://jobs.acme.com", {}),
        ("https://user:secret@jobs.acme.com", {}),
        ("https://jobs.acme.com/?x=1", {}),
        ("jobs.acme.com", {}),
        ("https://[::1", {}),
        ("https://", {}),
        ("ftp://127.0.0.1", {"plain_http": True}),
    ],
)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_an_address_that_would_give_the_token_away_is_refused(kind: Any, url: str, more: dict[str, bool]):
    with pytest.raises(ConfigurationError) as caught:
        kind(url, TOKEN, **more)

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8470", "http://localhost:8470/", "http://[::1]:8470"])
def test_this_machine_may_be_asked_in_clear(url: str):
    assert repr(Client(url, TOKEN)) == f"Client({url.rstrip('/')!r})"
    assert Client("http://worker:8470", TOKEN, plain_http=True).url == "http://worker:8470"


@pytest.mark.parametrize("token", ["", "a b", "a\nb", "é"])
async def test_a_token_that_is_none_is_not_sent(made: Callable[..., Colour], token: str):
    client = made(lambda request: pytest.fail("it was sent"))
    client.client._token = token

    with pytest.raises(ConfigurationError):
        await client("run", "run-1")


async def test_a_token_is_read_again_for_each_request(tmp_path: Any):
    file, seen = tmp_path / "token", []

    def serve(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["authorization"])
        return httpx.Response(200, json=RUN)

    client = Client(URL, package.token_file(file), transport=httpx.MockTransport(serve))
    with pytest.raises(ConfigurationError, match="cannot be read"):
        client.run("run-1")
    for token in ("first\n", "second\n"):
        file.write_text(token)
        client.run("run-1")

    assert seen == ["Bearer first", "Bearer second"]


# ---- waiting


def events(*states: str, id_: str = "0.0.aa") -> bytes:
    sent = b"retry: 3000\n\n: \n\n"
    for state in states:
        row = json.dumps({**RUN, "state": state})
        sent += f"event: state\r\nid: {id_}\r\ndata: {row}\r\n\r\n".encode()
    return sent


class Stream(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body in pieces, of which the last may be an error."""

    def __init__(self, *pieces: bytes | Exception) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece


def stream(*pieces: bytes | Exception) -> httpx.Response:
    return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Stream(*pieces))


async def test_a_wait_ends_with_the_run_and_resumes_a_stream_that_is_cut(
    made: Callable[..., Colour], naps: list[float]
):
    whole = events("running", "succeeded", id_="0.0.bb")
    answers = [
        stream(events("waiting"), httpx.ReadError("cut")),
        problem(503, "busy"),
        stream(events("running", id_="0.0.ab")),
        stream(*(whole[place : place + 1] for place in range(len(whole)))),
    ]
    resumed = []

    def serve(request: httpx.Request) -> httpx.Response:
        resumed.append(request.headers.get("last-event-id"))
        assert request.url.path == "/api/v1/runs/run-1/events"
        return answers.pop(0)

    run = await made(serve, retry_for=30)("wait", "run-1")

    assert (run.state, run.succeeded) == ("succeeded", True)
    assert resumed == [None, "0.0.aa", "0.0.aa", "0.0.ab"]
    assert len(naps) == 3


async def test_a_run_whose_end_was_seen_is_read(made: Callable[..., Colour]):
    """The API answers 204: nothing is left of the events."""

    def serve(request: httpx.Request) -> httpx.Response:
        ended = {**RUN, "state": "failed", "error": {"type": "KeyError", "message": "x"}}
        return httpx.Response(204) if "events" in request.url.path else httpx.Response(200, json=ended)

    run = await made(serve)("wait", "run-1")

    assert (run.state, run.has_ended, run.succeeded, run.error["type"]) == ("failed", True, False, "KeyError")


async def test_a_wait_of_a_run_that_is_not_there_ends(made: Callable[..., Colour]):
    with pytest.raises(NotFound):
        await made(lambda request: problem(404, "not_found"), retry_for=30)("wait", "run-1")


async def test_a_wait_does_not_take_a_page_for_events(made: Callable[..., Colour], naps: list[float]):
    pages = [httpx.Response(200, html="<p>Be back soon</p>")]

    with pytest.raises(BadAnswer):
        await made(lambda request: pages.pop(), retry_for=30)("wait", "run-1")


def test_a_wait_ends_after_its_time_and_the_run_goes_on():
    now = [0.0]
    plan = plans.wait("run-1", 10, Retries(5, lambda: now[0]))
    step = next(plan)
    assert isinstance(step, Listen) and step.seconds == 10

    now[0] = 9.5
    step = plan.send(Reply(200, {}, b""))
    assert isinstance(step, Sleep) and step.seconds <= 0.5
    now[0] = 10.0
    with pytest.raises(WaitTimeout, match="it continues"):
        plan.send(None)


def test_a_wait_without_retries_ends_after_its_time_too():
    """The time ends the request, which looks like an API that does not answer."""
    now = [0.0]
    plan = plans.wait("run-1", 10, Retries(0, lambda: now[0]))
    next(plan)

    now[0] = 10.0
    assert plan.send(Unavailable("lost")) == Sleep(0.0)
    with pytest.raises(WaitTimeout):
        plan.send(None)


def test_a_wait_gives_up_when_the_api_is_away_for_too_long():
    now = [0.0]
    plan = plans.wait("run-1", None, Retries(5, lambda: now[0]))
    next(plan)
    lost = Unavailable("lost")
    for at in (0.0, 3.0, 4.9):
        now[0] = at
        assert isinstance(plan.send(lost), Sleep)
        assert isinstance(plan.send(None), Listen)
    now[0] = 5.1
    with pytest.raises(Unavailable):
        plan.send(lost)


@pytest.mark.parametrize("piece", [b"x" * 1000, b"data: x\n" * 100])
def test_events_without_an_end_are_not_kept(piece: bytes):
    reader = EventReader()
    with pytest.raises(BadAnswer, match="too large"):
        for _ in range(plans.EVENT_LIMIT // 500 + 2):
            reader.feed(piece)


def test_a_plan_asks_for_what_it_needs_and_nothing_else():
    """Both colours take the same plans, so that a step of another kind would be noticed here."""
    step = next(plans.show("run-1", Retries(0, lambda: 0.0)))

    assert step == Send("GET", "/runs/run-1")


def test_a_product_that_only_inserts_needs_no_http():
    """`Outbox` in a request handler must not load what it does not use."""
    code = "import sys; from worker.client import Outbox; print('httpx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "False\n"
