"""The provider's control endpoint: lets a test in another process flip what the provider does.

It answers on loopback only, and only to requests that name a loopback host, so that
a web page cannot reach it through a name of its own.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from worker.demo.applications import Application, Fault
from worker.demo.keys import KeyRotation


class Controlled(Protocol):
    """What the control endpoint turns."""

    keys: KeyRotation
    applications: dict[str, Application]
    jwks_fault: Fault | None

    def add(self, application: Application) -> None: ...

    def misbehave(self, fault: Fault | None, client_id: str = "*") -> None: ...

    def counts(self) -> dict[str, Any]: ...


Endpoint = Callable[[Request], Awaitable[Response]]


def is_loopback(host: str | None) -> bool:
    """Whether the host is a loopback address or `localhost`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def guarded(endpoint: Endpoint) -> Endpoint:
    """Answer 403 to what does not come over loopback, and 400 to a malformed body."""

    async def answer(request: Request) -> Response:
        client = request.client.host if request.client else None
        if not is_loopback(client) or not is_loopback(request.url.hostname):
            return JSONResponse({"error": "loopback only"}, status_code=403)
        try:
            return await endpoint(request)
        except (ValueError, TypeError) as error:
            return JSONResponse({"error": str(error)}, status_code=400)

    return answer


async def read_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object; an empty body is an empty one."""
    data = await request.json() if await request.body() else {}
    if not isinstance(data, dict):
        raise ValueError("expected a JSON object")
    return data


def control_routes(provider: Controlled) -> list[Route]:
    """The routes under `/control`.

    `GET /` counts and kids · `PUT /apps/{client_id}` an application ·
    `PUT|DELETE /faults/{client_id}` a fault, with `*` for all clients and `jwks`
    for the key set · `POST /rotate` {publish, retire} · `POST /publish`.
    """

    async def show(request: Request) -> Response:
        kids = [key["kid"] for key in provider.keys.as_jwks()["keys"]]
        return JSONResponse(provider.counts() | {"kids": kids})

    async def put_application(request: Request) -> Response:
        data = await read_object(request) | {"client_id": request.path_params["client_id"]}
        provider.add(Application.from_json(data))
        return Response(status_code=204)

    async def set_fault(request: Request) -> Response:
        name = request.path_params["client_id"]
        fault = Fault.from_json(await read_object(request)) if request.method == "PUT" else None
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
        Route("/apps/{client_id}", guarded(put_application), methods=["PUT"]),
        Route("/faults/{client_id}", guarded(set_fault), methods=["PUT", "DELETE"]),
        Route("/rotate", guarded(rotate), methods=["POST"]),
        Route("/publish", guarded(publish), methods=["POST"]),
    ]
