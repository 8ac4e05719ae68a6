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
from worker.web.dashboard import Dashboard, error_page
from worker.web.gate import Gate
from worker.web.health import Health
from worker.web.sessions import Sessions


def build(health: Health, database: Database, access: Access, clock: Clock) -> ASGIApp:
    """Everything that is served on the worker's HTTP port."""
    sessions = Sessions(clock)
    acting = Acting(database)
    api = Api(acting, clock)
    dashboard = Dashboard(acting, clock, api, access, sessions)
    router = Router(routes=[*health.routes(), *api.routes(), *dashboard.routes()], redirect_slashes=False)
    return Answering(Gate(router, access, sessions), error_page)
