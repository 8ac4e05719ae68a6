"""The forms of the guard, each around a small application of its framework, called without a server."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any
from wsgiref.util import setup_testing_defaults

import django
import httpx
from django.conf import settings
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpRequest, JsonResponse
from django.test import override_settings
from django.urls import path as django_path
from django.urls import resolve
from fastapi import Depends, FastAPI
from flask import Flask, g
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from worker.guard import Claims, Guard, RequireToken, wsgi
from worker.guard import django as django_form
from worker.guard import fastapi as fastapi_form
from worker.guard import flask as flask_form

# Both are compared with the token's.
PATH = "/orgs/{org}/clients/{client}"
SCOPE = "read:kb"
reached: list[Claims] = []


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def challenge(self) -> str:
        return self.headers.get("www-authenticate", "")


# Takes a path and the values of the Authorization headers.
Form = Callable[[str, Sequence[bytes]], Awaitable[Answer]]


def shown(claims: Claims) -> dict[str, str]:
    reached.append(claims)
    return {"org": claims.org_code, "client": claims.client_id}


def part(path: str, number: int) -> str:
    return path.split("/")[number]


def by_asgi(app: Any) -> Form:
    async def call(path: str, authorization: Sequence[bytes]) -> Answer:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
            answer = await client.get(path, headers=[(b"authorization", each) for each in authorization])
        return Answer(answer.status_code, dict(answer.headers), answer.content)

    return call


async def open_websocket(app: Any) -> list[dict[str, Any]]:
    """What an ASGI application sends to a WebSocket without a token."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app({"type": "websocket", "path": "/", "headers": [], "query_string": b""}, receive, send)
    return sent


def by_wsgi(app: Any) -> Form:
    async def call(path: str, authorization: Sequence[bytes]) -> Answer:
        started: list[Any] = []
        environ: dict[str, Any] = {"PATH_INFO": path, "REQUEST_METHOD": "GET"}
        setup_testing_defaults(environ)
        if authorization:
            # As servers do with headers of one name.
            environ["HTTP_AUTHORIZATION"] = ",".join(each.decode("latin-1") for each in authorization)
        body = b"".join(app(environ, lambda *given: started.append(given)))
        headers = {name.lower(): value for name, value in started[0][1]}
        return Answer(int(started[0][0][:3]), headers, body)

    return call


def asgi(guard: Guard) -> Form:
    async def whoami(request: Request) -> JSONResponse:
        assert request.scope["claims"] is request.state.claims
        return JSONResponse(shown(request.state.claims))

    return by_asgi(
        RequireToken(
            Starlette(routes=[Route(PATH, whoami)]),
            guard,
            scopes={SCOPE},
            org_of=lambda scope: part(scope["path"], 2),
            client_of=lambda scope: part(scope["path"], 4),
        )
    )


def plain_wsgi(guard: Guard) -> Form:
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        body = json.dumps(shown(environ["orgworker.claims"])).encode()
        start_response("200 OK", [("Content-Type", "application/json")])
        return [body]

    return by_wsgi(
        wsgi.RequireToken(
            app,
            guard,
            scopes={SCOPE},
            org_of=lambda environ: part(environ["PATH_INFO"], 2),
            client_of=lambda environ: part(environ["PATH_INFO"], 4),
        )
    )


def flask(guard: Guard) -> Form:
    app = Flask("product")

    @app.get("/orgs/<org>/clients/<client>")
    @flask_form.require_token(
        guard,
        scopes={SCOPE},
        org_of=lambda request: request.view_args["org"],
        client_of=lambda request: request.view_args["client"],
    )
    def whoami(org: str, client: str) -> dict[str, str]:
        return shown(g.claims)

    return by_wsgi(app)


def fastapi(guard: Guard) -> Form:
    app = FastAPI()
    require = fastapi_form.require_token(
        guard,
        scopes={SCOPE},
        org_of=lambda request: request.path_params["org"],
        client_of=lambda request: request.path_params["client"],
    )

    def whoami(org: str, client: str, claims: Any) -> dict[str, str]:
        return shown(claims)

    # FastAPI reads the annotations, which are no text here.
    whoami.__annotations__ = {"org": str, "client": str, "claims": Annotated[Claims, Depends(require)]}
    app.get(PATH)(whoami)
    return by_asgi(app)


def django_org(request: HttpRequest) -> str:
    return str(resolve(request.path_info).kwargs["org"])


def django_client(request: HttpRequest) -> str:
    return str(resolve(request.path_info).kwargs["client"])


def django_settings(**changes: Any) -> AbstractContextManager[Any]:
    """Django with these settings; the first call configures it for the process."""
    if not settings.configured:
        settings.configure(ALLOWED_HOSTS=["*"], MIDDLEWARE=[])
        django.setup()
    return override_settings(**changes)


def django_view(request: HttpRequest, org: str, client: str) -> JsonResponse:
    return JsonResponse(shown(request.claims))  # type: ignore[attr-defined]


async def django_async_view(request: HttpRequest, org: str, client: str) -> JsonResponse:
    return django_view(request, org, client)


def in_django(
    view: Any,
    handler: Any,
    by: Callable[[Any], Form],
    route: str = "orgs/<org>/clients/<client>",
    **changes: Any,
) -> Form:
    """A handler of Django made, and called, with these settings."""

    class Urls:
        urlpatterns = [django_path(route, view)]  # noqa: RUF012

    changes |= {"ROOT_URLCONF": Urls}
    with django_settings(**changes):
        form = by(handler())

    async def call(path: str, authorization: Sequence[bytes]) -> Answer:
        with django_settings(**changes):
            return await form(path, authorization)

    return call


def django_middleware(view: Any, handler: Any, by: Callable[[Any], Form]) -> Callable[[Guard], Form]:
    def form(guard: Guard) -> Form:
        setting = {
            "guard": guard,
            "scopes": [SCOPE],
            "org_of": "tests.fakes.forms.django_org",
            "client_of": django_client,
        }
        middleware = ["worker.guard.django.RequireTokenMiddleware"]
        return in_django(view, handler, by, MIDDLEWARE=middleware, ORGWORKER_GUARD=setting)

    return form


def django_decorator(view: Any, handler: Any, by: Callable[[Any], Form]) -> Callable[[Guard], Form]:
    def form(guard: Guard) -> Form:
        guarded = django_form.require_token(
            guard,
            scopes={SCOPE},
            org_of=lambda request: request.resolver_match.kwargs["org"],
            client_of=lambda request: request.resolver_match.kwargs["client"],
        )
        return in_django(guarded(view), handler, by, MIDDLEWARE=[])

    return form


FORMS: dict[str, Callable[[Guard], Form]] = {
    "asgi": asgi,
    "wsgi": plain_wsgi,
    "flask": flask,
    "fastapi": fastapi,
    "django middleware": django_middleware(django_view, WSGIHandler, by_wsgi),
    "django middleware, async": django_middleware(django_async_view, ASGIHandler, by_asgi),
    "django decorator": django_decorator(django_view, WSGIHandler, by_wsgi),
    "django decorator, async": django_decorator(django_async_view, ASGIHandler, by_asgi),
}
# Servers and Django give these one value for all headers of a name.
JOINED = frozenset(FORMS) - {"asgi", "fastapi"}
