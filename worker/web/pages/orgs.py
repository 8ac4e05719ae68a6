"""The list of orgs, and the page of one: its state, grid, next times, waits, credentials and claims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from worker.ids import ALL_ORGS
from worker.store import history, orgs
from worker.store.lists import DEFINITIONS, ORGS, RUNS, Definition, OrgDetail, Page, Run, RunDetail
from worker.store.lists.grid import grid
from worker.store.lists.read import org, read
from worker.web.pages.base import ROWS, Pages, caller_of, next_page, query

# Definitions in the grid, and next times and open waits beside it.
MOST_DEFINITIONS = 100
SHOWN = 10


class OrgPages:
    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def routes(self) -> Sequence[Route]:
        return (Route("/orgs", self._orgs), Route("/orgs/{org}", self._org))

    async def _orgs(self, request: Request) -> Response:
        caller = caller_of(request)
        given = query(request, "state", "after")

        def work(connection: Connection) -> dict[str, Any]:
            scope = ALL_ORGS if caller.org is None else caller.org
            page = Page(state=given.get("state"), after=given.get("after"), limit=ROWS)
            rows = read(connection, ORGS, scope, page)
            return {
                "orgs": [caller.sees(OrgDetail, row) for row in rows],
                "states": ORGS.states,
                "given": given,
                "next": next_page("/orgs", given, rows),
            }

        return await self._pages.show(request, "orgs.html", work)

    async def _org(self, request: Request) -> Response:
        caller, code = caller_of(request), request.path_params["org"]
        scope, after = caller.scope(code), query(request, "after").get("after")
        now = self._pages.clock.now()

        def work(connection: Connection) -> dict[str, Any]:
            org_id = orgs.require(connection, code)["id"]
            runs = read(connection, RUNS, scope, Page(limit=ROWS, after=after))
            waiting = read(connection, RUNS, scope, Page(state="waiting", limit=SHOWN))
            definitions = read(connection, DEFINITIONS, scope, Page(limit=MOST_DEFINITIONS))
            definitions.sort(key=lambda row: row["name"])
            due = [row for row in definitions if row["next_scheduled_for"] and row["state"] == "active"]
            due.sort(key=lambda row: row["next_scheduled_for"] or now)
            claims = caller.sees(RunDetail, {"claims": history.last_claims(connection, org_id)})["claims"]
            return {
                "org": caller.sees(OrgDetail, org(connection, code)),
                "definitions": [caller.sees(Definition, row) for row in definitions],
                "due": [caller.sees(Definition, row) for row in due[:SHOWN]],
                "runs": [caller.sees(Run, row) for row in runs],
                "waiting": [caller.sees(Run, row) for row in waiting],
                "grid": grid(connection, org_id, now),
                "claims": claims,
                "is_newest": after is None,
                "next": next_page("", {}, runs),
            }

        return await self._pages.show(request, "org.html", work)
