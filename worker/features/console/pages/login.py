"""Logging in: by a token, at the identity provider, or by a link of this machine's terminal; logging out."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from urllib.parse import urlencode

from starlette.requests import HTTPConnection, Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Scope

from worker.errors import (
    AccessDenied,
    ConfigurationError,
    IssuerUnavailable,
    NotFound,
    TokenError,
    UsageError,
    WorkerError,
)
from worker.features.console.callers import Caller
from worker.features.console.login import Login, local_path, new_login
from worker.features.console.pages.base import Pages, query
from worker.features.console.pages.rendering import error_page, page
from worker.features.console.sessions import LOGIN, LOGIN_COOKIE, SESSION_COOKIE
from worker.guard.urls import is_loopback
from worker.kit.web.responses import wait_headers
from worker.telemetry.events import emit

_ORG = re.compile(r"[A-Za-z0-9_.-]{1,200}")
START = f"{LOGIN}/start"
CALLBACK = f"{LOGIN}/callback"
ONCE = f"{LOGIN}/once/"


class LoginPages:
    """`login` is None where people cannot log in at a provider."""

    def __init__(self, pages: Pages, login: Login | None) -> None:
        self._pages = pages
        self._at_provider = login

    def routes(self) -> Sequence[Route]:
        return (
            Route(LOGIN, self._form),
            Route(LOGIN, self._login, methods=["POST"]),
            Route(START, self._start),
            Route(CALLBACK, self._callback),
            Route(ONCE + "{code}", self._link),
            Route(ONCE + "{code}", self._use_link, methods=["POST"]),
            Route("/logout", self._logout, methods=["POST"]),
        )

    async def _form(self, request: Request) -> Response:
        given = query(request, "return_to", "org")
        org = _org_of(given)
        return self._page(request, 200, return_to=given.get("return_to", "/"), org=org)

    async def _login(self, request: Request) -> Response:
        forms, access = self._pages.forms, self._pages.access
        # First, so that forms sent by another site's page use up none of its visitor's logins.
        forms.check_origin(request)
        access.count_login(request)
        form = await forms.read(request, LOGIN_COOKIE)
        caller = await access.log_in(form.get("token", "").strip(), request)
        return await self._opened(request, caller, form.get("return_to", "/"))

    async def _start(self, request: Request) -> Response:
        """Send the person to the provider. A link, not a form: providers redirect on to further origins."""
        login, forms = self._provider(), self._pages.forms
        given = query(request, "return_to", "org")
        org = _org_of(given)
        self._pages.access.count_login(request)
        begun = new_login(given.get("return_to", "/"))
        browser = forms.login_nonce(request)
        client = self._pages.access.addresses.client_of(request).key
        state = await self._pages.sessions.begun.begin(begun, browser=browser, client=client)
        try:
            url = await login.start(state, begun, self._url_of(request, CALLBACK), org=org)
        except IssuerUnavailable as error:
            return self._unavailable(request, login, error)
        response = RedirectResponse(url, 303)
        forms.set_cookie(request, response, LOGIN_COOKIE, browser)
        return response

    async def _callback(self, request: Request) -> Response:
        # Not counted as a login again: its start was.
        login, forms = self._provider(), self._pages.forms
        parameters = dict(request.query_params)
        browser = forms.cookie(request, LOGIN_COOKIE) or secrets.token_urlsafe(32)
        begun = await self._pages.sessions.begun.use(parameters.get("state", ""), browser=browser)
        try:
            caller = await login.finish(parameters, begun, self._url_of(request, CALLBACK))
            caller = await self._pages.access.confirm(caller)
        except (IssuerUnavailable, ConfigurationError) as error:
            return self._unavailable(request, login, error)
        except (AccessDenied, TokenError) as error:
            emit("web.login_refused", error=error.message)
            if isinstance(error, TokenError):
                # Not 401: the page of an error says what happened, the login page would not.
                raise AccessDenied(error.message, fix=error.fix or "open /login and log in again") from error
            raise
        return await self._opened(request, caller, begun.return_to)

    def _unavailable(self, request: Request, login: Login, error: WorkerError) -> Response:
        """503: the provider does not respond, or the client's secret cannot be read. The log says which."""
        emit("web.login_refused", error=error.message)
        frame, message = self._pages.frame(request.scope), f"{login.title} cannot log you in right now"
        response = error_page(request.scope, frame, 503, message, "log in again in a moment, or with a token")
        response.headers.update(wait_headers(503, error.retry_after))
        return response

    async def _link(self, request: Request) -> Response:
        """A page with a button: a program that only fetches the link does not use it up."""
        self._require_this_machine(request)
        nonce = self._pages.forms.login_nonce(request)
        values = {"code": request.path_params["code"], "csrf": self._pages.forms.csrf(nonce)}
        response = page("login_once.html", **values)
        self._pages.forms.set_cookie(request, response, LOGIN_COOKIE, nonce)
        return response

    async def _use_link(self, request: Request) -> Response:
        self._require_this_machine(request)
        self._pages.forms.check_origin(request)
        self._pages.access.count_login(request)
        await self._pages.forms.read(request, LOGIN_COOKIE)
        name = await self._pages.sessions.begun.use_link(request.path_params["code"])
        return await self._opened(request, Caller(name, "admin", kind="link"), "/")

    async def _opened(self, request: Request, caller: Caller, return_to: str) -> Response:
        """Open a session in place of the browser's former one."""
        forms, sessions = self._pages.forms, self._pages.sessions
        former = await sessions.find(forms.cookie(request, SESSION_COOKIE))
        if former is not None:
            await sessions.end(former)
        session = await sessions.begin(caller)
        emit("web.login", caller=caller.actor, role=caller.role)
        response = RedirectResponse(local_path(return_to), 303)
        forms.set_cookie(request, response, SESSION_COOKIE, session.key)
        forms.set_cookie(request, response, LOGIN_COOKIE, None)
        return response

    async def _logout(self, request: Request) -> Response:
        """Log out here, and for a person also at the provider, unless the form says `here`."""
        session, form = await self._pages.checked_form(request)
        await self._pages.sessions.end(session)
        url = None
        if session.caller.kind == "person" and self._at_provider and "here" not in form:
            url = await self._at_provider.end_url(self._url_of(request, LOGIN))
        response = RedirectResponse(url or "/", 303)
        self._pages.forms.set_cookie(request, response, SESSION_COOKIE, None)
        return response

    def page(self, scope: Scope, message: str) -> Response:
        """The login page, in place of a page that needs a caller."""
        connection = HTTPConnection(scope)
        path, question = scope["path"], scope.get("query_string", b"").decode("latin-1")
        there = f"{path}?{question}" if question else path
        return self._page(
            connection,
            401,
            message=message if path == LOGIN else "",
            return_to=there if scope["method"] == "GET" else "/",
        )

    def _page(
        self,
        connection: HTTPConnection,
        status: int,
        *,
        message: str = "",
        return_to: str = "/",
        org: str = "",
    ) -> Response:
        nonce, return_to = self._pages.forms.login_nonce(connection), local_path(return_to)
        provider = None
        if self._at_provider is not None:
            wishes = {"return_to": return_to if return_to != "/" else "", "org": org}
            question = urlencode({name: value for name, value in wishes.items() if value})
            provider = {
                "title": self._at_provider.title,
                "link": f"{START}?{question}" if question else START,
                "takes_org": self._at_provider.takes_org,
                "org": org,
            }
        response = page(
            "login.html",
            status,
            message=message,
            provider=provider,
            return_to=return_to,
            csrf=self._pages.forms.csrf(nonce),
        )
        self._pages.forms.set_cookie(connection, response, LOGIN_COOKIE, nonce)
        return response

    def _provider(self) -> Login:
        if self._at_provider is None:
            raise NotFound("this console has no login at a provider", fix="log in with a token at /login")
        return self._at_provider

    def _url_of(self, connection: HTTPConnection, path: str) -> str:
        """The address of one of our pages, as registered at the provider."""
        origin = self._pages.forms.public_origin
        if origin is None:
            if not is_loopback(connection.url.hostname or ""):
                raise AccessDenied(
                    "the address of this console is not known, so a provider cannot send you back",
                    fix="set web.public_url in worker.toml to the address that your browser shows",
                )
            origin = f"{connection.url.scheme}://{connection.url.netloc}"
        return origin + path

    def _require_this_machine(self, connection: HTTPConnection) -> None:
        client = self._pages.access.addresses.client_of(connection)
        if not (client.is_local and is_loopback(connection.url.hostname or "")):
            raise AccessDenied(
                "such a link works only on the machine of the worker itself",
                fix="open it there, or log in with a token at /login",
            )


def _org_of(given: Mapping[str, str]) -> str:
    """The org that a person wants to log in to, or empty; raises UsageError."""
    org = given.get("org", "")
    if org and _ORG.fullmatch(org) is None:
        raise UsageError("org is not the code of an org", fix="letters, digits, '_', '-' and '.' only")
    return org
