"""The page of a definition: when it runs, with which values and why, its past; and its changes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from worker.errors import Conflict, DefinitionError, UsageError, WorkerError
from worker.features.console.callers import Caller, caller_of
from worker.features.console.charts import Dot
from worker.features.console.charts import lengths as lengths_chart
from worker.features.console.live_lists import PREFIX
from worker.features.console.pages.base import PageGroup, allowed, query
from worker.features.console.pages.forms import as_text, from_typed, problem_of, reason_of
from worker.features.console.pages.links import definition_path, search_of
from worker.features.console.pages.runs import value_of
from worker.ids import DefinitionId
from worker.model.definitions.effective import effective
from worker.model.definitions.fields import refusal
from worker.model.definitions.pools import pool_of
from worker.model.definitions.units import parse_time
from worker.model.runs.preview import NextTime, preview_definition
from worker.operations.changes import shown_keys
from worker.operations.handlers import Handlers
from worker.store import catalogue, orgs
from worker.store.lists import BACKFILLS, Page
from worker.store.lists.grid import Length, Revision, lengths, revisions
from worker.store.lists.read import DefinitionState, definition, read, state
from worker.store.lists.rows import DefinitionDetail, Run
from worker.store.lists.runs import of_definition, unfinished

TIMES = 10
RECENT = 8
# Runs of the chart of run lengths.
CHARTED = 100
REVISIONS = 10
# Characters of a value of a difference.
VALUE = 400


class DefinitionPages(PageGroup):
    def routes(self) -> Sequence[Route]:
        at = "/orgs/{org}/definitions/{name}"
        return (
            Route(at, self._definition, methods=["GET"]),
            Route(f"{at}/run", self._run_now, methods=["POST"]),
            Route(f"{at}/pause", self._pause, methods=["POST"]),
            Route(f"{at}/resume", self._resume, methods=["POST"]),
            Route(f"{at}/backfill", self._plan, methods=["GET"]),
            Route(f"{at}/backfill", self._backfill, methods=["POST"]),
        )

    async def _definition(self, request: Request) -> Response:
        return await self._page(request, query(request, "before"))

    async def _page(
        self, request: Request, given: Mapping[str, str] = {}, problem: WorkerError | None = None
    ) -> Response:
        """The page; after a change that was refused, with its problem."""
        caller, (org, name) = caller_of(request), _named(request)
        caller.scope(org)
        before, now = _number(given.get("before")), self._pages.clock.now()

        def work(connection: Connection) -> dict[str, Any]:
            row = definition(connection, org, name)
            org_row = orgs.require(connection, org)
            id_, org_id = DefinitionId(row["id"]), org_row["id"]
            times, fault = _next_times(connection, row, now)
            changes = revisions(connection, org_id, id_, before=before, limit=REVISIONS + 1)
            took = lengths(connection, org_id, id_, limit=CHARTED)
            recent = of_definition(connection, org_id, id_, limit=RECENT)
            is_operator = caller.org is None
            # An org sees no spec, so none of what the page derives from it.
            seen = caller.sees(DefinitionDetail, row)
            spec = seen.get("spec")
            remembered = state(connection, org, name)
            return {
                "definition": seen,
                "times": times,
                "fault": fault,
                "values": None if spec is None else _effective(connection, row, org_row),
                "changes": _changes(caller, changes),
                "older": changes[REVISIONS - 1]["revision"] if len(changes) > REVISIONS else None,
                "is_newest": before is None,
                "lengths": _chart(took),
                "state": value_of("state", remembered["data"]) if remembered["version"] else None,
                "state_of": caller.sees(DefinitionState, remembered),
                "runs": [caller.sees(Run, run) for run in recent],
                "backfills": read(connection, BACKFILLS, org, Page(definition=name, limit=5))
                if is_operator
                else (),
                # Who may give these is asked for them.
                "by_hand": row["spec"].get("params_by_hand", []),
                "params": (spec or {}).get("params", {}),
                "may": allowed(request),
                **problem_of(problem),
                "base": definition_path(org, name),
                "runs_href": search_of(("org", org), ("definition", name)),
            }

        stream = None if before else f"{PREFIX}{definition_path(org, name)}"
        return await self._pages.show(request, "definition.html", work, stream=stream)

    async def _run_now(self, request: Request) -> Response:
        _, form = await self._pages.checked_form(request)
        org, name = _named(request)
        try:
            run = await self._pages.database.run_now(
                caller_of(request), org, name, params=_params(form), reason=reason_of(form)
            )
        except (Conflict, DefinitionError) as error:
            return await self._page(request, problem=error)
        return RedirectResponse(f"/runs/{run['id']}", 303)

    async def _pause(self, request: Request) -> Response:
        _, form = await self._pages.checked_form(request)
        org, name = _named(request)
        try:
            await self._pages.database.pause(caller_of(request), org, name, note=reason_of(form, "note"))
        except Conflict as error:
            return await self._page(request, problem=error)
        return RedirectResponse(definition_path(org, name), 303)

    async def _resume(self, request: Request) -> Response:
        await self._pages.checked_form(request)
        org, name = _named(request)
        try:
            await self._pages.database.resume(caller_of(request), org, name)
        except Conflict as error:
            return await self._page(request, problem=error)
        return RedirectResponse(definition_path(org, name), 303)

    async def _plan(self, request: Request) -> Response:
        """What a backfill would do, and the form that starts it; changes nothing."""
        return await self._plan_page(request, query(request, "from", "until", "limit"))

    async def _plan_page(
        self, request: Request, given: Mapping[str, str], problem: WorkerError | None = None
    ) -> Response:
        caller, (org, name) = caller_of(request), _named(request)
        caller.scope(org)
        caller.require_may("backfill")
        plan = None
        if problem is None and ("from" in given or "until" in given):
            try:
                plan = await self._pages.database.planned_backfill(caller, org, name, **self._range(given))
            except (UsageError, Conflict) as error:
                problem = error

        def work(connection: Connection) -> dict[str, Any]:
            return {
                "definition": caller.sees(DefinitionDetail, definition(connection, org, name)),
                "given": given,
                "plan": plan,
                **problem_of(problem),
                "base": definition_path(org, name),
            }

        return await self._pages.show(request, "backfill.html", work)

    async def _backfill(self, request: Request) -> Response:
        _, form = await self._pages.checked_form(request)
        org, name = _named(request)
        try:
            what = self._range(form) | {"reason": reason_of(form)}
            await self._pages.database.backfill(caller_of(request), org, name, **what)
        except (UsageError, Conflict) as error:
            return await self._plan_page(request, form, error)
        return RedirectResponse(f"{definition_path(org, name)}#backfills", 303)

    def _range(self, given: Mapping[str, str]) -> dict[str, Any]:
        """The range of a backfill, and how many of its runs may be unfinished at once."""
        start, until = (self._time(given.get(name, ""), name) for name in ("from", "until"))
        limit = given.get("limit", "1")
        if not (limit.isascii() and limit.isdecimal()):
            raise UsageError("runs at once must be a whole number")
        return {"start": start, "until": until, "limit": int(limit[:9])}

    def _time(self, text: str, name: str) -> datetime:
        """A time of a form; without an offset it is in UTC."""
        if not text:
            raise UsageError(f"{name} is missing")
        try:
            found = datetime.fromisoformat(text)
        except ValueError:
            return parse_time(text, self._pages.clock, name=name)
        return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _named(request: Request) -> tuple[str, str]:
    return request.path_params["org"], request.path_params["name"]


def _number(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise UsageError("before must be the number of a revision", fix="open the page without it")
    return int(text)


def _next_times(
    connection: Connection, row: DefinitionDetail, now: datetime
) -> tuple[list[NextTime], str | None]:
    """The next scheduled times with notes; or none, and why they cannot be computed."""
    try:
        serial = unfinished(connection, row["org"], row["id"])
        return preview_definition(row, serial, None, TIMES, now=now), None
    except WorkerError as error:
        return [], error.message


def _effective(
    connection: Connection, row: DefinitionDetail, org: Mapping[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    usable: Mapping[str, Any] | None
    if of_workers := catalogue.entries(connection, row["handler"]):
        usable = next((one for one in of_workers if one["error"] is None), None)
    else:
        pool = pool_of(row["spec"].get("pool"), org["pool"])
        usable = Handlers(connection).effective(row["handler"], pool)
    try:
        groups = effective(
            row["spec"],
            enabled=row["enabled"],
            is_of_template=row["template"] is not None,
            handler=usable,
            org_timezone=org["timezone"],
            org_pool=org["pool"],
        )
    except WorkerError:
        return {}
    return {
        name: [{"key": one.key, "value": as_text(one.value), "source": one.source} for one in group]
        for name, group in groups.items()
    }


class Difference(NamedTuple):
    """A key that a revision changed; empty texts for absent values."""

    key: str
    before: str
    after: str


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """What differs between two specs, key by key, tables by their members."""
    found = shown_keys(_flat(before), _flat(after))
    return [Difference(key, _cut(old), _cut(new)) for key, (old, new) in found.items()]


def _flat(spec: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in spec.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{path}{key}.")
        else:
            flat[f"{path}{key}"] = value
    return flat


def _cut(value: Any) -> str:
    text = as_text(value)
    return text if len(text) <= VALUE else f"{text[:VALUE]} … {len(text) - VALUE:,} more characters"


def _changes(caller: Caller, found: Sequence[Revision]) -> list[dict[str, Any]]:
    """The newest revisions, each with what it changed, if the caller sees specs."""
    changes = []
    for at, revision in enumerate(found[:REVISIONS]):
        older = found[at + 1] if at + 1 < len(found) else None
        seen = caller.sees(Revision, revision)
        differs = differences(older["spec"] if older else {}, revision["spec"]) if "spec" in seen else None
        changes.append({**seen, "differences": differs, "is_first": older is None})
    return changes


def _chart(found: Sequence[Length]) -> Any:
    dots = [
        Dot(
            f"{run['scheduled_for']:%Y-%m-%d %H:%M}",
            max((run["finished_at"] - run["started_at"]).total_seconds(), 0.0),
            run["state"],
            f"/runs/{run['id']}",
        )
        for run in reversed(found)
    ]
    return lengths_chart(dots, title="Run lengths, oldest first") if dots else None


def _params(form: Mapping[str, str]) -> dict[str, Any] | None:
    """The params of a form: those with inputs of their own, and a table in JSON; None without any."""
    params: dict[str, Any] = {}
    if text := form.get("params", "").strip():
        try:
            table = json.loads(text)
        except (ValueError, RecursionError):
            table = None
        if not isinstance(table, dict):
            raise refusal('params must be a table in JSON, such as {"limit": 5}', "run now", "params")
        params |= table
    named = {name.removeprefix("param."): text for name, text in form.items() if name.startswith("param.")}
    return params | {name: from_typed(text) for name, text in named.items()} or None
