"""The dashboard: HTML pages that run no script and load nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup
from sqlalchemy import Connection
from starlette.requests import HTTPConnection, Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Scope

from worker.clock import Clock, to_text
from worker.errors import TokenError
from worker.ids import ALL_ORGS
from worker.store.lists import DEFINITIONS, ORGS, RUNS, Definition, Org, OrgDetail, Page, Run
from worker.store.lists.read import org, read
from worker.telemetry.events import emit
from worker.web.access import RANK, Access, CallerDatabase
from worker.web.api import caller_of, shown_lines, shown_run, single
from worker.web.sessions import (
    LOGIN,
    LOGIN_COOKIE,
    SESSION_COOKIE,
    Forms,
    Session,
    Sessions,
    in_api,
)

_FOLDER = Path(__file__).with_name("templates")
_CSS = (_FOLDER / "style.css").read_text(encoding="utf-8")
_CSS_HASH = base64.b64encode(hashlib.sha256(_CSS.encode()).digest()).decode()
_HEADERS = {
    "content-security-policy": f"default-src 'none'; style-src 'sha256-{_CSS_HASH}'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
}


def _time(value: datetime | None) -> str:
    return "" if value is None else to_text(value)[:19].replace("T", " ") + " UTC"


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


_templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_FOLDER),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
)
_templates.filters |= {"time": _time, "pretty": _pretty}
_templates.globals |= {"css": Markup(_CSS), "caller": None, "session": None}  # noqa: S704 - a file of ours


def page(template: str, status: int = 200, **values: Any) -> Response:
    """Render a page; every value is escaped."""
    body = _templates.get_template(template).render(values)
    return Response(body, status, _HEADERS, media_type="text/html")


ROWS = 25
LINES = 500
RECENT = timedelta(days=1)


class Dashboard:
    """Pages for a session, which can change runs, or for a bearer token, which can only read."""

    def __init__(
        self, database: CallerDatabase, clock: Clock, access: Access, sessions: Sessions, forms: Forms
    ) -> None:
        self._database = database
        self._clock = clock
        self._access = access
        self._sessions = sessions
        self._forms = forms

    def routes(self) -> Sequence[Route]:
        return (
            Route("/", self._overview),
            Route("/orgs/{org}", self._org),
            Route("/runs/{run}", self._run),
            Route("/runs/{run}/cancel", self._cancel, methods=["POST"]),
            Route("/runs/{run}/retry", self._retry, methods=["POST"]),
            Route("/orgs/{org}/definitions/{name}/run", self._run_now, methods=["POST"]),
            Route(LOGIN, self._login, methods=["POST"]),
            Route("/logout", self._logout, methods=["POST"]),
        )

    async def _overview(self, request: Request) -> Response:
        caller = caller_of(request)
        if caller.org is not None:
            return RedirectResponse(f"/orgs/{quote(caller.org, safe='')}", 303)
        after = single(request).get("after")
        since = self._clock.now() - RECENT

        def work(connection: Connection) -> dict[str, Any]:
            def latest(state: str, since: datetime | None) -> list[Run]:
                return read(connection, RUNS, ALL_ORGS, Page(state=state, since=since, limit=ROWS))

            orgs = read(connection, ORGS, ALL_ORGS, Page(limit=ROWS, after=after))
            recent = {state: latest(state, since) for state in ("failed", "refused")}
            return {"orgs": orgs, "next": _next(orgs), **recent, "running": latest("running", None)}

        return await self._show(request, "overview.html", work)

    async def _org(self, request: Request) -> Response:
        caller, code = caller_of(request), request.path_params["org"]
        scope, after = caller.scope(code), single(request).get("after")

        def work(connection: Connection) -> dict[str, Any]:
            runs = read(connection, RUNS, scope, Page(limit=ROWS, after=after))
            definitions = read(connection, DEFINITIONS, scope)
            return {
                "org": caller.sees(OrgDetail, org(connection, code)),
                "definitions": [caller.sees(Definition, row) for row in definitions],
                "runs": [caller.sees(Run, row) for row in runs],
                "next": _next(runs),
            }

        return await self._show(request, "org.html", work)

    async def _run(self, request: Request) -> Response:
        caller = caller_of(request)

        def work(connection: Connection) -> dict[str, Any]:
            run = shown_run(connection, caller, request.path_params["run"])
            return {"run": run, "lines": shown_lines(connection, caller, run["id"], limit=LINES)}

        return await self._show(request, "run.html", work)

    async def _cancel(self, request: Request) -> Response:
        await self._checked_form(request)
        return _to_run(await self._database.cancel(caller_of(request), request.path_params["run"]))

    async def _retry(self, request: Request) -> Response:
        await self._checked_form(request)
        return _to_run(await self._database.retry(caller_of(request), request.path_params["run"]))

    async def _run_now(self, request: Request) -> Response:
        await self._checked_form(request)
        org, name = request.path_params["org"], request.path_params["name"]
        return _to_run(await self._database.run_now(caller_of(request), org, name))

    async def _login(self, request: Request) -> Response:
        # First, so that forms sent by another site's page use up none of its visitor's logins.
        self._forms.check_origin(request)
        self._access.count_login(request)
        token = (await self._forms.read(request, LOGIN_COOKIE)).get("token", "").strip()
        caller = await self._access.log_in(token, request)
        session = self._sessions.begin(caller)
        emit("web.login", caller=caller.actor, role=caller.role)
        response = RedirectResponse("/", 303)
        self._forms.set_cookie(request, response, SESSION_COOKIE, session.key)
        self._forms.set_cookie(request, response, LOGIN_COOKIE, None)
        return response

    async def _logout(self, request: Request) -> Response:
        self._sessions.end(await self._checked_form(request))
        response = RedirectResponse("/", 303)
        self._forms.set_cookie(request, response, SESSION_COOKIE, None)
        return response

    async def _checked_form(self, request: Request) -> Session:
        """The session whose page sent this form; raises TokenError without one, or as `Forms.read`."""
        session: Session | None = request.scope.get("session")
        if session is None:
            raise TokenError("log in first", fix="open / and log in, or send Authorization: Bearer TOKEN")
        await self._forms.read(request, SESSION_COOKIE)
        return session

    def error_page(self, scope: Scope, status: int, message: str, fix: str) -> Response | None:
        """An error page, or the login page for 401; None if a program sent the request."""
        if in_api(scope):
            return None
        if status != 401:
            return page("error.html", status, code=status, message=message, fix=fix)
        connection = HTTPConnection(scope)
        nonce = self._forms.login_nonce(connection)
        tried, csrf = scope["path"] == LOGIN, self._forms.csrf(nonce)
        response = page("login.html", status, message=message, tried=tried, csrf=csrf)
        self._forms.set_cookie(connection, response, LOGIN_COOKIE, nonce)
        return response

    async def _show(
        self, request: Request, template: str, work: Callable[[Connection], dict[str, Any]]
    ) -> Response:
        """Read and render in a database thread: a large page must not delay the loop."""
        caller, session = caller_of(request), request.scope.get("session")
        values: dict[str, Any] = {
            "caller": caller,
            "session": session,
            "csrf": self._forms.csrf(session.key) if session else None,
            "may_act": session is not None and RANK[caller.role] >= RANK["operator"],
        }

        def rendered(connection: Connection) -> Response:
            return page(template, **values, **work(connection))

        return await self._database.read(caller, rendered)


def _next(rows: Sequence[Org] | Sequence[Run]) -> str | None:
    return rows[-1]["id"] if len(rows) == ROWS else None


def _to_run(row: Run) -> Response:
    return RedirectResponse(f"/runs/{row['id']}", 303)
