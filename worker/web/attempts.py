"""The HTTP side of the attempt API: `POST /attempts/v1/CALL` for hosts, with bodies of JSON."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from worker.clock import Clock
from worker.errors import AccessDenied, Busy, LeaseLost, TokenError, TooManyRequests, Unavailable, WorkerError
from worker.execution.hosts.attempt_api import AttemptApi
from worker.execution.hosts.wire import INCARNATION, MOST_BYTES, PREFIX, STEP, VERSIONS, Malformed
from worker.guard import bearer_token
from worker.handlers.steps import StepError
from worker.web.clients import Addresses, Buckets
from worker.web.connections import Deadlines
from worker.web.responses import ErrorMiddleware, error_response, json_response

# Calls that are answered at a time: each host has a few open.
MOST_CALLS = 2000
# Tokens of no host that one address may send at once, and a second.
BURST, RATE = 20, 5
# Seconds that the body of a call may take.
DEADLINES = Deadlines(body=30.0)
NOT_NOW = "the worker is starting or stopping"


class Attempts:
    """The routes of the attempt API. `api` is None while the worker has no incarnation that answers."""

    def __init__(self, clock: Clock) -> None:
        self.api: AttemptApi | None = None
        # A worker that drains answers what runs on hosts ask for, but no longer gives out runs.
        self.draining = False
        self._calls = 0
        self._addresses = Addresses()
        self._wrong = Buckets(clock, size=BURST, rate=RATE)

    def app(self) -> ASGIApp:
        routes = [
            Route("/attempts", self._versions, methods=["GET"]),
            Route(f"{PREFIX}/{{call}}", self._call, methods=["POST"]),
        ]
        return ErrorMiddleware(Router(routes=routes, redirect_slashes=False))

    async def _versions(self, request: Request) -> Response:
        return json_response({"versions": list(VERSIONS)})

    async def _call(self, request: Request) -> Response:
        if self._calls >= MOST_CALLS:
            return _problem(Busy(f"{MOST_CALLS} calls are being answered", fix="try again in a moment"), 503)
        self._calls += 1
        try:
            return await self._answer(request)
        except TokenError as error:
            return _problem(error, 503 if error.transient else 422)
        except (WorkerError, StepError) as error:
            return _problem(error, _status(error))
        finally:
            self._calls -= 1

    async def _answer(self, request: Request) -> Response:
        api, name = self.api, request.path_params["call"]
        if api is None or (self.draining and name in ("take", "register")):
            raise Busy(NOT_NOW, fix="ask another worker, or this one in a moment")
        client = self._addresses.client_of(request).key
        token = bearer_token(request.headers.get("authorization", ""))
        digest = hashlib.sha256((token or "").encode()).hexdigest()
        # A host with a wrong token must not keep others out that have the same address.
        if not api.knows(digest) and (seconds := self._wrong.wait(client)) > 0:
            raise TooManyRequests(
                "too many calls without the token of a host",
                fix="give the host a token of `python -m worker hosts add`, or wait",
                retry_after=seconds,
            )
        try:
            caller = await api.caller(digest, request.headers.get(INCARNATION), name)
        except TokenError as error:
            self._wrong.charge(client)
            return _problem(error, 401)
        message = await _read(request)
        left = _Gone(request) if name == "take" else None

        def gone() -> bool:
            # A worker that drains ends the takes that wait.
            return left is not None and (left() or self.draining or self.api is not api)

        try:
            answer = await api.call(caller, name, message, gone)
        finally:
            if left is not None:
                left.stop()
        if isinstance(answer, bytes):
            return Response(answer, media_type="application/json")
        return Response(
            json.dumps(answer, ensure_ascii=False, separators=(",", ":")), media_type="application/json"
        )


class _Gone:
    """Whether the host has closed the connection while it waited."""

    def __init__(self, request: Request) -> None:
        self._task = asyncio.create_task(self._watch(request))

    def __call__(self) -> bool:
        return self._task.done()

    def stop(self) -> None:
        self._task.cancel()

    @staticmethod
    async def _watch(request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass


def _status(error: WorkerError | StepError) -> int:
    for kinds, status in _STATUS:
        if isinstance(error, kinds):
            return status
    # Such as a configuration that an operator has to correct, while hosts go on asking.
    return 503


_STATUS: Sequence[tuple[type[Exception] | tuple[type[Exception], ...], int]] = (
    ((Malformed, StepError), 422),
    (AccessDenied, 403),
    (LeaseLost, 409),
    (TooManyRequests, 429),
    (Unavailable, 503),
)


def _problem(error: WorkerError | StepError, status: int) -> Response:
    if isinstance(error, StepError):
        return error_response(status, STEP, str(error), "")
    return error_response(status, error.code, error.message, error.fix, error.retry_after)


async def _read(request: Request) -> Mapping[str, Any]:
    """The JSON object of a call. Raises Malformed, and HTTPException 413 beyond MOST_BYTES."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MOST_BYTES:
        raise HTTPException(413, f"the body is larger than {MOST_BYTES} bytes")
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                raise HTTPException(413, f"the body is larger than {MOST_BYTES} bytes")
        message = json.loads(body)
    except ClientDisconnect:
        raise
    except (ValueError, RecursionError):
        raise Malformed("the body is not JSON") from None
    if not isinstance(message, dict):
        raise Malformed("the body is not a JSON object")
    return message
