"""The streams of lists, such as `/live/runs?q=state:failed&after=PLACE`: their addresses and lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import tzinfo
from urllib.parse import urlencode

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from worker.clock import Clock
from worker.errors import AccessDenied
from worker.features.console.api.requests import query_of
from worker.features.console.callers import Caller, caller_of
from worker.features.console.changes import ListFilter
from worker.features.console.live import Live
from worker.ids import AllOrgs, OrgId
from worker.model.search import Query, parsed
from worker.store import definitions, orgs
from worker.store.lists import live
from worker.store.lists.matching import few_orgs

# The stream of a page, by the page's path.
PREFIX = "/live"
OVERVIEW = f"{PREFIX}/overview"
RUNS = f"{PREFIX}/runs"
WORKERS = f"{PREFIX}/workers"


def stream_from_now(connection: Connection, path: str, **query: str) -> str:
    """The address of a stream of what happens from now on; to be asked for before the page is read."""
    given = {name: value for name, value in query.items() if value}
    return f"{path}?{urlencode({**given, 'after': live.moment(connection)})}"


class LiveLists:
    """The streams of the pages Overview, Runs, Org, Definition and Workers."""

    def __init__(self, streams: Live, clock: Clock, zone_of: Callable[[Request], tzinfo]) -> None:
        self._streams = streams
        self._clock = clock
        self._zone_of = zone_of

    def routes(self) -> Sequence[Route]:
        return (
            Route(OVERVIEW, self._overview),
            Route(RUNS, self._runs),
            Route(WORKERS, self._workers),
            Route(f"{PREFIX}/orgs/{{org}}", self._org),
            Route(f"{PREFIX}/orgs/{{org}}/definitions/{{name}}", self._definition),
        )

    async def _overview(self, request: Request) -> Response:
        _require_operator(request)
        return await self._answer(request, lambda connection: ListFilter())

    async def _workers(self, request: Request) -> Response:
        _require_operator(request)
        return await self._answer(request, lambda connection: ListFilter(of_workers=True))

    async def _runs(self, request: Request) -> Response:
        caller, text = caller_of(request), request.query_params.get("q", "")
        query = parsed(text, now=self._clock.now(), zone=self._zone_of(request), keys=caller.search_keys)
        return await self._answer(
            request, lambda connection: ListFilter(query, _orgs(connection, caller, query)), "q"
        )

    async def _org(self, request: Request) -> Response:
        code = request.path_params["org"]
        caller_of(request).scope(code)

        def work(connection: Connection) -> ListFilter:
            return ListFilter(org_ids=frozenset({orgs.require(connection, code)["id"]}))

        return await self._answer(request, work)

    async def _definition(self, request: Request) -> Response:
        code, name = request.path_params["org"], request.path_params["name"]
        caller_of(request).scope(code)

        def work(connection: Connection) -> ListFilter:
            org_id = orgs.require(connection, code)["id"]
            row = definitions.require(connection, org_id, code, name)
            return ListFilter(org_ids=frozenset({org_id}), definition_id=row["id"])

        return await self._answer(request, work)

    async def _answer(
        self, request: Request, filter_of: Callable[[Connection], ListFilter], *names: str
    ) -> Response:
        given = query_of(request, (*names, "after"), "a stream")
        place = request.headers.get("last-event-id") or given.get("after", "")
        return await self._streams.list_events(request, place, filter_of)


def _orgs(connection: Connection, caller: Caller, query: Query) -> frozenset[OrgId] | None:
    """The orgs whose runs a search of this caller finds; None if they are all, or many."""
    scope = orgs.scope_of(connection, caller.scope())
    own = None if isinstance(scope, AllOrgs) else frozenset({scope})
    if query.org is None:
        return own
    found = few_orgs(connection, scope, Query(org=query.org))
    named = None if found is None else frozenset(found)
    return own if named is None else named if own is None else named & own


def _require_operator(request: Request) -> None:
    if caller_of(request).org is not None:
        raise AccessDenied("this page is for operators", fix="open the page of your org")
