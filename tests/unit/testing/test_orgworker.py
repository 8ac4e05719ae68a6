"""What `orgworker.run` shows of a handler: the real attempt, in no time, with what the test makes up."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from datetime import timedelta
from typing import Any

import anyio.to_thread
import httpx
import pytest
from pydantic import BaseModel, Field
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tests.fakes.clock import utc
from worker import BlockingContext, Cancel, Context, PermanentError, Retry, Snooze, job
from worker.errors import DefinitionError, NotFound, UsageError
from worker.handlers.calls import Save
from worker.testing import Crash

URL = "https://api.example.com/articles"


class Params(BaseModel):
    pages: int = 2


class Settings(BaseModel):
    model: str = "small"
    max_tokens: int = Field(10, ge=1)


@job("t.digest", params=Params, settings=Settings, scopes={"read:kb"}, timeout="1h")
async def digest(ctx: Context[Params, Settings]) -> dict[str, Any]:
    done = (ctx.checkpoint or {}).get("done", 0)
    while done < ctx.params.pages:
        response = await ctx.http.get(URL, params={"page": done})
        response.raise_for_status()
        done += 1
        await ctx.save({"done": done})
        ctx.progress(done, ctx.params.pages, "pages")
        ctx.log.info("page %d under %s", done, (await ctx.token()).reveal())
    return {"org": ctx.org.code, "model": ctx.settings.model, "loud": ctx.flag("loud")}


@job("t.blocking", params=Params, settings=Settings, scopes={"read:kb"})
def blocking(ctx: BlockingContext[Params, Settings]) -> dict[str, Any]:
    done = (ctx.checkpoint or {}).get("done", 0)
    while done < ctx.params.pages:
        ctx.http.get(URL, params={"page": done}).raise_for_status()
        done += 1
        ctx.save({"done": done})
        ctx.progress(done, ctx.params.pages, "pages")
        ctx.log.info("page %d under %s", done, ctx.token().reveal())
    return {"org": ctx.org.code, "model": ctx.settings.model, "loud": ctx.flag("loud")}


def articles(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json=[])


@pytest.mark.parametrize("handler", [digest, blocking], ids=["async", "blocking"])
def test_a_handler_runs_under_the_claims_that_the_test_makes_up(orgworker, handler):
    finished = orgworker.run(
        handler,
        org="org_acme",
        params={"pages": 3},
        properties={"max_tokens": "1000", "model": "large"},
        flags={"loud": True},
        api=articles,
    )

    assert (finished.state, finished.reason) == ("succeeded", None)
    assert finished.result == {"org": "org_acme", "model": "large", "loud": True}
    assert finished.checkpoint == {"done": 3}
    assert finished.progress == {"done": 3, "total": 3, "note": "pages"}
    assert [line.text for line in finished.logs] == [f"page {n} under [masked]" for n in (1, 2, 3)]
    assert len(finished.requests) == 3
    assert finished.requests[0].headers["Authorization"].startswith("Bearer made-up.")


@pytest.mark.parametrize("handler", [digest, blocking], ids=["async", "blocking"])
def test_a_crash_after_a_checkpoint_goes_on_from_there(orgworker, handler):
    finished = orgworker.run(handler, api=articles, faults=[Crash(after_save=1)])

    assert finished.state == "succeeded"
    assert [attempt.outcome for attempt in finished.attempts] == ["lost", "succeeded"]
    assert [request.url.params["page"] for request in finished.requests] == ["0", "1"]
    keys = {request.headers["Idempotency-Key"] for request in finished.requests}
    assert len(keys) == 1


def test_the_token_goes_to_the_origins_of_the_issuer_only(orgworker):
    finished = orgworker.run(digest, api=articles, api_origins=["https://api.acme.com"])

    assert "Authorization" not in finished.requests[0].headers


@pytest.mark.parametrize("handler", [digest, blocking], ids=["async", "blocking"])
def test_an_asgi_app_answers_as_a_function_does(orgworker, handler):
    async def list_articles(request: Request) -> JSONResponse:
        return JSONResponse([request.query_params["page"]])

    finished = orgworker.run(handler, api=Starlette(routes=[Route("/articles", list_articles)]))

    assert finished.state == "succeeded"


def test_without_an_api_a_request_fails_and_says_what_to_give(orgworker, capsys):
    finished = orgworker.run(digest, definition={"max_attempts": 1})

    assert (finished.state, finished.reason) == ("failed", "error")
    assert "pass api= to orgworker.run" in finished.error["message"]
    assert "raise" not in capsys.readouterr().out


def test_settings_and_params_are_checked_as_in_a_run(orgworker):
    refused = orgworker.run(digest, properties={"max_tokens": "many"})
    failed = orgworker.run(digest, params={"page": 2})

    assert (refused.state, refused.reason, refused.detail) == ("refused", "settings_invalid", "max_tokens")
    assert (failed.state, len(failed.attempts)) == ("failed", 1)
    assert "param page" in failed.error["message"]


def test_a_scope_that_the_token_lacks_refuses_the_run(orgworker):
    finished = orgworker.run(digest, scopes=["write:kb"])

    assert (finished.state, finished.reason, finished.detail) == ("refused", "scope_missing", "read:kb")


def test_a_definition_may_gate_it_and_choose_a_variant(orgworker):
    @job("t.other")
    async def other(ctx: Context) -> str:
        return "other"

    definition = {"requires_flag": "on", "variants": [{"flag": "v2", "handler": "t.other"}]}

    gated = orgworker.run(digest, definition=definition, variants=[other])
    varied = orgworker.run(digest, definition=definition, variants=[other], flags={"on": True, "v2": True})

    assert (gated.state, gated.reason, gated.detail) == ("skipped", "flag_off", "on")
    assert (varied.result, varied.attempts[0].handler) == ("other", "t.other")


def test_waiting_takes_no_time_and_a_timeout_passes(orgworker):
    @job("t.sleeper", timeout="1d", max_attempts=1)
    async def sleeper(ctx: Context) -> None:
        await asyncio.sleep(30 * 86_400)

    finished = orgworker.run(sleeper)

    assert (finished.state, finished.reason) == ("failed", "timed_out")
    assert orgworker.clock.now() - utc("2030-01-01") == timedelta(days=1, seconds=5)


def test_retries_snoozes_and_answers_move_the_clock_on(orgworker):
    @job("t.answers", max_attempts=2)
    async def answers(ctx: Context) -> Any:
        match ctx.run.attempt:
            case 1:
                return Snooze("2h")
            case 2:
                return Retry("30m")
            case _:
                return Cancel("enough")

    finished = orgworker.run(answers)

    assert [attempt.reason for attempt in finished.attempts] == ["snoozed", "retry", "by_handler"]
    assert orgworker.clock.now() == utc("2030-01-01T02:30")


def test_a_run_that_never_ends_is_left_waiting(orgworker):
    @job("t.snoozer")
    async def snoozer(ctx: Context) -> Snooze:
        return Snooze("1h")

    finished = orgworker.run(snoozer, attempts=4)

    assert (finished.state, finished.reason, len(finished.attempts)) == ("waiting", "snoozed", 4)


def test_errors_stop_retrying_where_the_handler_says_so_and_their_trace_is_shown(orgworker, capsys):
    @job("t.permanent")
    async def permanent(ctx: Context) -> None:
        raise PermanentError("no such collection")

    finished = orgworker.run(permanent)

    assert (finished.state, len(finished.attempts)) == ("failed", 1)
    assert "no such collection" in capsys.readouterr().err


def test_a_token_is_renewed_ahead_of_its_expiry(orgworker):
    @job("t.long", timeout="1d")
    async def long(ctx: Context) -> int:
        seen = set()
        for _ in range(10):
            seen.add((await ctx.token()).reveal())
            await asyncio.sleep(1800)
        return len(seen)

    assert orgworker.run(long, token_lifetime="1h").result == 10 // 2


def test_a_blocking_handlers_timeout_passes_when_the_test_moves_the_clock(orgworker):
    def slow(request: httpx.Request) -> httpx.Response:
        orgworker.clock.advance("2h")
        return httpx.Response(200)

    @job("t.slow", timeout="1h", max_attempts=1)
    def handler(ctx: BlockingContext) -> str | None:
        ctx.http.get(URL)
        ctx.cancelled.wait(10)
        return ctx.cancelled.reason

    finished = orgworker.run(handler, api=slow)

    # It was told, came to an end by itself, and that counts.
    assert (finished.state, finished.result) == ("succeeded", "timeout")


@pytest.mark.parametrize("how", ["asyncio", "anyio"])
def test_the_clock_waits_for_threads_that_work(orgworker, how):
    @job("t.threads", timeout="60s")
    async def threads(ctx: Context) -> str:
        def work() -> str:
            time.sleep(0.15)
            return "done"

        if how == "asyncio":
            return await asyncio.to_thread(work)
        return await anyio.to_thread.run_sync(work)

    finished = orgworker.run(threads)

    # A clock that leaped to what else there is to wait for would have come to the timeout.
    assert finished.result == "done"


@job("t.saves")
async def saves(ctx: Context) -> None:
    await asyncio.gather(ctx.save(["long"] * 10_000), ctx.save("short"))


@pytest.mark.parametrize("numbered", [True, False], ids=["", "control"])
def test_the_save_that_was_called_last_stays(orgworker, numbered, monkeypatch):
    """A long checkpoint is masked longer, and arrives after a short one."""
    if not numbered:
        monkeypatch.setattr(Context, "_save", lambda self, data: Save(json.dumps(data)))

    checkpoint = orgworker.run(saves).checkpoint

    assert checkpoint == ("short" if numbered else ["long"] * 10_000)


def test_a_checkpoint_may_be_given(orgworker):
    finished = orgworker.run(digest, checkpoint={"done": 1}, api=articles)

    assert [request.url.params["page"] for request in finished.requests] == ["1"]


def test_it_starts_when_the_test_says(orgworker):
    @job("t.when")
    async def when(ctx: Context) -> str:
        return ctx.run.scheduled_for.isoformat()

    orgworker.clock.set("2030-03-31T00:59:50Z")

    assert orgworker.run(when).result == "2030-03-31T00:59:50+00:00"


def test_an_installed_handler_is_found_by_its_name(orgworker):
    finished = orgworker.run(
        "http.request",
        params={"url": "https://api.example.com/ping"},
        api=articles,
        definition={"scopes": []},
    )

    assert finished.state == "succeeded"


@job("t.listed", egress=["api", "https://b.example"])
async def listed(ctx: Context) -> int:
    return (await ctx.http.get(ctx.params["url"])).status_code


@pytest.mark.parametrize(
    ("url", "definition", "denied"),
    [
        ("https://api.example.com/x", {}, False),
        ("https://b.example/x", {}, False),
        ("https://c.example/x", {}, True),
        ("https://b.example:8443/x", {}, True),
        ("https://b.example/x", {"egress": ["api"]}, True),
    ],
)
def test_a_request_to_what_a_handler_does_not_list_is_denied(
    orgworker, url: str, definition: dict[str, Any], denied: bool
):
    finished = orgworker.run(
        listed, params={"url": url}, api=lambda request: httpx.Response(200), definition=definition
    )

    if not denied:
        assert (finished.state, finished.result) == ("succeeded", 200)
        return
    assert (finished.state, finished.error["type"].rpartition(".")[2]) == ("failed", "EgressDenied")
    assert "is not in the egress list of this run" in finished.error["message"]


@job("t.fetch")
async def fetch(ctx: Context) -> int:
    return (await ctx.public_http.get(ctx.params["url"])).status_code


@job("t.fetch_blocking")
def fetch_blocking(ctx: BlockingContext) -> int:
    return ctx.public_http.get(ctx.params["url"]).status_code


@pytest.mark.parametrize("handler", [fetch, fetch_blocking], ids=["async", "blocking"])
def test_the_address_of_a_url_from_params_is_checked_before_the_api_answers(orgworker, handler):
    def fetched(url, **options):
        return orgworker.run(handler, params={"url": url}, api=articles, attempts=1, **options)

    assert fetched("https://anywhere.example/x").state == "succeeded"
    for url in ("http://169.254.169.254/", "http://0x7f.1/", "http://[::1]/", "http://localhost/"):
        refused = fetched(url)
        assert (refused.state, refused.requests) == ("failed", ())
        assert "[execution] private_origins" in refused.error["message"]

    hosts = {"reports.internal": "10.0.0.5"}
    assert fetched("http://reports.internal/", hosts=hosts).state == "failed"
    listed = fetched("http://reports.internal/", hosts=hosts, private_origins=["http://reports.internal"])
    assert (listed.state, "Authorization" in listed.requests[0].headers) == ("succeeded", False)
    ours = fetched("http://reports.internal/", hosts=hosts, api_origins=["http://reports.internal"])
    assert (ours.state, "Authorization" in ours.requests[0].headers) == ("succeeded", True)


def test_what_is_wrong_with_the_test_is_said(orgworker):
    with pytest.raises(NotFound, match=r"handler no\.such") as raised:
        orgworker.run("no.such")
    assert raised.value.__notes__ == [
        "fix: install its distribution (`pip install -e .`), or pass the handler itself"
    ]
    with pytest.raises(DefinitionError, match="time_out"):
        orgworker.run(digest, definition={"time_out": "5m"})
    with pytest.raises(UsageError, match="child process cannot reach"):
        orgworker.run(digest, api=articles, place="child")


async def test_in_an_async_test_it_says_how(orgworker):
    with pytest.raises(UsageError, match="its own event loop"):
        orgworker.run(digest)

    finished = await asyncio.to_thread(orgworker.run, digest, api=articles)

    assert finished.state == "succeeded"


def test_nothing_is_left_behind(orgworker):
    loggers = set(logging.root.manager.loggerDict)

    orgworker.run(blocking, api=articles)

    assert set(logging.root.manager.loggerDict) == loggers


@job("acme.keyed", secrets={"openai"})
def keyed(ctx: BlockingContext) -> int:
    ctx.log.info("the key is %s", ctx.secret("openai"))
    return len(ctx.secret("openai"))


@pytest.mark.parametrize("place", ["here", "child"])
def test_a_handler_gets_the_secrets_of_the_test_and_they_are_masked(orgworker, place):
    finished = orgworker.run(keyed, secrets={"openai": "sk-0123456789", "other": "x" * 20}, place=place)

    assert (finished.state, finished.result) == ("succeeded", 13)
    assert [line.text for line in finished.logs] == ["the key is [masked]"]


def test_a_secret_that_the_test_does_not_give_refuses_the_run(orgworker):
    finished = orgworker.run(keyed, secrets={"other": "x" * 20})

    assert (finished.state, finished.reason, finished.detail) == ("refused", "secret_missing", "openai")
