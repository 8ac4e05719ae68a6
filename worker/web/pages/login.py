"""Logging in by a token, and logging out."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import HTTPConnection, Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Scope

from worker.telemetry.events import emit
from worker.web.pages.base import Pages
from worker.web.pages.rendering import page
from worker.web.sessions import LOGIN, LOGIN_COOKIE, SESSION_COOKIE


class LoginPages:
    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def routes(self) -> Sequence[Route]:
        return (
            Route(LOGIN, self._login, methods=["POST"]),
            Route("/logout", self._logout, methods=["POST"]),
        )

    async def _login(self, request: Request) -> Response:
        forms, access = self._pages.forms, self._pages.access
        # First, so that forms sent by another site's page use up none of its visitor's logins.
        forms.check_origin(request)
        access.count_login(request)
        token = (await forms.read(request, LOGIN_COOKIE)).get("token", "").strip()
        caller = await access.log_in(token, request)
        session = await self._pages.sessions.begin(caller)
        emit("web.login", caller=caller.actor, role=caller.role)
        response = RedirectResponse("/", 303)
        forms.set_cookie(request, response, SESSION_COOKIE, session.key)
        forms.set_cookie(request, response, LOGIN_COOKIE, None)
        return response

    async def _logout(self, request: Request) -> Response:
        session, _ = await self._pages.checked_form(request)
        await self._pages.sessions.end(session)
        response = RedirectResponse("/", 303)
        self._pages.forms.set_cookie(request, response, SESSION_COOKIE, None)
        return response

    def page(self, scope: Scope, message: str) -> Response:
        """The login page, in place of a page that needs a caller."""
        connection = HTTPConnection(scope)
        nonce = self._pages.forms.login_nonce(connection)
        tried, csrf = scope["path"] == LOGIN, self._pages.forms.csrf(nonce)
        response = page("login.html", 401, message=message, tried=tried, csrf=csrf)
        self._pages.forms.set_cookie(connection, response, LOGIN_COOKIE, nonce)
        return response
