"""Rollouts: both sides' curves, the numbers of the verdict, the orgs that moved, and what people do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from markupsafe import Markup
from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from worker.errors import AccessDenied, Conflict, UsageError, WorkerError
from worker.features.console.callers import caller_of
from worker.features.console.charts import ChartSeries, curves
from worker.features.console.pages.base import ROWS, PageGroup, allowed, next_page, query
from worker.features.console.pages.forms import problem_of, reason_of
from worker.ids import ALL_ORGS
from worker.store.lists import ROLLOUTS, Page
from worker.store.lists import read as lists
from worker.store.lists.rollouts import rollout

# What each verb does, by the states in which it is offered.
VERBS: Mapping[str, tuple[str, ...]] = {
    "advance": ("planned", "running"),
    "halt": ("running",),
    "resume": ("halted",),
    "finish": ("running",),
    "undo": ("planned", "running", "halted", "finished"),
}


class RolloutPages(PageGroup):
    def routes(self) -> Sequence[Route]:
        return (
            Route("/rollouts", self._list),
            Route("/rollouts/{rollout}", self._show),
            Route("/rollouts/{rollout}/{verb}", self._move, methods=["POST"]),
        )

    async def _list(self, request: Request) -> Response:
        self._for_operators(request)
        given = query(request, "after")

        def work(connection: Connection) -> dict[str, Any]:
            rows = lists.read(connection, ROLLOUTS, ALL_ORGS, Page(limit=ROWS, after=given.get("after")))
            return {"rows": rows, "next": next_page("/rollouts", given, rows)}

        return await self._pages.show(request, "rollouts.html", work)

    async def _show(self, request: Request) -> Response:
        query(request)
        return await self._page(request)

    async def _page(self, request: Request, problem: WorkerError | None = None) -> Response:
        self._for_operators(request)
        name = request.path_params["rollout"]

        def work(connection: Connection) -> dict[str, Any]:
            row = rollout(connection, name)
            verbs = [verb for verb, states in VERBS.items() if row["state"] in states]
            if row["step"] >= len(row["steps"]):
                verbs = [verb for verb in verbs if verb != "advance"]
            return {
                "row": row,
                "charts": [_chart(metric, row["days"]) for metric in row["watch"]],
                "verbs": verbs if "rollout" in allowed(request) else [],
                "next_step": row["steps"][row["step"]] if row["step"] < len(row["steps"]) else None,
                **problem_of(problem),
            }

        return await self._pages.show(request, "rollout.html", work)

    async def _move(self, request: Request) -> Response:
        _, form = await self._pages.checked_form(request)
        caller, verb, name = caller_of(request), request.path_params["verb"], request.path_params["rollout"]
        try:
            if verb == "advance":
                anyway = form.get("anyway") == "yes"
                await self._pages.database.advance_rollout(
                    caller, name, reason=reason_of(form), anyway=anyway
                )
            elif verb in VERBS:
                reason = reason_of(form)
                caller.require_may("rollout")
                if reason is None:
                    raise UsageError(f"{verb} needs a reason", fix="say why; it is kept in the audit")
                await self._pages.database.move_rollout(caller, name, verb, reason=reason)
            else:
                caller.require_may("rollout")
                raise UsageError(f"{verb!r:.40} is not a verb of rollouts", fix="use a button of its page")
        except (Conflict, UsageError) as error:
            return await self._page(request, problem=error)
        return RedirectResponse(f"/rollouts/{quote(name, safe='')}", 303)

    @staticmethod
    def _for_operators(request: Request) -> None:
        if caller_of(request).org is not None:
            raise AccessDenied("rollouts are for operators", fix="open /search for your runs")


def _chart(metric: str, days: Sequence[Mapping[str, Any]]) -> Markup:
    """The mean of a metric by day, of both versions; shares in percent."""
    is_share = metric in ("failed", "refused", "duration_p95")
    labels = sorted({day["day"] for day in days})
    means = {
        (day["day"], day["side"]): day["metrics"][metric]["mean"] * (100 if is_share else 1)
        for day in days
        if metric in day["metrics"]
    }
    series = [
        ChartSeries(name, kind, [means.get((label, side), math.nan) for label in labels])
        for side, name, kind in (("from", "old version", "succeeded"), ("to", "new version", "running"))
    ]
    title = {"duration_p95": "Slow runs"}.get(metric, metric.capitalize())
    unit = "%" if is_share else ""
    return curves(series, [label[5:] for label in labels], title=f"{title} by day (UTC)", unit=unit)
