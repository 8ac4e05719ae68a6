"""Requests and responses: limited bodies, rows as JSON, errors as problems (RFC 9457), security headers."""

from __future__ import annotations

import hashlib
import json
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import parse_qsl

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from worker.errors import (
    AccessDenied,
    AmbiguousRun,
    Busy,
    Conflict,
    DefinitionError,
    IssuerUnavailable,
    NotFound,
    PreconditionFailed,
    RolesMissing,
    StoreUnavailable,
    TokenError,
    TooManyRequests,
    Unavailable,
    UsageError,
    WorkerError,
)
from worker.model.definitions.units import json_default
from worker.telemetry.events import emit
from worker.telemetry.masking import masker, without_paths

# The runs that an error is about.
Candidates = Sequence[Mapping[str, Any]]
# The first matching class gives the status.
STATUS: tuple[tuple[type[WorkerError], int], ...] = (
    (UsageError, 400),
    (TokenError, 401),
    (AccessDenied, 403),
    (NotFound, 404),
    (PreconditionFailed, 412),
    (Conflict, 409),
    (TooManyRequests, 429),
    (DefinitionError, 422),
    (Unavailable, 503),
    (RolesMissing, 503),
    (WorkerError, 500),
)
HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
# The messages of these errors are about the request. All others are about the server, which is for operators.
_ABOUT_THE_REQUEST = (
    *(UsageError, NotFound, Conflict, DefinitionError),
    *(TokenError, AccessDenied, TooManyRequests),
)
_ABOUT_THE_SERVER: tuple[tuple[type[WorkerError], str, str], ...] = (
    (StoreUnavailable, "the database does not answer", "try again later"),
    (RolesMissing, "the server may not act for its callers in the database", "an operator can see why"),
    (
        IssuerUnavailable,
        "the token's issuer does not answer, so the token cannot be verified",
        "try again later",
    ),
    (Busy, "the server is busy", "try again in a moment"),
)
CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
PROBLEM = "application/problem+json"
# The title of each code; those of other codes are the status' own.
TITLES: Mapping[str, str] = {
    "usage": "The request is invalid",
    "ambiguous": "Several runs fit",
    "token": "The token is missing or invalid",
    "denied": "The caller may not do this",
    "not_found": "There is no such thing",
    "method_not_allowed": "The address does not take this method",
    "timeout": "The request did not arrive in time",
    "conflict": "The current state does not allow it",
    "precondition_failed": "It was changed meanwhile",
    "too_large": "The body is too large",
    "definition": "The definition or the params are invalid",
    "invalid_trigger": "The schedule or its time zone is invalid",
    "unknown_handler": "There is no such handler, or it does not load",
    "too_many_requests": "Too many requests",
    "unexpected": "The server failed",
    "busy": "The server is busy",
    "database_unavailable": "The database does not answer",
    "issuer_unavailable": "The issuer does not answer",
    "roles_missing": "The server may not act for its callers",
}


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response with JSON as the command line prints it."""
    body = json.dumps(value, default=json_default).encode()
    return Response(body, status, headers, media_type="application/json")


def status_of(error: WorkerError) -> int:
    """The HTTP status of an error's class."""
    return next(status for kind, status in STATUS if isinstance(error, kind))


def fresh(request: Request, response: Response, *, prefix: str = "") -> Response:
    """The response with an ETag, which begins with `prefix`; 304 if the client has it already."""
    etag = f'"{prefix}{hashlib.sha256(response.body).hexdigest()[:16]}"'
    response.headers["etag"] = etag
    given = (one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(","))
    if request.method not in ("GET", "HEAD") or etag not in given:
        return response
    kept = {name: response.headers[name] for name in ("etag", "link") if name in response.headers}
    return Response(status_code=304, headers=kept)


def error_response(
    status: int,
    code: str,
    message: str,
    fix: str,
    retry_after: float | None = None,
    *,
    field: str = "",
    candidates: Candidates = (),
) -> Response:
    """A problem (RFC 9457); its member `error` is `{code, message, fix}`, as the command line prints it.

    `field` is the key of a definition that is invalid; `candidates` are the runs that fit.
    """
    headers = wait_headers(status, retry_after)
    if status == 401:
        headers["www-authenticate"] = 'Bearer realm="orgworker"'
    message, fix = masker.mask(message, None), masker.mask(fix, None)
    problem = {
        "type": f"urn:orgworker:problem:{code}",
        "title": TITLES.get(code) or HTTPStatus(status).phrase,
        "status": status,
        "detail": message,
        "code": code,
        "fix": fix,
        **({"field": field} if field else {}),
        **({"candidates": candidates} if candidates else {}),
        "error": {"code": code, "message": message, "fix": fix},
    }
    response = json_response(problem, status, headers)
    response.headers["content-type"] = PROBLEM
    return response


def wait_headers(status: int, retry_after: float | None) -> dict[str, str]:
    """Retry-After, for errors that another try may avoid."""
    return {"retry-after": str(math.ceil(retry_after or 5))} if status in (429, 503) else {}


def _json_only(scope: Scope, status: int, message: str, fix: str, candidates: Candidates) -> None:
    return None


class ErrorMiddleware:
    """Outermost ASGI middleware: adds security headers, and turns exceptions into responses.

    `page` may render an error for people; it returns None for JSON.
    """

    def __init__(
        self, app: ASGIApp, page: Callable[[Scope, int, str, str, Candidates], Response | None] = _json_only
    ) -> None:
        self._app = app
        self._page = page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        # With an app in the scope, Starlette's routes raise errors instead of answering in plain text.
        scope["app"] = self
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                given = {name for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *((n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in given),
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            return
        except Exception as error:
            response = self._response(scope, error)
            if started:
                raise
            await response(scope, receive, send_with_headers)

    def _response(self, scope: Scope, error: Exception) -> Response:
        retry_after: float | None = None
        field, more = "", {}
        candidates: Candidates = ()
        match error:
            case WorkerError():
                status, code = status_of(error), error.code
                message, fix = redacted_error(error, scope.get("caller"))
                retry_after = error.retry_after
                field = error.field if isinstance(error, DefinitionError) else ""
                candidates = error.candidates if isinstance(error, AmbiguousRun) else ()
            case HTTPException():
                status, fix = error.status_code, ""
                # The methods that a 405 allows.
                more = dict(error.headers or {})
                code = CODES.get(status, "usage")
                message = {404: f"there is no {scope['path']}"}.get(status, error.detail)
            case _:
                status, code, fix = 500, "unexpected", "see the worker's log"
                message = f"unexpected {type(error).__name__}"
                emit(
                    "web.failed",
                    method=scope["method"],
                    path=scope["path"],
                    error=type(error).__name__,
                    place=_place_of(error),
                )
        page = self._page(scope, status, message, fix, candidates)
        if page is None:
            page = error_response(status, code, message, fix, retry_after, field=field, candidates=candidates)
        page.headers.update({**wait_headers(status, retry_after), **more})
        return page


def _place_of(error: BaseException) -> str:
    """Module and line of our code that called what failed. The message may hold a secret, this does not."""
    places = [
        f"{frame.f_globals.get('__name__')}:{line}" for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    return next((place for place in reversed(places) if place.startswith("worker.")), "")


class CallerOf(Protocol):
    """Who calls; `org` is None for operators."""

    @property
    def org(self) -> object | None: ...


def redacted_error(error: WorkerError, caller: CallerOf | None) -> tuple[str, str]:
    """Message and fix of an error; without details of the server unless an operator calls."""
    if caller is not None and caller.org is None:
        return error.message, error.fix
    for kind, message, fix in _ABOUT_THE_SERVER:
        if isinstance(error, kind):
            return message, fix
    if isinstance(error, _ABOUT_THE_REQUEST):
        return without_paths(error.message), without_paths(error.fix)
    return "the server cannot answer this", "an operator can see why"


# Enough for a run's params; tokens and forms are far smaller.
MAX_BYTES = 256 * 1024


async def read_body(request: Request, most: int = MAX_BYTES) -> bytes:
    """The whole body; raises HTTPException 413 if it is larger than `most` bytes."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise HTTPException(413, f"the body is larger than {most} bytes")
    return bytes(body)


async def read_form(request: Request) -> dict[str, str]:
    """The fields of a form, of a repeated one the last; raises UsageError if it is not a form."""
    try:
        return dict(parse_qsl((await read_body(request)).decode("ascii"), max_num_fields=50))
    except ValueError:
        raise UsageError("the body is not a form") from None
