"""The page of a definition, and its changes."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from worker.web.pages.base import Pages, caller_of


class DefinitionPages:
    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def routes(self) -> Sequence[Route]:
        return (Route("/orgs/{org}/definitions/{name}/run", self._run_now, methods=["POST"]),)

    async def _run_now(self, request: Request) -> Response:
        await self._pages.checked_form(request)
        org, name = request.path_params["org"], request.path_params["name"]
        run = await self._pages.database.run_now(caller_of(request), org, name)
        return RedirectResponse(f"/runs/{run['id']}", 303)
