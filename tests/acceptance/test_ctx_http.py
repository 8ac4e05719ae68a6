"""`ctx.http` carries the org's token to listed origins only, and not through a redirect to another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from tests.fakes.site import application, definition
from worker.demo.serving import ServerThread, bind_loopback


class Canary:
    """An origin that remembers the headers it was sent, and redirects to where it is told."""

    def __init__(self) -> None:
        self.headers: list[dict[str, str]] = []
        self.target = ""
        routes = [Route("/", self.answer), Route("/away", self.redirect)]
        self.server = ServerThread(Starlette(routes=routes), bind_loopback()).start()

    @property
    def url(self) -> str:
        return self.server.url

    async def answer(self, request: Request) -> Response:
        self.headers.append(dict(request.headers))
        return JSONResponse({})

    async def redirect(self, request: Request) -> Response:
        self.headers.append(dict(request.headers))
        return RedirectResponse(self.target)


@pytest.fixture
def listed() -> Iterator[Canary]:
    canary = Canary()
    yield canary
    canary.server.stop()


@pytest.fixture
def foreign() -> Iterator[Canary]:
    canary = Canary()
    yield canary
    canary.server.stop()


@pytest.mark.parametrize("handler", ["acme.fetch", "acme.fetch_blocking"])
def test_only_listed_origins_see_the_token(site, listed, foreign, handler):
    listed.target = f"{foreign.url}/"
    site.configure(issuer=f'api_origins = ["{listed.url}"]')
    site.add_orgs(application("org_acme"))
    urls = [f"{listed.url}/", f"{foreign.url}/", f"{listed.url}/away"]
    site.apply(definition("org_acme", "fetch", handler, params={"urls": urls}))
    site.start_worker()
    site.cli("definitions", "run", "org_acme", "fetch")

    run = site.wait_for_end(definition="fetch")

    assert (run["state"], run["result"]) == ("succeeded", [200, 200, 200])
    assert len(listed.headers) == 2
    for headers in listed.headers:
        assert headers["authorization"].startswith("Bearer ey")
        assert headers["idempotency-key"] == str(run["idempotency_key"])
    assert len(foreign.headers) == 2
    for headers in foreign.headers:
        assert "authorization" not in headers
        assert not any("ey" in value and "." in value for name, value in headers.items() if name != "host")
