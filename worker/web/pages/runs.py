"""The page of a run, and its changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from worker.ids import RunId
from worker.store.lists import LogLine, Run, RunDetail, runs
from worker.web.pages.base import Pages, caller_of, query

LINES = 500


class RunPages:
    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def routes(self) -> Sequence[Route]:
        return (
            Route("/runs/{run}", self._run),
            Route("/runs/{run}/cancel", self._cancel, methods=["POST"]),
            Route("/runs/{run}/retry", self._retry, methods=["POST"]),
        )

    async def _run(self, request: Request) -> Response:
        caller, run_id = caller_of(request), request.path_params["run"]
        query(request)

        def work(connection: Connection) -> dict[str, Any]:
            run = caller.sees(RunDetail, runs.run(connection, caller.scope(), run_id))
            lines = runs.lines(connection, caller.scope(), RunId(run["id"]), limit=LINES)
            return {"run": run, "lines": [caller.sees(LogLine, line) for line in lines]}

        return await self._pages.show(request, "run.html", work)

    async def _cancel(self, request: Request) -> Response:
        await self._pages.checked_form(request)
        run = await self._pages.database.cancel(caller_of(request), request.path_params["run"])
        return to_run(run)

    async def _retry(self, request: Request) -> Response:
        await self._pages.checked_form(request)
        run = await self._pages.database.retry(caller_of(request), request.path_params["run"])
        return to_run(run)


def to_run(row: Run) -> Response:
    """Redirect to the page of a run."""
    return RedirectResponse(f"/runs/{row['id']}", 303)
