"""The pages of orgs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from worker.store.lists import DEFINITIONS, RUNS, Definition, OrgDetail, Page, Run
from worker.store.lists.read import org, read
from worker.web.pages.base import ROWS, Pages, caller_of, query


class OrgPages:
    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def routes(self) -> Sequence[Route]:
        return (Route("/orgs/{org}", self._org),)

    async def _org(self, request: Request) -> Response:
        caller, code = caller_of(request), request.path_params["org"]
        scope, after = caller.scope(code), query(request, "after").get("after")

        def work(connection: Connection) -> dict[str, Any]:
            runs = read(connection, RUNS, scope, Page(limit=ROWS, after=after))
            definitions = read(connection, DEFINITIONS, scope)
            return {
                "org": caller.sees(OrgDetail, org(connection, code)),
                "definitions": [caller.sees(Definition, row) for row in definitions],
                "runs": [caller.sees(Run, row) for row in runs],
                "next": runs[-1]["id"] if len(runs) == ROWS else None,
            }

        return await self._pages.show(request, "org.html", work)
