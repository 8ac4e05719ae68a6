"""Retrying many runs: the first one as a canary, then the rest, a page of runs at a time.

The page keeps no state: what was retried, and how the retries go, is read from the runs each time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlencode

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from worker.errors import Conflict, DefinitionError, UsageError
from worker.search import Query
from worker.store import orgs
from worker.store.lists import Page, Run, runs, search
from worker.web.pages.base import Pages, caller_of, query
from worker.web.pages.morning import search_path
from worker.web.pages.search import SearchPages

# Runs of one page, which one form retries at most: half a second.
MOST = 100
# Runs can be retried in these states. Without `state:`, the failed and refused ones are meant.
STATES = frozenset({"failed", "refused", "cancelled"})


class BulkPages:
    def __init__(self, pages: Pages, search_pages: SearchPages) -> None:
        self._pages = pages
        self._search = search_pages

    def routes(self) -> Sequence[Route]:
        return (
            Route("/retry", self._show),
            Route("/retry", self._retry, methods=["POST"]),
        )

    async def _show(self, request: Request) -> Response:
        return await self._page(request, query(request, "q", "after"), [])

    async def _page(self, request: Request, given: Mapping[str, str], left: Sequence[str]) -> Response:
        """The runs of a search without a retry, the retries of the others, and why runs were `left`."""
        caller, after = caller_of(request), given.get("after") or None
        text, wanted = self._wanted(request, given)

        def work(connection: Connection) -> dict[str, Any]:
            found = search.page_of(connection, caller.scope(), wanted, Page(limit=MOST, after=after))
            made = [row["retried_as"] for row in found.runs if row["retried_as"]]
            scope = orgs.scope_of(connection, caller.scope())
            retries = runs.rows_of(connection, scope, made) if made else []
            following = None if found.next is None else f"?{urlencode({'q': text, 'after': found.next})}"
            states = Counter(row["state"] for row in retries)
            return {
                "searched": text,
                "after": after or "",
                "open": [caller.sees(Run, row) for row in found.runs if not row["retried_as"]],
                "retries": [caller.sees(Run, row) for row in retries],
                "states": states,
                "is_moving": bool(states["waiting"] or states["running"]),
                "next": following,
                "left": list(dict.fromkeys(left)),
                "back": search_path(text),
            }

        return await self._pages.show(request, "retry.html", work)

    async def _retry(self, request: Request) -> Response:
        _, form = await self._pages.checked_form(request)
        caller = caller_of(request)
        caller.require_may("retry")
        text, wanted = self._wanted(request, form)
        after, reason = form.get("after") or None, form.get("reason", "").strip()
        if not reason:
            raise UsageError("the reason is missing", fix="say why, in a few words: it goes to the audit")
        count = 1 if form.get("only") == "first" else MOST

        def work(connection: Connection) -> list[Run]:
            return search.page_of(connection, caller.scope(), wanted, Page(limit=MOST, after=after)).runs

        found = await self._pages.database.read(caller, work)
        left: list[str] = []
        for row in [row for row in found if not row["retried_as"]][:count]:
            try:
                await self._pages.database.retry(caller, row["id"], reason=reason)
            except (Conflict, DefinitionError) as error:
                left.append(f"{row['org']}/{row['definition']}: {error.message}")
        if left:
            return await self._page(request, form, left)
        again = {"q": text} | ({"after": after} if after else {})
        return RedirectResponse(f"/retry?{urlencode(again)}", 303)

    def _wanted(self, request: Request, given: Mapping[str, str]) -> tuple[str, Query]:
        """The text and its query, which only finds runs that can be retried."""
        text = given.get("q", "").strip()
        if not text:
            raise UsageError("the search is missing", fix="search for runs first, then retry them")
        wanted = self._search.query_of(request, text)
        states = wanted.states or frozenset({"failed", "refused"})
        if not states <= STATES:
            raise UsageError(
                f"runs that are {', '.join(sorted(states - STATES))} cannot be retried",
                fix=f"search for state:{','.join(sorted(STATES))}",
            )
        return text, replace(wanted, states=states)
