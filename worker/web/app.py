"""The application: which address answers what, and who may ask."""

from __future__ import annotations

from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from worker.clock import Clock
from worker.errors import Busy
from worker.store.database import Database
from worker.web.access import Access
from worker.web.acting import Acting
from worker.web.api import Api
from worker.web.auth_middleware import AuthMiddleware, Sessions
from worker.web.dashboard import Dashboard
from worker.web.forms import Forms
from worker.web.health import PATHS, Health
from worker.web.responses import ErrorMiddleware

# Requests at once, of API and dashboard; fewer than the connections of a listener.
MOST_REQUESTS = 500


class _Limit:
    """ASGI middleware: answers 503 beyond MOST_REQUESTS, but never to who asks for health.

    Metrics that name orgs are counted too: whose token it is may take a while to say.
    """

    def __init__(self, app: ASGIApp, health: Health) -> None:
        self._app = app
        self._exempt = PATHS - {"/metrics"} if health.metrics.name_orgs else PATHS
        self._serving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in self._exempt:
            await self._app(scope, receive, send)
            return
        if self._serving >= MOST_REQUESTS:
            raise Busy(f"{MOST_REQUESTS} requests are being served", fix="try again in a moment")
        self._serving += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._serving -= 1


def build(
    health: Health,
    database: Database,
    access: Access,
    clock: Clock,
    *,
    public_url: str = "",
    with_health: bool = True,
) -> ASGIApp:
    """Everything that is served on the worker's HTTP port; browsers reach it at `public_url`.

    Without `with_health` health has a listener of its own.
    """
    health.protect(access)
    sessions, forms = Sessions(clock), Forms(public_url, access.addresses)
    acting = Acting(database)
    api = Api(acting, clock)
    dashboard = Dashboard(acting, clock, api, access, sessions, forms)
    routes = [*(health.routes() if with_health else ()), *api.routes(), *dashboard.routes()]
    router = Router(routes=routes, redirect_slashes=False)
    return ErrorMiddleware(
        _Limit(AuthMiddleware(router, access, sessions, forms), health), dashboard.error_page
    )


def build_health(health: Health) -> ASGIApp:
    """Health and metrics alone, for a listener of their own; every other path is 404."""
    return ErrorMiddleware(_Limit(Router(routes=health.routes(), redirect_slashes=False), health))
