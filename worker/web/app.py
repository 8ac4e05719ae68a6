"""The application: which address answers what, and who may ask."""

from __future__ import annotations

from starlette.routing import Router
from starlette.types import ASGIApp

from worker.web.answers import Answering
from worker.web.health import Health


def build(health: Health) -> ASGIApp:
    """Everything that is served on the worker's HTTP port."""
    router = Router(routes=health.routes())
    return Answering(router, lambda scope, status, message, fix: None)
