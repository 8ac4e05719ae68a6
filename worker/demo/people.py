"""People of the development provider: a login page, the authorization code flow with PKCE, and logout."""

from __future__ import annotations

import base64
import hashlib
import html
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlencode

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from worker.clock import Clock

# Seconds for which a code is valid.
CODE_LASTS = 60.0


@dataclass(frozen=True, slots=True)
class Person:
    """A person who can log in: as a member of one org, with its permissions there."""

    sub: str
    name: str
    email: str
    org_code: str
    permissions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WebApplication:
    """An application that people log in to, with its exact redirect URLs."""

    client_id: str
    client_secret: str = field(repr=False)
    redirect_uris: tuple[str, ...] = ()
    logout_uris: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Granted:
    """What a code stands for."""

    person: Person
    request: Mapping[str, str]
    issued_at: float


NO_STORE = {"Cache-Control": "no-store", "Pragma": "no-cache"}


class TokenRefusal(Exception):
    """An error response to a token request (RFC 6749, section 5.2)."""

    def __init__(self, code: str, description: str, status: int = 400) -> None:
        super().__init__(description)
        self.code = code
        self.description = description
        self.status = status

    def as_response(self) -> JSONResponse:
        body = {"error": self.code, "error_description": self.description}
        return JSONResponse(body, status_code=self.status, headers=NO_STORE)


class People:
    """People, web applications and codes. The page asks for no password: it lists everyone."""

    def __init__(self, url: str, clock: Clock) -> None:
        self._url = url
        self._clock = clock
        self._people: dict[str, Person] = {}
        self._applications: dict[str, WebApplication] = {}
        self._codes: dict[str, Granted] = {}

    def add(self, person: Person) -> None:
        """Add a person, or replace the one with this `sub`."""
        self._people[person.sub] = person

    def add_application(self, application: WebApplication) -> None:
        """Add a web application, or replace the one with its client id."""
        self._applications[application.client_id] = application

    def routes(self) -> list[Route]:
        return [
            Route("/oauth2/auth", self._page),
            Route("/oauth2/auth", self._choose, methods=["POST"]),
            Route("/logout", self._logout),
        ]

    def redeem(self, form: Mapping[str, str]) -> tuple[WebApplication, Granted]:
        """The application and what its code stands for (RFC 6749, section 4.1.3; RFC 7636, 4.6).

        Raises:
            TokenRefusal: the client, the code or its verifier is wrong, or the code was used before.
        """
        application = self._applications.get(form.get("client_id", ""))
        given = form.get("client_secret", "").encode()
        if application is None or not secrets.compare_digest(application.client_secret.encode(), given):
            raise TokenRefusal("invalid_client", "The code cannot be redeemed", 401)
        granted = self._codes.pop(form.get("code", ""), None)
        digest = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
        challenge = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        if (
            granted is None
            or self._now() - granted.issued_at > CODE_LASTS
            or granted.request["client_id"] != application.client_id
            or granted.request["redirect_uri"] != form.get("redirect_uri")
            or granted.request["code_challenge"] != challenge
        ):
            raise TokenRefusal("invalid_grant", "The code cannot be redeemed")
        return application, granted

    def grant(self, person: Person, request: Mapping[str, str]) -> str:
        """A code for this person."""
        code = secrets.token_urlsafe(24)
        self._codes[code] = Granted(person, dict(request), self._now())
        return code

    async def _page(self, request: Request) -> Response:
        wanted = dict(request.query_params)
        if fault := self._fault_of(wanted):
            return HTMLResponse(f"<!doctype html><title>Refused</title><p>{html.escape(fault)}</p>", 400)
        org = wanted.get("org_code")
        people = [person for person in self._people.values() if org in (None, "", person.org_code)]
        return HTMLResponse(_page(people, wanted), headers={"cache-control": "no-store"})

    async def _choose(self, request: Request) -> Response:
        wanted = dict(parse_qsl((await request.body()).decode("utf-8", "replace"), keep_blank_values=True))
        person = self._people.get(wanted.pop("person", ""))
        if fault := self._fault_of(wanted):
            return HTMLResponse(f"<!doctype html><title>Refused</title><p>{html.escape(fault)}</p>", 400)
        answer = {"state": wanted.get("state", ""), "iss": self._url}
        if person is None:
            answer["error"] = "access_denied"
        else:
            answer["code"] = self.grant(person, wanted)
        return RedirectResponse(f"{wanted['redirect_uri']}?{urlencode(answer)}", 303)

    async def _logout(self, request: Request) -> Response:
        """Back to the application, if that address is registered."""
        there = request.query_params.get("redirect", "")
        known = {uri for one in self._applications.values() for uri in one.logout_uris}
        if there not in known:
            return HTMLResponse("<!doctype html><title>Logged out</title><p>You are logged out.</p>")
        return RedirectResponse(there, 303)

    def _fault_of(self, wanted: Mapping[str, str]) -> str:
        """Why this authorization request is invalid, or nothing."""
        application = self._applications.get(wanted.get("client_id", ""))
        if application is None:
            return "unknown client_id"
        if wanted.get("redirect_uri") not in application.redirect_uris:
            return "redirect_uri is not registered"
        if wanted.get("response_type") != "code" or "openid" not in wanted.get("scope", "").split():
            return "response_type must be code, and scope must have openid"
        if wanted.get("code_challenge_method") != "S256" or len(wanted.get("code_challenge", "")) != 43:
            return "PKCE with S256 is required"
        return ""

    def _now(self) -> float:
        return self._clock.now().timestamp()


def claims_of(person: Person, request: Mapping[str, str]) -> dict[str, Any]:
    """What an ID token says about a person."""
    nonce = request.get("nonce")
    return asdict(person) | {"permissions": list(person.permissions)} | ({"nonce": nonce} if nonce else {})


def _page(people: Iterable[Person], wanted: Mapping[str, str]) -> str:
    hidden = "".join(
        f'<input type="hidden" name="{html.escape(name)}" value="{html.escape(value)}">'
        for name, value in wanted.items()
        if name != "person"
    )
    buttons = "".join(
        f'<p><button name="person" value="{html.escape(person.sub)}">{html.escape(person.name)}, '
        f"{html.escape(person.org_code)}</button></p>"
        for person in people
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<title>Development provider</title></head><body><main><h1>Who are you?</h1>"
        f'<form method="post" action="/oauth2/auth">{hidden}{buttons}'
        '<p><button name="person" value="">Cancel</button></p></form></main></body></html>'
    )
