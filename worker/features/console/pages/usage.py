"""Usage: what orgs spent, and their budgets, which operators can raise here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from functools import partial
from typing import Any
from urllib.parse import urlencode

from markupsafe import Markup
from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from worker.errors import Conflict, NotFound, UsageError, WorkerError
from worker.features.console.callers import Caller, caller_of
from worker.features.console.charts import ChartSeries, bars
from worker.features.console.pages.base import ROWS, PageGroup, Pages, allowed, query
from worker.features.console.pages.forms import problem_of, reason_of
from worker.ids import ALL_ORGS
from worker.model.definitions.budgets import MONEY, amount_text
from worker.model.money import NANO
from worker.store.dialect import database_now
from worker.store.lists.costs import ModelCost, costs
from worker.store.lists.usage import (
    BYS,
    DAYS,
    BudgetLevel,
    Usage,
    budgets_of,
    forecast_text,
    nearest,
    usage,
)
from worker.store.prices import currency_of

# Budgets that are nearest to their limit, and meters of one org that have a chart.
NEAREST = 10
CHARTS = 3
# What models cost, by these parts.
COSTS = ("org", "model", "definition,model", "kind,tariff", "month")
# How far back the page looks.
SPANS = {"1d": timedelta(0), "7d": timedelta(days=6), "30d": timedelta(days=29), "365d": timedelta(days=364)}


class UsagePages(PageGroup):
    """With `org_usage` orgs see what their runs cost, as operators do."""

    def __init__(self, pages: Pages, org_usage: bool = False) -> None:
        super().__init__(pages)
        self._org_usage = org_usage

    def routes(self) -> Sequence[Route]:
        return (
            Route("/usage", self._usage),
            Route("/usage/{org}/raise", self._raise, methods=["POST"]),
        )

    async def _usage(self, request: Request) -> Response:
        return await self._page(request, query(request, "org", "by", "since", "after"))

    async def _page(
        self, request: Request, given: dict[str, str], problem: WorkerError | None = None
    ) -> Response:
        """What was spent; of one org also its budgets, for operators."""
        caller = caller_of(request)
        by, since = given.get("by", "meter"), given.get("since", "30d")
        if since not in SPANS:
            raise UsageError(f"{since!r} is not a span of this page", fix=f"one of {', '.join(SPANS)}")
        org = caller.org or given.get("org")
        sees_costs = caller.org is None or self._org_usage
        is_costs = by in COSTS
        if is_costs and not sees_costs:
            raise UsageError(f"{by!r} is not a way to list usage", fix=f"one of {', '.join(BYS)}")

        def work(connection: Connection) -> dict[str, Any]:
            scope = caller.scope(org)
            # The days are those of the database's clock.
            start = database_now(connection) - SPANS[since]
            how: dict[str, Any] = {"since": start, "limit": ROWS, "after": given.get("after")}
            money = costs(connection, scope, by, **how) if is_costs else []
            rows = [] if is_costs else usage(connection, scope, by, **how, with_money=sees_costs)
            levels = [] if org is None else budgets_of(connection, org)
            if caller.org is not None:
                levels = [level for level in levels if sees_costs and level["meter"] == MONEY]
            currency = currency_of(connection) or ""
            orgs = list(dict.fromkeys(row["org"] for row in [*rows, *money]))
            more = org is None and len(orgs) == ROWS
            is_first = "after" not in given
            near = nearest(connection, ALL_ORGS, limit=NEAREST) if org is None and is_first else []
            return {
                "rows": [caller.sees(Usage, row) for row in rows],
                "costs": [caller.sees(ModelCost, row) for row in money],
                "share_of": max([row["money"] for row in money], default=0),
                "amount": partial(amount_text, currency=currency),
                "forecast_of": partial(forecast_text, currency=currency),
                "nearest": near,
                "charts": []
                if org is None
                else _charts(caller, usage(connection, scope, "day", with_money=sees_costs)),
                "budgets": [caller.sees(BudgetLevel, level) for level in levels],
                "by": by,
                "bys": (*BYS, *COSTS) if sees_costs else BYS,
                "since": since,
                "spans": list(SPANS),
                "org": org,
                "may": allowed(request),
                "next": f"/usage?{urlencode({**given, 'after': orgs[-1]})}" if more else None,
                **problem_of(problem),
            }

        return await self._pages.show(request, "usage.html", work)

    async def _raise(self, request: Request) -> Response:
        _, form = await self._pages.checked_form(request)
        org = request.path_params["org"]
        try:
            await self._pages.database.raise_budget(
                caller_of(request),
                org,
                meter=form.get("meter", ""),
                per=form.get("per", ""),
                by=form.get("by", "") if form.get("meter") == MONEY else _number(form.get("by", "")),
                reason=reason_of(form),
            )
        except (Conflict, NotFound, UsageError) as error:
            if caller_of(request).org is not None:
                raise
            return await self._page(request, {"org": org}, problem=error)
        return RedirectResponse(f"/usage?{urlencode({'org': org})}", 303)


def _charts(caller: Caller, rows: Sequence[Usage]) -> list[Markup]:
    """A chart of the days of a month for each of the meters that were spent on most of them."""
    seen = [caller.sees(Usage, row) for row in rows]
    by_meter: dict[str, dict[date, int]] = {}
    for row in seen:
        by_meter.setdefault(row["meter"], {})[row["day"]] = row["used"]
    ordered = sorted(by_meter.items(), key=lambda item: (-len(item[1]), item[0]))
    return [_chart(meter, used, seen[0]["since"]) for meter, used in ordered[:CHARTS]]


def _chart(meter: str, used: Mapping[date, int], first: date) -> Markup:
    days = [first + timedelta(days=ahead) for ahead in range(DAYS)]
    return bars(
        [ChartSeries(meter, "used", [_of_chart(meter, used.get(day, 0)) for day in days])],
        [f"{day:%d %b}" for day in days],
        title=f"{meter} by day (UTC)",
        ticks=[f"{day:%d %b}" if at % 7 == 3 else "" for at, day in enumerate(days)],
    )


def _of_chart(meter: str, used: int) -> float:
    return used / NANO if meter == MONEY else used


def _number(text: str) -> int:
    digits = text.strip().replace(",", "").replace("_", "")
    if not (digits.isascii() and digits.isdecimal()):
        raise UsageError(f"{text!r:.40} is not a whole number", fix="write it in digits, such as 50000")
    return int(digits[:20])
