"""The API's handlers. Responses are encoded in a database thread: a large one must not delay the loop."""

from __future__ import annotations

import functools
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from worker.clock import Clock
from worker.diagnosis.matters import overview
from worker.diagnosis.why import explain
from worker.errors import AccessDenied, NotFound, PreconditionFailed, UsageError
from worker.features.console.api import endpoints
from worker.features.console.api.endpoints import BASE, LIST_ENDPOINTS, Endpoint, parameters_of
from worker.features.console.api.openapi import document
from worker.features.console.api.requests import body_of, flag_of, limit_of, log_place, query_of
from worker.features.console.callers import Caller, CallerDatabase, Many, caller_of, check_started
from worker.ids import ALL_ORGS
from worker.kit.web.responses import fresh, json_response
from worker.model.definitions.units import parse_time
from worker.model.runs.clauses import row_of
from worker.model.runs.preview import preview_definition
from worker.model.search import of_pool, parsed
from worker.operations.changes import ROLLOUT_MOVES
from worker.operations.runs import require_run
from worker.store.dialect import database_now
from worker.store.lists import MAX_LIMIT, ROLLOUTS, Listing, Page, runs
from worker.store.lists import read as lists
from worker.store.lists.costs import ModelCost, costs
from worker.store.lists.rollouts import rollout
from worker.store.lists.rows import (
    Backfill,
    Bulk,
    CredentialRow,
    DefinitionDetail,
    Explanation,
    LogRow,
    PlannedBackfill,
    PlannedStepRow,
    RolloutRow,
    RunDetail,
)
from worker.store.lists.usage import BudgetLevel, Usage, budgets_of, usage
from worker.store.redaction import Row

Handler = Callable[[Request], Awaitable[Response]]
_GENERATION = re.compile(r"[0-9]{1,9}")
_REVISION = re.compile(r'\s*(?:W/)?"(\d{1,9})-[0-9a-f]*"\s*')


class Api:
    """The API's routes, one for each endpoint.

    `watch` answers with the events of a run, `installation` is the word of worker.toml.
    """

    def __init__(
        self,
        database: CallerDatabase,
        clock: Clock,
        watch: Handler,
        *,
        installation: str = "",
        org_usage: bool = False,
    ) -> None:
        self._database = database
        self._clock = clock
        self._installation = installation
        self._org_usage = org_usage
        changes: Mapping[Endpoint, Callable[..., Awaitable[Row]]] = {
            endpoints.PAUSE_ORG: CallerDatabase.pause_org,
            endpoints.RESUME_ORG: CallerDatabase.resume_org,
            endpoints.CANCEL: CallerDatabase.cancel,
            endpoints.RETRY: CallerDatabase.retry,
            endpoints.ANSWER: CallerDatabase.answer,
            endpoints.PAUSE: CallerDatabase.pause,
            endpoints.RESUME: CallerDatabase.resume,
            endpoints.SET_STATE: CallerDatabase.set_state,
            endpoints.CLEAR_STATE: CallerDatabase.clear_state,
        }
        named: Mapping[Endpoint, tuple[str, Callable[..., Row]]] = {
            endpoints.ORG: ("an org", lists.org),
            endpoints.DEFINITION: ("a definition", lists.definition),
            endpoints.STATE: ("a state", lists.state),
        }
        self._handlers: Mapping[Endpoint, Handler] = {
            **{one: functools.partial(self._list, listing) for one, listing in LIST_ENDPOINTS.items()},
            **{one: functools.partial(self._change, one, change) for one, change in changes.items()},
            **{one: functools.partial(self._show, one, *read) for one, read in named.items()},
            endpoints.OVERVIEW: self._overview,
            endpoints.USAGE: self._usage,
            endpoints.COSTS: self._costs,
            endpoints.BUDGETS: self._budgets,
            endpoints.RAISE: self._raise,
            endpoints.NEXT: self._next,
            endpoints.ADD_CREDENTIAL: self._add_credential,
            endpoints.RETIRE_CREDENTIAL: self._retire_credential,
            endpoints.RUN: self._run,
            endpoints.WHY: self._why,
            endpoints.ATTEMPTS: functools.partial(self._run, part="attempts"),
            endpoints.LOGS: self._logs,
            endpoints.EVENTS: watch,
            endpoints.RETRY_MANY: functools.partial(self._many, endpoints.RETRY_MANY),
            endpoints.CANCEL_MANY: functools.partial(self._many, endpoints.CANCEL_MANY),
            endpoints.EDIT: self._edit,
            endpoints.RUN_NOW: self._run_now,
            endpoints.BACKFILL: self._backfill,
            endpoints.ROLLOUT_LIST: functools.partial(self._rollout, _every_rollout),
            endpoints.ROLLOUT: functools.partial(self._rollout, rollout),
            endpoints.ROLLOUT_PLAN: functools.partial(self._rollout, _planned_steps),
            endpoints.ADVANCE_ROLLOUT: self._advance_rollout,
            **{
                endpoint: functools.partial(self._move_rollout, verb, endpoint)
                for verb, endpoint in endpoints.ROLLOUT_MOVES.items()
            },
            endpoints.DOCUMENT: self._document,
        }

    def routes(self) -> Sequence[Route]:
        """One route for each path: a method that a path does not have answers 405 with the others."""
        by_path: dict[str, dict[str, Handler]] = {}
        for endpoint, handler in self._handlers.items():
            by_path.setdefault(endpoint.path, {})[endpoint.method] = handler
        return [
            Route(f"{BASE}{path}", _by_method(methods), methods=list(methods))
            for path, methods in by_path.items()
        ]

    async def answer(
        self, endpoint: Endpoint, caller: Caller, names: Mapping[str, str], query: Mapping[str, str]
    ) -> Response:
        """The answer to a GET of an endpoint, with the parts of its path and a query; raises WorkerError."""
        scope = {
            "type": "http",
            "method": "GET",
            "path": BASE + endpoint.path,
            "query_string": urlencode(query).encode(),
            "headers": [],
            "path_params": names,
            "caller": caller,
        }
        return await self._handlers[endpoint](Request(scope))

    async def _list(self, listing: Listing[Any], request: Request) -> Response:
        given, caller = query_of(request, parameters_of(listing), listing.name), caller_of(request)

        def work(connection: Connection) -> Response:
            rows, last = read_list(connection, listing, caller, given, self._clock)
            query = urlencode({**given, "after": last})
            link = {} if last is None else {"link": f'<{request.url.path}?{query}>; rel="next"'}
            return fresh(request, json_response(rows, headers=link))

        return await self._database.read(caller, work)

    async def _change(
        self, endpoint: Endpoint, change: Callable[..., Awaitable[Row]], request: Request
    ) -> Response:
        """Change what the path names, with the members of the body."""
        body, caller = await body_of(request, endpoint), caller_of(request)
        return _changed(
            endpoint, caller, await change(self._database, caller, *request.path_params.values(), **body)
        )

    async def _show(
        self, endpoint: Endpoint, what: str, read: Callable[..., Row], request: Request
    ) -> Response:
        """What the org and the name in the path name."""
        caller, names = caller_of(request), request.path_params
        caller.scope(names["org"])
        query_of(request, (), what)

        def work(connection: Connection) -> Response:
            return _fresh(request, endpoint, caller, read(connection, *names.values()))

        return await self._database.read(caller, work)

    async def _overview(self, request: Request) -> Response:
        caller = caller_of(request)
        if caller.org is not None:
            raise AccessDenied("what needs attention over all orgs is for operators", fix="GET /runs")
        query_of(request, (), "status")
        now = self._clock.now()

        def work(connection: Connection) -> Response:
            is_admin = caller.role == "admin"
            found = overview(connection, now, installation=self._installation, is_admin=is_admin)
            return json_response(found)

        return await self._database.read(caller, work)

    async def _usage(self, request: Request) -> Response:
        caller = caller_of(request)
        given = query_of(request, [one.name for one in endpoints.USAGE.query], "usage")
        org = caller.scope(given.get("org"))
        since, until = (
            parse_time(given[name], self._clock, name=name) if name in given else None
            for name in ("since", "until")
        )

        def work(connection: Connection) -> Response:
            rows = usage(
                connection,
                org,
                given.get("by", "meter"),
                since=since,
                until=until,
                limit=limit_of(given),
                after=given.get("after"),
                with_money=caller.org is None or self._org_usage,
            )
            return fresh(request, json_response([caller.sees(Usage, row) for row in rows]))

        return await self._database.read(caller, work)

    async def _costs(self, request: Request) -> Response:
        caller = caller_of(request)
        given = query_of(request, [one.name for one in endpoints.COSTS.query], "costs")
        org = caller.scope(given.get("org"))
        if caller.org is not None and not self._org_usage:
            raise AccessDenied(
                "costs are for operators", fix="an operator can show orgs theirs: [web] org_usage"
            )
        since, until = (
            parse_time(given[name], self._clock, name=name) if name in given else None
            for name in ("since", "until")
        )

        def work(connection: Connection) -> Response:
            rows = costs(
                connection,
                org,
                given.get("by", "org"),
                since=since,
                until=until,
                limit=limit_of(given),
                after=given.get("after"),
            )
            return fresh(request, json_response([caller.sees(ModelCost, row) for row in rows]))

        return await self._database.read(caller, work)

    async def _budgets(self, request: Request) -> Response:
        caller, org = caller_of(request), request.path_params["org"]
        caller.scope(org)
        if caller.org is not None:
            raise AccessDenied("budgets are for operators", fix="GET /usage has what your org spent")
        query_of(request, (), "budgets")

        def work(connection: Connection) -> Response:
            return json_response([caller.sees(BudgetLevel, row) for row in budgets_of(connection, org)])

        return await self._database.read(caller, work)

    async def _raise(self, request: Request) -> Response:
        body, caller = await body_of(request, endpoints.RAISE), caller_of(request)
        until = parse_time(body.pop("until"), self._clock, name="until") if "until" in body else None
        what = {"per": "day", **body, "until": until}
        row = await self._database.raise_budget(caller, request.path_params["org"], **what)
        return _changed(endpoints.RAISE, caller, row)

    async def _add_credential(self, request: Request) -> Response:
        caller, org = caller_of(request), request.path_params["org"]
        # Before anything is read: only an admin's text reaches the key ring.
        caller.scope(org)
        caller.require_may("credentials")
        query_of(request, (), "a new credential")
        body = await body_of(request, endpoints.ADD_CREDENTIAL)
        if ("client_secret" in body) == ("reference" in body):
            raise UsageError(
                "the body needs client_secret or reference, one of the two",
                fix="give the secret, or the name of its file in secrets_dir",
            )
        secret = body.pop("client_secret", None)
        row = await self._database.add_credential(caller, org, secret=secret, **body)
        return json_response(caller.sees(CredentialRow, row), 201)

    async def _retire_credential(self, request: Request) -> Response:
        await body_of(request, endpoints.RETIRE_CREDENTIAL)
        caller, org = caller_of(request), request.path_params["org"]
        generation = request.path_params["generation"]
        if not _GENERATION.fullmatch(generation):
            caller.scope(org)
            raise NotFound(
                f"{generation!r:.80} is not a generation", fix="use a number that GET /credentials lists"
            )
        row = await self._database.retire_credential(caller, org, int(generation))
        return json_response(caller.sees(CredentialRow, row))

    async def _run(self, request: Request, part: str | None = None) -> Response:
        caller, run = caller_of(request), request.path_params["run"]
        query_of(request, (), "a run")

        def work(connection: Connection) -> Response:
            check_started(connection, caller, run)
            found = runs.run(connection, caller.scope(), run)
            row = caller.reader_of(found["org"]).sees(RunDetail, found)
            return json_response(row if part is None else row[part])

        return await self._database.read(caller, work)

    async def _why(self, request: Request) -> Response:
        caller, run_id = caller_of(request), request.path_params["run"]
        query_of(request, (), "a run")

        def work(connection: Connection) -> Response:
            run = caller.sees(RunDetail, runs.run(connection, caller.scope(), run_id))
            found = explain(connection, run, across_orgs=caller.org is None)
            return json_response(caller.sees(Explanation, row_of(found)))

        return await self._database.read(caller, work)

    async def _logs(self, request: Request) -> Response:
        given = query_of(request, [one.name for one in endpoints.LOGS.query], "a log")
        caller, newest = caller_of(request), flag_of(given, "newest")
        if newest and "after" in given:
            raise UsageError("newest and after exclude each other", fix="leave one of them out")
        after = log_place(given.get("after", "0.0"))
        limit = limit_of(given) or MAX_LIMIT

        def work(connection: Connection) -> Response:
            run = require_run(connection, request.path_params["run"], caller.org)
            if newest:
                lines = runs.newest_lines(connection, caller.scope(), run["id"], limit=limit)
            else:
                lines = runs.lines(connection, caller.scope(), run["id"], after=after, limit=limit)
            return json_response([caller.sees(LogRow, line) for line in lines])

        return await self._database.read(caller, work)

    async def _next(self, request: Request) -> Response:
        caller, (org, name) = caller_of(request), _named(request)
        caller.scope(org)
        given = query_of(request, [one.name for one in endpoints.NEXT.query], "a preview")
        start = parse_time(given["from"], self._clock, name="from") if "from" in given else None
        count = limit_of(given, "count") or 10

        def work(connection: Connection) -> Response:
            row = lists.definition(connection, org, name)
            serial = runs.unfinished(connection, org, row["id"])
            return json_response(preview_definition(row, serial, start, count, now=database_now(connection)))

        return await self._database.read(caller, work)

    async def _many(self, endpoint: Endpoint, request: Request) -> Response:
        body, caller = await body_of(request, endpoint), caller_of(request)
        many = Many(parsed(body.pop("q"), now=self._clock.now(), keys=caller.search_keys), **body)
        done = await self._database.change_many(
            caller, "retry" if endpoint is endpoints.RETRY_MANY else "cancel", many
        )
        return json_response(caller.sees(Bulk, done))

    async def _edit(self, request: Request) -> Response:
        changes, caller = await body_of(request, endpoints.EDIT), caller_of(request)
        reason, revision = changes.pop("reason", None), _revision(request)
        row = await self._database.edit(caller, *_named(request), changes, revision=revision, reason=reason)
        return _fresh(request, endpoints.EDIT, caller, row)

    async def _run_now(self, request: Request) -> Response:
        body, caller = await body_of(request, endpoints.RUN_NOW), caller_of(request)
        key = request.headers.get("idempotency-key")
        if "not_before" in body:
            body["not_before"] = parse_time(body["not_before"], self._clock, name="not_before")
        started = await self._database.start(caller, *_named(request), request_key=key, **body)
        reader = caller.reader_of(started.run["org"])
        answer = _changed(endpoints.RUN_NOW, reader, started.run)
        if started.replayed is not None:
            answer.headers[endpoints.REPLAYED] = f"{started.replayed}-params"
        return answer

    async def _backfill(self, request: Request) -> Response:
        body, caller = await body_of(request, endpoints.BACKFILL), caller_of(request)
        start, until = (parse_time(body[name], self._clock, name=name) for name in ("from", "until"))
        what = {"start": start, "until": until, "limit": body.get("limit", 1)}
        if body.get("dry_run"):
            plan = await self._database.planned_backfill(caller, *_named(request), **what)
            return json_response(caller.sees(PlannedBackfill, plan))
        what["reason"] = body.get("reason")
        row = await self._database.backfill(caller, *_named(request), **what)
        return json_response(caller.sees(Backfill, row))

    async def _rollout(self, read: Callable[..., Any], request: Request) -> Response:
        """What a rollout's path names; for operators."""
        caller, names = caller_of(request), request.path_params
        if caller.org is not None:
            raise AccessDenied("rollouts are for operators", fix="GET /runs has your runs")
        query_of(request, (), "rollouts")
        return await self._database.read(
            caller, lambda connection: json_response(read(connection, *names.values()))
        )

    async def _advance_rollout(self, request: Request) -> Response:
        body, caller = await body_of(request, endpoints.ADVANCE_ROLLOUT), caller_of(request)
        row = await self._database.advance_rollout(caller, request.path_params["rollout"], **body)
        return json_response(row)

    async def _move_rollout(self, verb: str, endpoint: Endpoint, request: Request) -> Response:
        body, caller = await body_of(request, endpoint), caller_of(request)
        row = await self._database.move_rollout(caller, request.path_params["rollout"], verb, **body)
        return json_response(row)

    async def _document(self, request: Request) -> Response:
        query_of(request, (), "the document")
        return fresh(request, json_response(document()))


def _every_rollout(connection: Connection) -> list[RolloutRow]:
    return lists.read(connection, ROLLOUTS, ALL_ORGS, Page(limit=MAX_LIMIT))


def _planned_steps(connection: Connection, name: str) -> list[PlannedStepRow]:
    return ROLLOUT_MOVES.require().plan_steps(connection, name)


def _by_method(handlers: Mapping[str, Handler]) -> Handler:
    """A handler that chooses by the method; HEAD is answered as GET, and the server drops the body."""
    if len(handlers) == 1:
        [only] = handlers.values()
        return only

    async def choose(request: Request) -> Response:
        return await handlers["GET" if request.method == "HEAD" else request.method](request)

    return choose


def read_list(
    connection: Connection, listing: Listing[Any], caller: Caller, given: Mapping[str, str], clock: Clock
) -> tuple[list[Row], str | None]:
    """A page of a list as this caller sees it, and its last id if more rows may follow.

    Raises:
        AccessDenied: the caller has a lesser role.
        NotFound: the org does not exist, at least for this caller; or `after` is not an id.
        UsageError: an invalid value.
    """
    # An org may read its own credentials and audit.
    if caller.org is None and listing.admin_only:
        caller.require("admin")
    org = caller.scope(given.get("org"))
    since = given.get("since")
    words = parsed(given["q"], now=clock.now(), keys=caller.search_keys) if "q" in given else None
    page = Page(
        definition=given.get("definition"),
        state=given.get("state"),
        since=None if since is None else parse_time(since, clock, name="since"),
        limit=limit_of(given),
        after=lists.place_of(connection, listing, org, given.get("after")),
        query=of_pool(words, given.get("pool")),
        broken=flag_of(given, "broken"),
        late=flag_of(given, "late"),
    )
    found = lists.page_of(connection, listing, org, page)
    return [caller.sees(listing.row, row) for row in found.rows], found.next


def _named(request: Request) -> tuple[str, str]:
    return request.path_params["org"], request.path_params["name"]


def _revision(request: Request) -> int | None:
    """The revision in `If-Match`, None without it or for `*`; raises PreconditionFailed for anything else."""
    given = request.headers.get("if-match", "*").strip()
    if given == "*":
        return None
    found = _REVISION.fullmatch(given)
    if found is None:
        raise PreconditionFailed(
            "If-Match is not the ETag of a definition", fix="send the ETag of the GET of the same address"
        )
    return int(found[1])


def _fresh(request: Request, endpoint: Endpoint, caller: Caller, row: Row) -> Response:
    """The row, with an ETag that names the revision of a definition."""
    prefix = f"{row['revision']}-" if endpoint.answer is DefinitionDetail else ""
    return fresh(request, json_response(caller.sees(endpoint.answer, row)), prefix=prefix)


def _changed(endpoint: Endpoint, caller: Caller, row: Row) -> Response:
    """The changed row; for a new run also its address."""
    headers = {"location": f"{BASE}/runs/{row['id']}"} if "Location" in endpoint.returns else {}
    return json_response(caller.sees(endpoint.answer, row), endpoint.status, headers)
