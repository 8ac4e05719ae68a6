"""What is installed and stored: definitions, templates, handlers, credentials, workers and the audit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from worker.errors import AccessDenied, Conflict, NotFound, UsageError, WorkerError
from worker.features.console.callers import Caller, caller_of
from worker.features.console.live_lists import WORKERS
from worker.features.console.pages.base import (
    ROWS,
    PageGroup,
    Tab,
    allowed,
    next_page,
    page_after,
    query,
    tabs_of,
)
from worker.features.console.pages.forms import problem_of
from worker.ids import ALL_ORGS
from worker.model.runs import worker_ends
from worker.operations import approvals
from worker.store import health, orgs, pools
from worker.store.lists import (
    AUDIT,
    DEFINITIONS,
    HANDLERS,
    TEMPLATES,
    TROUBLES,
    Listing,
    Page,
    morning,
    tabs,
)
from worker.store.lists.morning import lease_state
from worker.store.lists.read import page_of, read
from worker.store.templates import COUNTED

R = TypeVar("R")
# Declarations of hosts of one pool that the page of workers shows; characters of secrets and scopes of one.
APPROVALS = 20
MAX_DECLARED = 2_000
RISKS = ("dead", "old", "all")


# The states of workers and hosts, as the page of workers sorts them.
_STATES = ("missing", "late", "up", "crashed", "silent", "stopped", "removed")


# The parameters of each tab of the definitions.
_TABS: Mapping[str, Mapping[str, str]] = {
    "all": {},
    **{state: {"state": state} for state in (*TROUBLES, "paused", "disabled", "closed")},
}


class InventoryPages(PageGroup):
    def routes(self) -> Sequence[Route]:
        return (
            Route("/definitions", self._definitions),
            Route("/templates", self._templates),
            Route("/handlers", self._handlers),
            Route("/credentials", self._credentials),
            Route("/workers", self._workers),
            Route("/pools/approve", self._approve, methods=["POST"]),
            Route("/audit", self._audit),
        )

    async def _definitions(self, request: Request) -> Response:
        return await self._list(
            request, DEFINITIONS, "definitions.html", "org", "definition", "state", with_tabs=True
        )

    async def _templates(self, request: Request) -> Response:
        return await self._list(request, TEMPLATES, "templates.html", "state")

    async def _audit(self, request: Request) -> Response:
        require_admin(caller_of(request))
        return await self._list(request, AUDIT, "audit.html", "org")

    async def _list(
        self, request: Request, listing: Listing[R], template: str, *filters: str, with_tabs: bool = False
    ) -> Response:
        """A page of a list, newest first, with its filters; that of definitions has tabs."""
        caller, given = caller_of(request), query(request, *filters, "after")

        def work(connection: Connection) -> dict[str, Any]:
            page = Page(
                definition=given.get("definition"),
                state=given.get("state"),
                after=given.get("after"),
                limit=ROWS,
            )
            found = page_of(connection, listing, caller.scope(given.get("org")), page)
            rows: list[Any] = found.rows
            return {
                "rows": [caller.sees(listing.row, row) for row in rows],
                "tabs": _tabs(connection, caller, given) if with_tabs else (),
                "states": listing.states,
                "counted": COUNTED,
                "given": dict.fromkeys(filters, "") | given,
                "next": page_after(request.url.path, given, found.next),
            }

        return await self._pages.show(request, template, work)

    async def _handlers(self, request: Request) -> Response:
        caller = caller_of(request)
        query(request)

        def work(connection: Connection) -> dict[str, Any]:
            rows = read(connection, HANDLERS, ALL_ORGS if caller.org is None else caller.org)
            # Those that do not load first.
            rows.sort(key=lambda row: (row["error"] is None, row["name"], row["distribution"]))
            return {"rows": [shown_handler(caller.sees(HANDLERS.row, row)) for row in rows]}

        return await self._pages.show(request, "handlers.html", work)

    async def _credentials(self, request: Request) -> Response:
        caller, given = caller_of(request), query(request, "risk", "after")
        require_admin(caller)
        risk = given.get("risk", "dead")
        if risk not in RISKS:
            raise UsageError(f"{risk!r} is not a risk", fix=f"one of {', '.join(RISKS)}")

        def work(connection: Connection) -> dict[str, Any]:
            rows = morning.credentials(connection, caller.scope(), risk, after=given.get("after"), limit=ROWS)
            return {
                "rows": [caller.sees(morning.CredentialWithOrg, row) for row in rows],
                "risk": risk,
                "risks": RISKS,
                "next": next_page("/credentials", {"risk": risk}, rows),
            }

        return await self._pages.show(request, "credentials.html", work)

    async def _workers(self, request: Request) -> Response:
        query(request)
        return await self._workers_page(request)

    async def _workers_page(self, request: Request, problem: WorkerError | None = None) -> Response:
        """The page; after an approval that was refused, with its problem."""
        if caller_of(request).org is not None:
            raise AccessDenied("the page of workers is for operators", fix="open the page of your org")
        now = self._pages.clock.now()

        def work(connection: Connection) -> dict[str, Any]:
            running = morning.running_by_worker(connection, ALL_ORGS)
            workers = [
                {**row, **_state_of(row, now), "running": running.get(row["id"], 0)}
                for row in health.workers(connection)
            ]
            workers.sort(key=lambda row: _STATES.index(row["state"]))
            return {
                "workers": workers,
                "pools": pools.overview(connection),
                "approvals": shown_approvals(approvals.declared(connection)),
                "may": allowed(request),
                **problem_of(problem),
            }

        return await self._pages.show(request, "workers.html", work, stream=WORKERS)

    async def _approve(self, request: Request) -> Response:
        _, form = await self._pages.checked_form(request)
        given = (form.get(name, "") for name in ("pool", "handler", "digest"))
        try:
            await self._pages.database.approve(caller_of(request), *given)
        except (Conflict, NotFound) as error:
            return await self._workers_page(request, problem=error)
        return RedirectResponse("/workers#approvals", 303)


def _tabs(connection: Connection, caller: Caller, given: Mapping[str, str]) -> list[Tab]:
    """Definitions by state, with their number unless a name narrows them."""
    counts: Mapping[str, tabs.BoundedCount] = {}
    if "definition" not in given:
        scope = orgs.scope_of(connection, caller.scope(given.get("org")))
        counts = tabs.definitions(connection, scope)
    return tabs_of("/definitions", given, _TABS, counts)


def require_admin(caller: Caller) -> None:
    """As in the API: the role admin for operators; an org sees its own rows."""
    if caller.org is None:
        caller.require("admin")


def shown_approvals(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Hosts' declarations with the command for each; a few of each pool, so that none hides another's.

    `left_out` is the number of a pool's further rows, at its last one. What is too long to read here has
    `is_long`: it is to be approved with the command.
    """
    of_pool = Counter(row["pool"] for row in rows)
    seen: Counter[str] = Counter()
    shown = []
    for row in rows:
        seen[row["pool"]] += 1
        if seen[row["pool"]] > APPROVALS:
            continue
        is_last = seen[row["pool"]] == APPROVALS
        lists = {key: row[key] for key in ("secrets", "scopes", "egress", "audiences", "children")}
        long = sum(len(name) for names in lists.values() for name in names or ()) > MAX_DECLARED
        names = {key: [] if long else listed for key, listed in lists.items()}
        left_out = of_pool[row["pool"]] - APPROVALS if is_last else 0
        command = approvals.command_of(row)
        shown.append({**row, **names, "is_long": long, "left_out": left_out, "command": command})
    return shown


def _state_of(worker: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    """The `state`, as `lease_state` or `worker_ends.end_of`, and in `recovered` how many runs others took."""
    state = worker_ends.end_of(worker) or lease_state(worker["renewed_at"], worker["lease_until"], now)
    runs = worker["recovered_runs"]
    return {"state": state, "recovered": worker_ends.recovered(runs) if runs else None}


def shown_handler(row: Mapping[str, Any]) -> dict[str, Any]:
    """A handler with its schemas as rows for people."""
    return {
        **row,
        "params": schema_rows(row.get("params_schema")),
        "settings": schema_rows(row.get("settings_schema")),
    }


def schema_rows(schema: Any) -> list[dict[str, Any]]:
    """The properties of a JSON Schema: name, type, whether required, default and meaning."""
    if not isinstance(schema, Mapping) or not isinstance(schema.get("properties"), Mapping):
        return []
    required = schema.get("required")
    return [
        {
            "name": name,
            "type": _type_of(part, schema),
            "required": isinstance(required, list) and name in required,
            "default": part.get("default") if isinstance(part, Mapping) else None,
            "about": part.get("description", "") if isinstance(part, Mapping) else "",
        }
        for name, part in schema["properties"].items()
    ]


def _type_of(part: Any, schema: Mapping[str, Any]) -> str:
    """The type of a value in words: `string`, `integer or null`, `one of a, b`."""
    if not isinstance(part, Mapping):
        return "any value"
    if isinstance(part.get("enum"), list):
        return f"one of {', '.join(str(each) for each in part['enum'][:20])}"
    if isinstance(part.get("$ref"), str):
        name = part["$ref"].rpartition("/")[2]
        definitions = schema.get("$defs")
        found = definitions.get(name) if isinstance(definitions, Mapping) else None
        # One level: a schema may refer to itself.
        is_ref = isinstance(found, Mapping) and "$ref" in found
        return name if found is None or is_ref else _type_of(found, {})
    for key in ("anyOf", "oneOf"):
        if isinstance(part.get(key), list):
            return " or ".join(_type_of(each, {}) for each in part[key][:10])
    kind = part.get("type", "any value")
    text = " or ".join(map(str, kind)) if isinstance(kind, list) else str(kind)
    return f"{text} ({part['format']})" if isinstance(part.get("format"), str) else text
