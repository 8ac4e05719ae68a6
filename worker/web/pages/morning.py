"""The front page of operators."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from worker.ids import ALL_ORGS
from worker.store.lists import ORGS, RUNS, Page, Run
from worker.store.lists.read import read
from worker.web.pages.base import ROWS, Pages, caller_of, query

RECENT = timedelta(days=1)


class MorningPage:
    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def routes(self) -> Sequence[Route]:
        return (Route("/", self._overview),)

    async def _overview(self, request: Request) -> Response:
        caller = caller_of(request)
        if caller.org is not None:
            return RedirectResponse(f"/orgs/{quote(caller.org, safe='')}", 303)
        after = query(request, "after").get("after")
        since = self._pages.clock.now() - RECENT

        def work(connection: Connection) -> dict[str, Any]:
            def latest(state: str, since: datetime | None) -> list[Run]:
                return read(connection, RUNS, ALL_ORGS, Page(state=state, since=since, limit=ROWS))

            orgs = read(connection, ORGS, ALL_ORGS, Page(limit=ROWS, after=after))
            recent = {state: latest(state, since) for state in ("failed", "refused")}
            following = orgs[-1]["id"] if len(orgs) == ROWS else None
            return {"orgs": orgs, "next": following, **recent, "running": latest("running", None)}

        return await self._pages.show(request, "overview.html", work)
