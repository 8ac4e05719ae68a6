"""The console: pages for people, rendered on the server; they work without JavaScript."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, tzinfo

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from worker.clock import Clock
from worker.features.console.access import Access
from worker.features.console.callers import CallerDatabase
from worker.features.console.login import Login
from worker.features.console.pages.base import Pages, ZonePages
from worker.features.console.pages.bulk import BulkPages
from worker.features.console.pages.definition_edit import EditPages
from worker.features.console.pages.definitions import DefinitionPages
from worker.features.console.pages.docs import docs_routes
from worker.features.console.pages.inventory import InventoryPages
from worker.features.console.pages.login import LoginPages
from worker.features.console.pages.morning import EndedByHour, MorningPage
from worker.features.console.pages.orgs import OrgPages
from worker.features.console.pages.plans import PlanPages
from worker.features.console.pages.rendering import error_page, static_routes
from worker.features.console.pages.rollouts import RolloutPages
from worker.features.console.pages.runs import RunPages
from worker.features.console.pages.search import FailurePages, SearchPages
from worker.features.console.pages.usage import UsagePages
from worker.features.console.sessions import Forms, Sessions, in_api
from worker.kit.web.responses import Candidates


class Console:
    """All pages, and the page of an error."""

    def __init__(
        self,
        database: CallerDatabase,
        clock: Clock,
        access: Access,
        sessions: Sessions,
        forms: Forms,
        *,
        login: Login | None = None,
        installation: str = "",
        org_usage: bool = False,
    ) -> None:
        self._pages = Pages(database, clock, access, sessions, forms)
        self._installation = installation
        self._org_usage = org_usage
        self._login = LoginPages(self._pages, login)
        self._hours = EndedByHour()
        self._search = SearchPages(self._pages, self._hours)

    def routes(self) -> Sequence[Route]:
        return (
            *static_routes(),
            *docs_routes(),
            *MorningPage(self._pages, self._installation, self._hours).routes(),
            *OrgPages(self._pages).routes(),
            *RunPages(self._pages).routes(),
            *DefinitionPages(self._pages).routes(),
            *self._search.routes(),
            *BulkPages(self._pages, self._search).routes(),
            *FailurePages(self._pages).routes(),
            *InventoryPages(self._pages).routes(),
            *UsagePages(self._pages, self._org_usage).routes(),
            *RolloutPages(self._pages).routes(),
            *EditPages(self._pages).routes(),
            *PlanPages(self._pages).routes(),
            *ZonePages(self._pages).routes(),
            *self._login.routes(),
        )

    def zone(self, request: Request) -> tzinfo:
        """The viewer's time zone."""
        return self._pages.zone(request) or UTC

    def error_page(
        self, scope: Scope, status: int, message: str, fix: str, candidates: Candidates = ()
    ) -> Response | None:
        """An error page, or the login page for 401; None if a program sent the request."""
        if in_api(scope):
            return None
        if status == 401:
            return self._login.page(scope, message)
        return error_page(scope, self._pages.frame(scope), status, message, fix, candidates)
