"""The search over orgs and runs, with the grammar of the command line; failed and refused runs by cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, timedelta
from typing import Any, Literal

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from worker.errors import AccessDenied, UsageError
from worker.features.console.callers import Caller, caller_of
from worker.features.console.live_lists import RUNS, stream_from_now
from worker.features.console.pages.base import ROWS, PageGroup, next_page, query
from worker.features.console.pages.links import search_path
from worker.features.console.pages.rendering import page
from worker.ids import ALL_ORGS, RunId, given_id
from worker.model.search import KEYS, Query, parsed
from worker.store.lists import Page, failures, search
from worker.store.lists.failures import cause_text
from worker.store.lists.rows import OrgRow, Run
from worker.store.lists.run_ids import fitting
from worker.store.lists.search import suggestions
from worker.store.orgs import scope_of

# Orgs that the page shows above the runs.
MAX_ORGS = 8
# What can be done to all runs of a search, and the states that they must be in.
CHANGEABLE: Mapping[Literal["retry", "cancel"], frozenset[str]] = {
    "retry": frozenset({"failed", "refused", "cancelled"}),
    "cancel": frozenset({"waiting", "running"}),
}


class SearchPages(PageGroup):
    def routes(self) -> Sequence[Route]:
        return (Route("/search", self._search),)

    async def _search(self, request: Request) -> Response:
        caller, given = caller_of(request), query(request, "q", "after")
        text = given.get("q", "").strip()
        frame = {**self._pages.frame(request.scope), "searched": text, "keys": KEYS}
        try:
            wanted = self.query_of(request, text)
        except UsageError as error:
            return page("search.html", 400, **frame, error=error)

        def work(connection: Connection) -> Response:
            try:
                if (run_id := _only_run(connection, caller, text)) is not None:
                    return RedirectResponse(f"/runs/{run_id}", 303)
                if "after" not in given:
                    frame["stream"] = stream_from_now(connection, RUNS, q=text)
                found = _found(connection, caller, wanted, given)
            except UsageError as error:
                return page("search.html", 400, **frame, error=error)
            return page("search.html", **frame, **found, error=None)

        return await self._pages.database.read(caller, work)

    def query_of(self, request: Request, text: str) -> Query:
        """The query of a text, its days in the viewer's time zone; raises UsageError."""
        return parsed(text, now=self._pages.clock.now(), zone=self._pages.zone(request) or UTC)


def _found(connection: Connection, caller: Caller, wanted: Query, given: dict[str, str]) -> dict[str, Any]:
    """The orgs and runs of a query; near words if there are none."""
    scope, after = caller.scope(), given.get("after")
    has_words = bool(wanted.words or wanted.org)
    has_names = has_words or bool(wanted.definition or wanted.handler)
    orgs = search.orgs_of(connection, scope, wanted, Page(limit=MAX_ORGS)) if has_words and not after else []
    found = search.runs_of(connection, scope, wanted, Page(limit=ROWS, after=after))
    near = suggestions(connection, scope, wanted) if has_names and not (orgs or found.rows) else []
    text = given.get("q", "")
    following = [] if found.next is None else [{"id": found.next}]
    return {
        "orgs": [caller.sees(OrgRow, row) for row in orgs],
        "runs": [caller.sees(Run, row) for row in found.rows],
        # The search may have stopped before the page was full.
        "next": next_page("/search", given, following, limit=1),
        "near": [
            (each.what, [(word, search_path(text.replace(each.word, word, 1))) for word in each.near])
            for each in near
        ],
        "changes": [
            action
            for action, states in CHANGEABLE.items()
            if wanted.states and wanted.states <= states and caller.may(action)
        ],
    }


def _only_run(connection: Connection, caller: Caller, text: str) -> RunId | None:
    """The run, if the whole text is an id that fits one that the caller sees."""
    if (known := given_id(text)) is None:
        return None
    found = fitting(connection, scope_of(connection, caller.scope()), known, 2)
    return found[0] if len(found) == 1 else None


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
            causes, more = failures.by_cause(connection, ALL_ORGS, state, start)
            return {
                "causes": [
                    {
                        **cause,
                        "text": cause_text(cause),
                        "href": search_path(cause_text(cause)),
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
