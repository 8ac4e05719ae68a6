"""The JSON API under /api/v1: lists, one run, and changes of runs; bearer tokens only."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from worker.clock import Clock
from worker.definitions import fields
from worker.definitions.units import TOO_DEEP, parse_time
from worker.errors import NotFound, UsageError
from worker.ids import RunId
from worker.operations.runs import require_run
from worker.search import parsed
from worker.store.lists import LISTS, MAX_LIMIT, Listing, LogLine, Page, Run, RunDetail, runs
from worker.store.lists.read import read
from worker.store.lists.redaction import Row
from worker.web.access import Caller, CallerDatabase
from worker.web.responses import json_response, read_body

BASE = "/api/v1"


class Api:
    """The API's routes. Responses are encoded in a database thread: a large one must not delay the loop."""

    def __init__(self, database: CallerDatabase, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def routes(self) -> Sequence[Route]:
        lists = [
            Route(f"{BASE}/{listing.name}", functools.partial(self._list, listing), methods=["GET"])
            for listing in LISTS
        ]
        return (
            *lists,
            Route(f"{BASE}/runs/{{run}}", self._run, methods=["GET"]),
            Route(f"{BASE}/runs/{{run}}/attempts", self._attempts, methods=["GET"]),
            Route(f"{BASE}/runs/{{run}}/logs", self._logs, methods=["GET"]),
            Route(f"{BASE}/runs/{{run}}/cancel", self._cancel, methods=["POST"]),
            Route(f"{BASE}/runs/{{run}}/retry", self._retry, methods=["POST"]),
            Route(f"{BASE}/definitions/{{org}}/{{name}}/run", self._run_now, methods=["POST"]),
        )

    async def _list(self, listing: Listing[Any], request: Request) -> Response:
        given, caller = single(request), caller_of(request)

        def work(connection: Connection) -> Response:
            rows, last = read_list(connection, listing, caller, given, self._clock)
            query = urlencode({**given, "after": last})
            link = {} if last is None else {"link": f'<{request.url.path}?{query}>; rel="next"'}
            return json_response(rows, headers=link)

        return await self._database.read(caller, work)

    async def _run(self, request: Request, part: str | None = None) -> Response:
        caller, run = caller_of(request), request.path_params["run"]

        def work(connection: Connection) -> Response:
            row = shown_run(connection, caller, run)
            return json_response(row if part is None else row[part])

        return await self._database.read(caller, work)

    async def _attempts(self, request: Request) -> Response:
        return await self._run(request, "attempts")

    async def _logs(self, request: Request) -> Response:
        given, caller = single(request), caller_of(request)
        if set(given) - {"after", "limit"}:
            raise UsageError("logs have the parameters after (attempt.seq) and limit")
        after = _log_place(given.get("after", "0.0"))
        limit = Page(limit=_limit(given)).limit or MAX_LIMIT

        def work(connection: Connection) -> Response:
            run = require_run(connection, request.path_params["run"], caller.org)
            return json_response(shown_lines(connection, caller, run["id"], after=after, limit=limit))

        return await self._database.read(caller, work)

    async def _cancel(self, request: Request) -> Response:
        await _json_body(request, ())
        caller = caller_of(request)
        row = await self._database.cancel(caller, request.path_params["run"])
        return json_response(caller.sees(Run, row))

    async def _retry(self, request: Request) -> Response:
        body = await _json_body(request, ("from_checkpoint", "again"))
        for name, value in body.items():
            if not isinstance(value, bool):
                raise UsageError(f"{name} must be true or false")
        caller, run = caller_of(request), request.path_params["run"]
        return _created(await self._database.retry(caller, run, **body), caller)

    async def _run_now(self, request: Request) -> Response:
        params = (await _json_body(request, ("params",))).get("params")
        if params is not None and not isinstance(params, dict):
            raise UsageError("params must be an object")
        caller, org, name = caller_of(request), request.path_params["org"], request.path_params["name"]
        key = request.headers.get("idempotency-key")
        row = await self._database.run_now(caller, org, name, request_key=key, params=params)
        return _created(row, caller)


def caller_of(request: Request) -> Caller:
    """The caller that AuthMiddleware found."""
    caller: Caller = request.scope["caller"]
    return caller


def read_list(
    connection: Connection, listing: Listing[Any], caller: Caller, given: Mapping[str, str], clock: Clock
) -> tuple[list[Row], str | None]:
    """A page of a list as this caller sees it, and its last id if more rows may follow.

    Raises:
        AccessDenied: the caller has a lesser role.
        NotFound: the org does not exist, at least for this caller; or `after` is not an id.
        UsageError: an unknown parameter, or an invalid value.
    """
    # An org may read its own credentials and audit.
    if caller.org is None and listing.admin_only:
        caller.require("admin")
    known = {"org", *listing.parameters}
    if unknown := given.keys() - known:
        names = ", ".join(sorted(known))
        raise UsageError(
            f"{listing.name} has no parameter {', '.join(sorted(unknown))}", fix=f"it has {names}"
        )
    org = caller.scope(given.get("org"))
    since = given.get("since")
    page = Page(
        definition=given.get("definition"),
        state=given.get("state"),
        since=None if since is None else parse_time(since, clock, name="since"),
        limit=_limit(given),
        after=given.get("after"),
        query=parsed(given["q"], now=clock.now()) if "q" in given else None,
        broken=_flag(given, "broken"),
    )
    rows = read(connection, listing, org, page)
    full = "limit" in listing.parameters and len(rows) == listing.limit_of(org, page)
    return [caller.sees(listing.row, row) for row in rows], rows[-1]["id"] if full else None


def shown_run(connection: Connection, caller: Caller, run_id: str) -> Row:
    """One run as this caller sees it; raises NotFound also for another org's."""
    return caller.sees(RunDetail, runs.run(connection, caller.scope(), run_id))


def shown_lines(
    connection: Connection,
    caller: Caller,
    run_id: str,
    *,
    after: tuple[int, int] = runs.START,
    limit: int = MAX_LIMIT,
) -> list[Row]:
    """Log lines of a run as this caller sees them."""
    lines = runs.lines(connection, caller.scope(), RunId(run_id), after=after, limit=limit)
    return [caller.sees(LogLine, line) for line in lines]


def single(request: Request) -> dict[str, str]:
    """The parameters of the query; raises UsageError if one is given twice."""
    items = request.query_params.multi_items()
    given = dict(items)
    if len(given) != len(items):
        raise UsageError("a parameter is given twice", fix="give each parameter once")
    return given


async def _json_body(request: Request, names: Sequence[str]) -> dict[str, Any]:
    """The members of a JSON object, which may be left out."""
    text = await read_body(request)
    if not text.strip():
        return {}
    try:
        body = json.loads(text)
    except RecursionError:
        # The parser does not say which member it was; only params may nest.
        raise fields.refusal(TOO_DEEP, "the body", "params") from None
    except ValueError:
        raise UsageError("the body is not JSON") from None
    if not isinstance(body, dict) or set(body) - set(names):
        allowed = ", ".join(names) or "no members"
        raise UsageError(f"the body must be a JSON object with {allowed}")
    return body


def _created(row: Row, caller: Caller) -> Response:
    return json_response(caller.sees(Run, row), 201, {"location": f"{BASE}/runs/{row['id']}"})


def _log_place(text: str) -> tuple[int, int]:
    attempt, dot, seq = text.partition(".")
    if not (dot and attempt.isdecimal() and seq.isdecimal() and len(text) < 20):
        raise NotFound(f"{text!r} is not a log line: after is attempt.seq, such as 1.200")
    return int(attempt), int(seq)


def _flag(given: Mapping[str, str], name: str) -> bool:
    text = given.get(name, "false")
    if text not in ("true", "false"):
        raise UsageError(f"{name} {text!r} is not true or false", fix=f"such as {name}=true")
    return text == "true"


def _limit(given: Mapping[str, str]) -> int | None:
    text = given.get("limit")
    if text is not None and not (text.isascii() and text.isdecimal()):
        raise UsageError(f"limit {text!r} is not between 1 and {MAX_LIMIT}", fix="such as limit=50")
    return None if text is None else int(text[:9])
