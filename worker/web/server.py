"""The HTTP applications of a worker and of `provision`."""

from __future__ import annotations

from pathlib import Path

from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from worker.clock import Clock
from worker.operations.definitions import edit_definition
from worker.store.database import Database
from worker.web.access import Access
from worker.web.api import Api
from worker.web.callers import CallerDatabase, EditDefinition, OpenRing, no_ring
from worker.web.compression import Compression
from worker.web.health import Health
from worker.web.hooks import Hooks
from worker.web.listener import RequestLimit
from worker.web.live import Live
from worker.web.login import Login
from worker.web.pages import Console
from worker.web.responses import ErrorMiddleware
from worker.web.sessions import AuthMiddleware, Forms, Sessions


class _LogoutAtProvider:
    """ASGI middleware: lets the pages' forms lead to the provider, where people are logged out."""

    def __init__(self, app: ASGIApp, origin: str) -> None:
        self._app = app
        self._widened = f"form-action 'self' {origin}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_widened(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    (name, value.replace(b"form-action 'self'", self._widened))
                    if name == b"content-security-policy"
                    else (name, value)
                    for name, value in message["headers"]
                ]
            await send(message)

        await self._app(scope, receive, send_widened)


def build(
    health: Health,
    database: Database,
    access: Access,
    clock: Clock,
    *,
    public_url: str = "",
    with_health: bool = True,
    login: Login | None = None,
    edit: EditDefinition = edit_definition,
    open_ring: OpenRing = no_ring,
    secrets_dir: Path | None = None,
    installation: str = "",
) -> ASGIApp:
    """The application; browsers reach it at `public_url`, and people log in by `login`.

    Without `with_health`, health has a listener of its own. The rest is what `CallerDatabase`
    needs for changes.
    """
    health.protect(access)
    sessions, forms = Sessions(database, clock), Forms(public_url, access.addresses)
    caller_database = CallerDatabase(database, edit=edit, open_ring=open_ring, secrets_dir=secrets_dir)
    live = Live(caller_database, clock, health.draining)
    console = Console(caller_database, clock, access, sessions, forms, login=login, installation=installation)
    routes = [
        *(health.routes() if with_health else ()),
        *Api(caller_database, clock, live.events, installation=installation).routes(),
        Route("/runs/{run}/live", live.events),
        *console.routes(),
    ]
    router = Router(routes=routes, redirect_slashes=False)
    limited = RequestLimit(AuthMiddleware(router, access, sessions, forms), health)
    app: ASGIApp = Compression(ErrorMiddleware(limited, console.error_page))
    return app if login is None else _LogoutAtProvider(app, login.origin)


def build_hooks(health: Health, hooks: Hooks) -> ASGIApp:
    """Webhooks of providers, /livez and /readyz; no metrics, since providers reach this listener."""
    probes = [route for route in health.routes() if route.path != "/metrics"]
    router = Router(routes=[*probes, *hooks.routes()], redirect_slashes=False)
    return ErrorMiddleware(RequestLimit(router, health))
