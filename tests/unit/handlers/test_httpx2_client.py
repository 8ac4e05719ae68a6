"""`httpx2_client`: another library's requests go through `ctx.http`, with its token and its checks."""

from __future__ import annotations

import gzip
import subprocess
import sys
from typing import Any

import httpx
import httpx2
import pytest

from worker import BlockingContext, Context, httpx2_client, job
from worker.testing import Orgworker, SecretRotated

URL = "https://api.example.com/v1/ask"
# What a library sends as its own credential.
LIBRARY = {"Authorization": "Bearer key-of-the-library"}


@job("acme.ask")
async def ask(ctx: Context[dict[str, Any], Any]) -> Any:
    async with httpx2_client(ctx) as client:
        response = await client.post(URL, json={"question": "why?"}, headers=LIBRARY)
    return [response.status_code, response.text, response.headers.get("x-served-by")]


def echo(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, text=request.content.decode(), headers={"X-Served-By": "api"})


def test_a_request_carries_the_orgs_token_instead_of_the_librarys(orgworker: Orgworker):
    finished = orgworker.run(ask, api=echo)

    assert finished.result == [200, '{"question":"why?"}', "api"]
    [request] = finished.requests
    assert request.headers["Authorization"] not in ("", LIBRARY["Authorization"])
    assert request.headers["Idempotency-Key"]
    assert request.headers.get_list("Host") == ["api.example.com"]


def test_another_origin_gets_neither_token_nor_key(orgworker: Orgworker):
    finished = orgworker.run(ask, api=echo, api_origins=["https://other.example.com"])

    [request] = finished.requests
    assert "Authorization" not in request.headers


def test_a_rejected_token_is_renewed_and_the_body_sent_again(orgworker: Orgworker):
    finished = orgworker.run(ask, api=echo, faults=[SecretRotated()])

    assert finished.result == [200, '{"question":"why?"}', "api"]


def test_a_compressed_response_arrives_as_text(orgworker: Orgworker):
    def compressed(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=gzip.compress(b"because"), headers={"Content-Encoding": "gzip"})

    assert orgworker.run(ask, api=compressed).result == [200, "because", None]


def test_a_redirect_is_left_to_the_library(orgworker: Orgworker):
    def elsewhere(request: httpx.Request) -> httpx.Response:
        return httpx.Response(307, headers={"Location": "https://other.example.com/"})

    finished = orgworker.run(ask, api=elsewhere)

    assert finished.result[0] == 307
    assert len(finished.requests) == 1


@pytest.mark.parametrize("error", [httpx.ConnectError, httpx.ReadTimeout, httpx.RemoteProtocolError])
def test_a_lost_connection_raises_the_error_of_httpx2(
    orgworker: Orgworker, error: type[httpx.TransportError]
):
    def lost(request: httpx.Request) -> httpx.Response:
        raise error("lost", request=request)

    @job("acme.lost")
    async def watch(ctx: Context[dict[str, Any], Any]) -> str:
        try:
            await httpx2_client(ctx).get(URL)
        except httpx2.TransportError as raised:
            return type(raised).__name__
        return "none"

    assert orgworker.run(watch, api=lost).result == error.__name__


def test_the_timeout_of_the_library_applies(orgworker: Orgworker):
    seen = []

    def note(request: httpx.Request) -> httpx.Response:
        seen.append(request.extensions["timeout"])
        return httpx.Response(200)

    @job("acme.patient")
    async def patient(ctx: Context[dict[str, Any], Any]) -> None:
        await httpx2_client(ctx).get(URL, timeout=httpx2.Timeout(3, read=600))
        await httpx2_client(ctx).get(URL)

    orgworker.run(patient, api=note)

    assert seen == [
        {"connect": 3, "read": 600, "write": 3, "pool": 3},
        {"connect": 10, "read": 30, "write": 30, "pool": 30},
    ]


def test_a_handler_that_blocks_is_told_so(orgworker: Orgworker):
    @job("acme.blocking")
    def blocking(ctx: BlockingContext[dict[str, Any], Any]) -> None:
        httpx2_client(ctx)  # type: ignore[arg-type]

    finished = orgworker.run(blocking, definition={"max_attempts": 1})

    assert finished.error is not None
    assert finished.error["message"] == "httpx2_client needs the Context of an async handler"


@pytest.mark.parametrize("package", ["httpx2", "pydantic_ai"])
def test_the_worker_does_not_load_an_extra_until_it_is_used(package: str):
    check = f"import worker, sys; worker.Context, worker.job; sys.exit('{package}' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


@pytest.mark.parametrize(("package", "name"), [("httpx2", "httpx2_client"), ("pydantic_ai", "durable")])
def test_without_its_package_the_error_names_the_extra(package: str, name: str):
    check = (
        f"import sys; sys.modules['{package}'] = None\n"
        f"try:\n    from worker import {name}\n"
        "except ImportError as error:\n    print(error)"
    )

    shown = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout
    assert "extra pydantic-ai" in shown


@job("acme.library")
async def library(ctx: Context[dict[str, Any], Any]) -> Any:
    async with ctx.http_client(ctx.params["library"]) as client:
        response = await client.post(ctx.params["url"], json={}, headers=LIBRARY)
    return response.status_code


@pytest.mark.parametrize("kind", ["httpx", "httpx2"])
def test_a_client_for_libraries_replaces_the_key_only_for_the_orgs_api(orgworker: Orgworker, kind: str):
    for url, keeps in ((URL, False), ("https://other.example.com/", True)):
        finished = orgworker.run(library, api=echo, params={"library": kind, "url": url})

        assert finished.result == 200
        assert (finished.requests[-1].headers["Authorization"] == LIBRARY["Authorization"]) is keeps
