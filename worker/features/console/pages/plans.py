"""The page of a plan: what the change would do, and the button with which the operator makes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from worker.features.console.callers import PLANNED, caller_of
from worker.features.console.pages.base import PageGroup, allowed, query
from worker.features.console.pages.links import definition_path
from worker.kit.output import printable


class PlanPages(PageGroup):
    def routes(self) -> Sequence[Route]:
        return (Route("/plans/{plan}", self._show), Route("/plans/{plan}", self._confirm, methods=["POST"]))

    async def _show(self, request: Request) -> Response:
        query(request)
        plan = await self._pages.database.find_plan(
            caller_of(request), request.path_params["plan"], at=self._pages.clock.now()
        )
        may = PLANNED[plan["change"]] in allowed(request)
        values = {"plan": plan, "title": plan["change"].replace("_", " a ").capitalize(), "may_confirm": may}
        values |= {part: _listed(plan["shown"][part]) for part in ("before", "after")}
        values["arguments"] = _listed(plan["arguments"])
        return await self._pages.show(request, "plan.html", lambda connection: values)

    async def _confirm(self, request: Request) -> Response:
        # Only a form of a page of ours: a session, its CSRF token, and an Origin that is this console's.
        await self._pages.checked_form(request)
        done = await self._pages.database.confirm(
            caller_of(request), request.path_params["plan"], at=self._pages.clock.now()
        )
        if done.change == "pause_definition":
            return RedirectResponse(definition_path(done.row["org"], done.row["name"]), 303)
        run = done.row["id"] if done.change == "retry_run" else done.arguments["run"]
        return RedirectResponse(f"/runs/{run}", 303)


def _listed(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values as text, other values as JSON; without what a reader would not see as it is."""
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in row.items()
        if value is not None
    }
    return [(name.replace("_", " "), printable(text)) for name, text in texts.items()]
