"""The development provider: an OAuth issuer with Kinde's tokens, whose faults tests control.

It shares no code with what it tests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import secrets
import signal
import sys
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from worker.clock import Clock, SystemClock
from worker.demo.keys import KeyRotation
from worker.demo.management import Application, ManagementApi
from worker.demo.people import NO_STORE, People, Person, TokenRefusal, WebApplication, claims_of
from worker.demo.serving import ServerThread, bind_loopback, url_of
from worker.guard.urls import is_loopback

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fault:
    """How the token endpoint misbehaves towards a client; the defaults are correct behaviour.

    `replace` and `drop` change claims just before signing (another org, issuer or audience; no
    org). `age` backdates the token by that many seconds, so that it may have expired. `forged`
    signs with an unpublished key under a known kid. `status`, with `headers` and `body`, replaces
    the token response. `delay` is in seconds. `times` is the number of requests that the fault
    affects; None is unlimited.
    """

    replace: Mapping[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    age: int = 0
    lifetime: int | None = None
    forged: bool = False
    typ: str = "JWT"
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str | None = None
    delay: float = 0.0
    times: int | None = None


def parse(kind: type[T], data: Mapping[str, Any]) -> T:
    """An Application or a Fault; raises ValueError for an unknown or a missing key."""
    known = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(data) - known):
        raise ValueError(f"unknown keys: {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    try:
        return kind(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        )
    except TypeError as error:
        raise ValueError(str(error)) from None


async def failed(fault: Fault) -> Response | None:
    """Wait as the fault says, and return its response, if it has one."""
    if fault.delay:
        await asyncio.sleep(fault.delay)
    if fault.status is None:
        return None
    return Response(fault.body or "", status_code=fault.status, headers=dict(fault.headers))


class Provider:
    """The provider's applications, keys, faults and counters; `asgi()` serves it.

    `issued` holds the newest tokens, so that a test can search for leaks.
    """

    def __init__(
        self, url: str, applications: Iterable[Application] = (), *, clock: Clock | None = None
    ) -> None:
        self.url = url
        self.keys = KeyRotation()
        self.applications = {app.client_id: app for app in applications}
        self.faults: dict[str, Fault] = {}
        self.requests: Counter[str] = Counter()
        self.token_requests: Counter[str] = Counter()
        self.issued: deque[str] = deque(maxlen=10_000)
        self.jwks_fault: Fault | None = None
        self._clock = clock or SystemClock()
        self.people = People(url, self._clock)
        self.management = ManagementApi(url, self.keys, self.applications, self._clock)

    def add(self, application: Application) -> None:
        """Add an application, or replace the one with its client id."""
        self.applications[application.client_id] = application

    def misbehave(self, fault: Fault | None, client_id: str = "*") -> None:
        """Set the fault of a client, or with `*` of all clients without one; None removes it."""
        if fault is None:
            self.faults.pop(client_id, None)
        else:
            self.faults[client_id] = fault

    def asgi(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/oauth2/token", self._token, methods=["POST"]),
                Route("/.well-known/openid-configuration", self._discovery),
                Route("/.well-known/jwks", self._jwks),
                *self.people.routes(),
                *self.management.routes(),
                Mount("/control", routes=control_routes(self)),
            ]
        )

    async def _token(self, request: Request) -> Response:
        self.requests["token"] += 1
        fields = dict(parse_qsl((await request.body()).decode("utf-8", "replace")))
        client_id = fields.get("client_id", "")
        self.token_requests[client_id] += 1
        fault = self._take_fault(client_id)
        if failure := await failed(fault):
            return failure
        try:
            grant = self._grant_code if fields.get("grant_type") == "authorization_code" else self._grant
            return JSONResponse(grant(fields, fault), headers=NO_STORE)
        except TokenRefusal as refusal:
            return refusal.as_response()

    def _take_fault(self, client_id: str) -> Fault:
        """The fault for this request; one with `times` is counted down."""
        key = client_id if client_id in self.faults else "*"
        fault = self.faults.get(key)
        if fault is None:
            return Fault()
        if fault.times is not None:
            left = fault.times - 1
            self.misbehave(replace(fault, times=left) if left > 0 else None, key)
        return fault

    def _grant(self, fields: Mapping[str, str], fault: Fault) -> dict[str, Any]:
        """The token response; raises TokenRefusal."""
        if fields.get("grant_type") != "client_credentials":
            raise TokenRefusal("unsupported_grant_type", "grant_type must be client_credentials")
        app = self.applications.get(fields.get("client_id", ""))
        if app is None or not app.accepts(fields.get("client_secret", "")):
            raise TokenRefusal("invalid_client", "Client authentication failed", 401)
        resource = fields.get("resource")
        audience = resource or fields.get("audience")
        if not audience:
            raise TokenRefusal("invalid_request", "The request is missing the parameter audience")
        if audience not in app.audiences:
            if resource:
                raise TokenRefusal("invalid_target", f"Not authorized for resource '{resource}'")
            raise TokenRefusal("unauthorized_client", f"Not authorized for audience '{audience}'")
        scopes = tuple(fields.get("scope", "").split()) or app.scopes
        if foreign := [scope for scope in scopes if scope not in app.scopes]:
            raise TokenRefusal("invalid_scope", f"Not allowed to request scope '{foreign[0]}'")
        return {
            "access_token": self._sign(self._claims(app, audience, scopes, fault), fault),
            "expires_in": app.lifetime if fault.lifetime is None else fault.lifetime,
            "scope": " ".join(scopes),
            "token_type": "bearer",
        }

    def _grant_code(self, fields: Mapping[str, str], fault: Fault) -> dict[str, Any]:
        """The tokens of a person; raises TokenRefusal."""
        application, granted = self.people.redeem(fields)
        issued_at = int(self._clock.now().timestamp()) - fault.age
        lifetime = 3600 if fault.lifetime is None else fault.lifetime
        common = {
            "iss": self.url,
            "azp": application.client_id,
            "iat": issued_at,
            "exp": issued_at + lifetime,
            "auth_time": issued_at,
            **claims_of(granted.person, granted.request),
        }
        audience = granted.request.get("audience")
        both = {
            "id_token": common | {"aud": [application.client_id]},
            "access_token": common | {"aud": [audience] if audience else [], "jti": secrets.token_hex(16)},
        }
        body: dict[str, Any] = {"expires_in": lifetime, "token_type": "bearer"}
        for name, claims in both.items():
            body[name] = self._sign(claims, fault)
        return body

    def _sign(self, claims: Mapping[str, Any], fault: Fault) -> str:
        """A token with these claims, changed as the fault says."""
        kept = {name: value for name, value in claims.items() if name not in fault.drop}
        token = self.keys.sign(kept | dict(fault.replace), typ=fault.typ, forged=fault.forged)
        self.issued.append(token)
        return token

    def _claims(self, app: Application, audience: str, scopes: Sequence[str], fault: Fault) -> dict[str, Any]:
        issued_at = int(self._clock.now().timestamp()) - fault.age
        lifetime = app.lifetime if fault.lifetime is None else fault.lifetime
        return {
            "aud": [audience],
            "azp": app.client_id,
            "exp": issued_at + lifetime,
            "gty": ["client_credentials"],
            "iat": issued_at,
            "iss": self.url,
            "jti": secrets.token_hex(16),
            "scope": " ".join(scopes),
            "scp": list(scopes),
            "v": "2",
            **app.as_claims(),
        }

    async def _discovery(self, request: Request) -> Response:
        self.requests["discovery"] += 1
        return JSONResponse(
            {
                "issuer": self.url,
                "authorization_endpoint": f"{self.url}/oauth2/auth",
                "token_endpoint": f"{self.url}/oauth2/token",
                "end_session_endpoint": f"{self.url}/logout",
                "jwks_uri": f"{self.url}/.well-known/jwks",
                "grant_types_supported": ["client_credentials", "authorization_code"],
                "response_types_supported": ["code"],
                "code_challenge_methods_supported": ["S256"],
                "token_endpoint_auth_methods_supported": ["client_secret_post"],
                "id_token_signing_alg_values_supported": ["RS256"],
            }
        )

    async def _jwks(self, request: Request) -> Response:
        self.requests["jwks"] += 1
        failure = await failed(self.jwks_fault or Fault())
        return failure or JSONResponse(self.keys.as_jwks())


Endpoint = Callable[[Request], Awaitable[Response]]


def guarded(endpoint: Endpoint) -> Endpoint:
    """Respond with 403 to requests that do not come over loopback, and with 400 to a malformed body."""

    async def answer(request: Request) -> Response:
        client = request.client.host if request.client else ""
        if not is_loopback(client) or not is_loopback(request.url.hostname or ""):
            return JSONResponse({"error": "loopback only"}, status_code=403)
        try:
            return await endpoint(request)
        except (ValueError, TypeError) as error:
            return JSONResponse({"error": str(error)}, status_code=400)

    return answer


async def read_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object; an empty body counts as {}."""
    data = await request.json() if await request.body() else {}
    if not isinstance(data, dict):
        raise ValueError("expected a JSON object")
    return data


def control_routes(provider: Provider) -> list[Route]:
    """The routes under `/control`: a test in another process changes the provider's behaviour with them.

    `GET /` counts and kids · `PUT /apps/{client_id}` an application ·
    `PUT /people/{sub}` a person · `PUT /web-apps/{client_id}` an application that people log in to ·
    `PUT|DELETE /faults/{client_id}` a fault, with `*` for all clients and `jwks`
    for the key set · `POST /rotate` {publish, retire} · `POST /publish`.

    They answer only on loopback and only requests that name a loopback host, so that a web page
    cannot reach them through a DNS name of its own.
    """

    async def show(request: Request) -> Response:
        counts = {"requests": dict(provider.requests), "token_requests": dict(provider.token_requests)}
        kids = [key["kid"] for key in provider.keys.as_jwks()["keys"]]
        return JSONResponse(counts | {"kids": kids})

    def put(path: str, kind: type[T], add: Callable[[T], None]) -> Route:
        async def store(request: Request) -> Response:
            add(parse(kind, await read_object(request) | request.path_params))
            return Response(status_code=204)

        return Route(path, guarded(store), methods=["PUT"])

    async def set_fault(request: Request) -> Response:
        name = request.path_params["client_id"]
        fault = parse(Fault, await read_object(request)) if request.method == "PUT" else None
        if name == "jwks":
            provider.jwks_fault = fault
        else:
            provider.misbehave(fault, name)
        return Response(status_code=204)

    async def rotate(request: Request) -> Response:
        return JSONResponse({"kid": provider.keys.rotate(**await read_object(request))})

    async def publish(request: Request) -> Response:
        provider.keys.publish()
        return Response(status_code=204)

    return [
        Route("/", guarded(show)),
        put("/apps/{client_id}", Application, provider.add),
        put("/people/{sub}", Person, provider.people.add),
        put("/web-apps/{client_id}", WebApplication, provider.people.add_application),
        Route("/faults/{client_id}", guarded(set_fault), methods=["PUT", "DELETE"]),
        Route("/rotate", guarded(rotate), methods=["POST"]),
        Route("/publish", guarded(publish), methods=["POST"]),
    ]


def serve_provider(
    applications: Iterable[Application] = (), *, port: int = 0, clock: Clock | None = None
) -> tuple[Provider, ServerThread]:
    """A provider on a loopback port, and the thread that serves it once started. Port 0 picks a free one."""
    listener = bind_loopback(port)
    provider = Provider(url_of(listener), applications, clock=clock)
    return provider, ServerThread(provider.asgi(), listener)


def read_applications(path: str) -> list[Application]:
    """Parse a JSON file: a list of objects with the fields of `Application`."""
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(data, list):
        raise ValueError(f"{path}: expected a list of applications")
    return [parse(Application, item) for item in data]


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve a provider until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m worker.demo.provider", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    parser.add_argument("--orgs", default="", help="JSON file: a list of applications")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    try:
        applications = read_applications(options.orgs) if options.orgs else []
    except (OSError, ValueError) as error:
        print(f"{options.orgs}: {error}", file=sys.stderr)
        return 2
    stops = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    provider, thread = serve_provider(applications, port=options.port)
    with thread:
        print(json.dumps({"url": provider.url}), flush=True)
        signal.sigwait(stops)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
