"""Failed and refused runs by cause."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from worker.errors import AccessDenied, UsageError
from worker.operations.matters import listed
from worker.store.lists import failures
from worker.store.lists.failures import cause_text
from worker.store.lists.morning import Named
from worker.web.pages.base import PageGroup, caller_of, query
from worker.web.pages.links import search_path

STATES = ("failed", "refused")
# How far back the page looks, and the words for it.
DAY = timedelta(days=1)
SPANS = {"1h": timedelta(hours=1), "1d": DAY, "7d": 7 * DAY, "30d": 30 * DAY}


class FailurePages(PageGroup):
    def routes(self) -> Sequence[Route]:
        return (Route("/failures", self._failures),)

    async def _failures(self, request: Request) -> Response:
        if caller_of(request).org is not None:
            raise AccessDenied("failures over all orgs are for operators", fix="open the page of your org")
        given = query(request, "state", "since")
        state, since = given.get("state", "failed"), given.get("since", "1d")
        if state not in STATES:
            raise UsageError(f"{state!r} is not a state of a failure", fix=f"one of {', '.join(STATES)}")
        if since not in SPANS:
            raise UsageError(f"{since!r} is not a span of this page", fix=f"one of {', '.join(SPANS)}")
        start = self._pages.clock.now() - SPANS[since]

        def work(connection: Connection) -> dict[str, Any]:
            causes, more = failures.by_cause_for_all_orgs(connection, state, start)
            return {
                "causes": [
                    {
                        **cause,
                        "text": cause_text(cause),
                        "href": search_path(cause_text(cause)),
                        "open_in": listed(Named(cause["open_orgs"], cause["named"])),
                    }
                    for cause in causes
                ],
                "more": more,
                "most": failures.MAX_RUNS,
                "state": state,
                "since": since,
                "states": STATES,
                "spans": list(SPANS),
            }

        return await self._pages.show(request, "failures.html", work)
