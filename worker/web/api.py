"""The JSON API under /api/v1: lists, one run, and changes of runs; bearer tokens only."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlencode

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from worker.clock import Clock
from worker.definitions import fields
from worker.definitions.units import TOO_DEEP
from worker.errors import NotFound, UsageError
from worker.ids import RunId
from worker.operations.runs import cancel, require_run, retry, run_now
from worker.store.lists import runs as run_lists
from worker.store.lists.paging import Row
from worker.web.access import Caller, CallerDatabase
from worker.web.lists import LISTS, limit_of, read_list
from worker.web.redaction import Noun, redacted, redacted_row
from worker.web.responses import encode, json_answer, read_body

BASE = "/api/v1"
LOG_LINES = 1000


class Api:
    """The API's routes. Responses are encoded in a database thread: a large one must not delay the loop."""

    def __init__(self, database: CallerDatabase, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def routes(self) -> Sequence[Route]:
        lists = [
            Route(f"{BASE}/{name}", functools.partial(self._list, name), methods=["GET"]) for name in LISTS
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

    async def _list(self, name: Noun, request: Request) -> Response:
        given = single(request.query_params.multi_items())
        caller = caller_of(request)

        def work(connection: Connection) -> tuple[bytes, str | None]:
            rows = read_list(connection, name, caller, given, self._clock)
            full = "limit" in LISTS[name].filters and len(rows) == limit_of(given)
            return encode(rows), rows[-1]["id"] if full and rows else None

        body, last = await self._database.read(caller, work)
        headers = {}
        if last is not None:
            query = urlencode({**given, "after": last})
            headers["link"] = f'<{request.url.path}?{query}>; rel="next"'
        return json_answer(body, headers=headers)

    async def _run(self, request: Request) -> Response:
        return json_answer(await self._of_run(request, lambda connection, row: row))

    async def _attempts(self, request: Request) -> Response:
        return json_answer(await self._of_run(request, lambda connection, row: row["attempts"]))

    async def _logs(self, request: Request) -> Response:
        given = single(request.query_params.multi_items())
        if set(given) - {"after", "limit"}:
            raise UsageError("logs have the parameters after (attempt.seq) and limit")
        after, limit = _log_place(given.get("after", "0.0")), _log_limit(given.get("limit"))
        caller = caller_of(request)

        def work(connection: Connection) -> bytes:
            run = require_run(connection, request.path_params["run"], caller.org)
            return encode(shown_lines(connection, caller, run["id"], after=after, limit=limit))

        return json_answer(await self._database.read(caller, work))

    async def _of_run(self, request: Request, part: Callable[[Connection, Row], Any]) -> bytes:
        caller = caller_of(request)

        def work(connection: Connection) -> bytes:
            return encode(part(connection, shown_run(connection, caller, request.path_params["run"])))

        return await self._database.read(caller, work)

    async def _cancel(self, request: Request) -> Response:
        await _json_body(request, ())
        caller, run = caller_of(request), request.path_params["run"]
        row = await self._database.change(caller, cancel, run, actor=caller.actor, org=caller.org)
        return json_answer(encode(redacted_row("runs", row, caller)))

    async def _retry(self, request: Request) -> Response:
        body = await _json_body(request, ("from_checkpoint",))
        from_checkpoint = body.get("from_checkpoint", False)
        if not isinstance(from_checkpoint, bool):
            raise UsageError("from_checkpoint must be true or false")
        caller = caller_of(request)
        row = await self._database.change(
            caller,
            retry,
            request.path_params["run"],
            actor=caller.actor,
            org=caller.org,
            from_checkpoint=from_checkpoint,
            by_org=caller.org is not None,
        )
        return _created(row, caller)

    async def _run_now(self, request: Request) -> Response:
        body = await _json_body(request, ("params",))
        params = body.get("params")
        if params is not None and not isinstance(params, dict):
            raise UsageError("params must be an object")
        caller, org = caller_of(request), request.path_params["org"]
        caller.org_asked_for(org)
        row = await self._database.change(
            caller,
            run_now,
            org,
            request.path_params["name"],
            actor=caller.actor,
            request_key=request.headers.get("idempotency-key"),
            params=params,
            by_org=caller.org is not None,
        )
        return _created(row, caller)


def caller_of(request: Request) -> Caller:
    """The caller that AuthMiddleware found."""
    caller: Caller = request.scope["caller"]
    return caller


def shown_run(connection: Connection, caller: Caller, run_id: str) -> Row:
    """One run with all that this caller may see of it.

    Raises:
        NotFound: there is none, or it is another org's.
    """
    if caller.org is None:
        return run_lists.run_for_all_orgs(connection, run_id)
    return redacted_row("runs", run_lists.run(connection, caller.org, run_id), caller)


def shown_lines(
    connection: Connection,
    caller: Caller,
    run_id: str,
    *,
    after: tuple[int, int] = run_lists.START,
    limit: int = LOG_LINES,
) -> list[Row]:
    """Lines of the log of a run that this caller may see."""
    run = RunId(run_id)
    if caller.org_id is None:
        lines = run_lists.lines_for_all_orgs(connection, run, after=after, limit=limit)
    else:
        lines = run_lists.lines(connection, caller.org_id, run, after=after, limit=limit)
    return redacted("logs", lines, caller)


def single(items: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Parameters, each given once.

    Raises:
        UsageError: one is given twice.
    """
    given = dict(items)
    if len(given) != len(items):
        raise UsageError("a parameter is given twice")
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
    body = encode(redacted_row("runs", row, caller))
    return json_answer(body, 201, {"location": f"{BASE}/runs/{row['id']}"})


def _log_place(text: str) -> tuple[int, int]:
    attempt, dot, seq = text.partition(".")
    if not (dot and attempt.isdecimal() and seq.isdecimal() and len(text) < 20):
        raise NotFound(f"no line of a log is called {text!r}: after is attempt.seq, such as 1.200")
    return int(attempt), int(seq)


def _log_limit(text: str | None) -> int:
    if text is None:
        return LOG_LINES
    if not text.isdecimal() or not 1 <= int(text[:9]) <= LOG_LINES:
        raise UsageError(f"limit {text!r} is not between 1 and {LOG_LINES}")
    return int(text)
