"""The list of orgs, and the page of one: its state, grid, next times, waits, credentials and claims."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from datetime import UTC
from typing import Any, Literal

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from worker.errors import Conflict, UsageError, WorkerError
from worker.features.console.callers import caller_of
from worker.features.console.live_lists import PREFIX
from worker.features.console.pages.base import ROWS, PageGroup, allowed, next_page, page_after, query, tabs_of
from worker.features.console.pages.forms import problem_of, reason_of
from worker.features.console.pages.links import day_path, org_path
from worker.ids import ALL_ORGS
from worker.model.claims import claims_in_words
from worker.model.search import parsed
from worker.store import history, orgs
from worker.store.lists import DEFINITIONS, ORGS, RUNS, Page, tabs
from worker.store.lists.grid import STATES, Broken, broken, grid, open_waits
from worker.store.lists.read import org, page_of, read
from worker.store.lists.rows import DefinitionRow, OrgDetail, Run, RunDetail

# Definitions in the grid, and next times and open waits beside it.
MAX_DEFINITIONS = 40
SHOWN = 10


# Parameters of the list that are `true` or absent.
_FLAGS = ("broken", "late")
# The parameters of each tab of the list.
_TABS: Mapping[str, Mapping[str, str]] = {
    "all": {},
    "broken": {"broken": "true"},
    "late": {"late": "true"},
    **{state: {"state": state} for state in ORGS.states},
}


class OrgPages(PageGroup):
    def routes(self) -> Sequence[Route]:
        return (
            Route("/orgs", self._orgs),
            Route("/orgs/{org}", self._org),
            Route("/orgs/{org}/pause", functools.partial(self._move, "pause"), methods=["POST"]),
            Route("/orgs/{org}/resume", functools.partial(self._move, "resume"), methods=["POST"]),
        )

    async def _orgs(self, request: Request) -> Response:
        caller = caller_of(request)
        given = query(request, "q", "state", *_FLAGS, "after")
        for flag in _FLAGS:
            if given.get(flag, "true") != "true":
                problem = f"{given[flag]!r} is not a value of {flag}"
                raise UsageError(problem, fix=f"use {flag}=true, or leave it out")
        zone = self._pages.zone(request) or UTC
        words = parsed(given["q"], now=self._pages.clock.now(), zone=zone) if "q" in given else None
        if words is not None and words.is_of_runs:
            raise UsageError("orgs are found by words and org:", fix="use the search above for runs")

        def work(connection: Connection) -> dict[str, Any]:
            scope = ALL_ORGS if caller.org is None else caller.org
            page = Page(
                state=given.get("state"),
                after=given.get("after"),
                limit=ROWS,
                query=words,
                broken="broken" in given,
                late="late" in given,
            )
            found = page_of(connection, ORGS, scope, page)
            counted = {} if words else tabs.orgs(connection, orgs.scope_of(connection, scope), ORGS.states)
            return {
                "orgs": [caller.sees(OrgDetail, row) for row in found.rows],
                "tabs": tabs_of("/orgs", given, _TABS, counted),
                "given": dict.fromkeys(("q", "state", *_FLAGS), "") | given,
                "next": page_after("/orgs", given, found.next),
            }

        return await self._pages.show(request, "orgs.html", work)

    async def _move(self, verb: Literal["pause", "resume"], request: Request) -> Response:
        _, form = await self._pages.checked_form(request)
        code, database = request.path_params["org"], self._pages.database
        move = database.pause_org if verb == "pause" else database.resume_org
        try:
            await move(caller_of(request), code, note=reason_of(form, "note"))
        except Conflict as error:
            return await self._page(request, problem=error)
        return RedirectResponse(org_path(code), 303)

    async def _org(self, request: Request) -> Response:
        return await self._page(request, query(request, "after").get("after"))

    async def _page(
        self, request: Request, after: str | None = None, problem: WorkerError | None = None
    ) -> Response:
        """The page; after a change that was refused, with its problem."""
        caller, code = caller_of(request), request.path_params["org"]
        scope = caller.scope(code)
        now = self._pages.clock.now()

        def work(connection: Connection) -> dict[str, Any]:
            org_id = orgs.require(connection, code)["id"]
            runs = read(connection, RUNS, scope, Page(limit=ROWS, after=after))
            waiting = open_waits(connection, org_id, limit=SHOWN)
            definitions = read(connection, DEFINITIONS, scope, Page(limit=MAX_DEFINITIONS))
            definitions.sort(key=lambda row: row["name"])
            due = [row for row in definitions if row["next_scheduled_for"] and row["state"] == "active"]
            due.sort(key=lambda row: row["next_scheduled_for"] or now)
            claims = caller.sees(RunDetail, {"claims": history.last_claims(connection, org_id)})["claims"]
            faults = broken(connection, code, Page(limit=SHOWN))
            return {
                "org": caller.sees(OrgDetail, org(connection, code)),
                "may": allowed(request),
                **problem_of(problem),
                "has_more": len(definitions) == MAX_DEFINITIONS,
                "definitions": [caller.sees(DefinitionRow, row) for row in definitions],
                "due": [caller.sees(DefinitionRow, row) for row in due[:SHOWN]],
                "runs": [caller.sees(Run, row) for row in runs],
                "waiting": [caller.sees(Run, row) for row in waiting],
                "broken": [caller.sees(Broken, row) for row in faults],
                "grid": grid(connection, org_id, now),
                "day_states": tuple(STATES.items()),
                "day_path": functools.partial(day_path, code),
                "claims": claims_in_words(claims),
                "is_newest": after is None,
                "next": next_page("", {}, runs),
            }

        stream = None if after else f"{PREFIX}{org_path(code)}"
        return await self._pages.show(request, "org.html", work, stream=stream)
