"""The application: which address answers what, and who may ask."""

from __future__ import annotations

from starlette.routing import Router
from starlette.types import ASGIApp

from worker.clock import Clock
from worker.store.database import Database
from worker.web.access import Access
from worker.web.acting import Acting
from worker.web.answers import Answering
from worker.web.api import Api
from worker.web.dashboard import Dashboard
from worker.web.forms import Forms
from worker.web.gate import Gate
from worker.web.health import Health
from worker.web.sessions import Sessions


def build(
    health: Health, database: Database, access: Access, clock: Clock, *, public_url: str = ""
) -> ASGIApp:
    """Everything that is served on the worker's HTTP port; browsers reach it at `public_url`."""
    health.protect(access)
    sessions, forms = Sessions(clock), Forms(public_url, access.addresses)
    acting = Acting(database)
    api = Api(acting, clock)
    dashboard = Dashboard(acting, clock, api, access, sessions, forms)
    router = Router(routes=[*health.routes(), *api.routes(), *dashboard.routes()], redirect_slashes=False)
    return Answering(Gate(router, access, sessions, forms), dashboard.error_page)
