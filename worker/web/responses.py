"""Requests and responses: bounded bodies, rows as JSON, errors with a status, security headers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from datetime import date, datetime, timedelta
from typing import Any
from urllib.parse import parse_qsl

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from worker.clock import to_text
from worker.definitions.units import format_duration
from worker.errors import (
    AccessDenied,
    Conflict,
    DefinitionError,
    NotFound,
    RolesMissing,
    TokenError,
    TooManyRequests,
    Unavailable,
    UsageError,
    WorkerError,
)
from worker.telemetry.events import emit
from worker.telemetry.masking import masker
from worker.web.redaction import redacted_error

# The first class that an error is of gives the status.
STATUS: tuple[tuple[type[WorkerError], int], ...] = (
    (UsageError, 400),
    (TokenError, 401),
    (AccessDenied, 403),
    (NotFound, 404),
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
CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}


def encode(rows: Any) -> bytes:
    """JSON as the command line prints it: instants in RFC 3339 UTC with `Z`."""
    return json.dumps(rows, default=_plain).encode()


def json_answer(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """What `encode` made, as a response."""
    return Response(body, status, headers, media_type="application/json")


def status_of(error: WorkerError) -> int:
    """The HTTP status of an error's class."""
    return next(status for kind, status in STATUS if isinstance(error, kind))


def error_answer(
    status: int, code: str, message: str, fix: str, retry_after: float | None = None
) -> Response:
    """`{"error": {code, message, fix}}`, as everywhere."""
    headers = wait_headers(status, retry_after)
    if status == 401:
        headers["www-authenticate"] = 'Bearer realm="orgworker"'
    body = encode({"error": {"code": code, "message": masker.mask(message), "fix": masker.mask(fix)}})
    return json_answer(body, status, headers)


def wait_headers(status: int, retry_after: float | None) -> dict[str, str]:
    """When to ask again, where another try may help."""
    return {"retry-after": str(math.ceil(retry_after or 5))} if status in (429, 503) else {}


def _no_page(scope: Scope, status: int, message: str, fix: str) -> None:
    return None


class ErrorMiddleware:
    """ASGI middleware, the outermost: adds the headers, and turns what is raised into an answer.

    `page` may answer an error for people instead; it returns None to leave it.
    """

    def __init__(
        self, app: ASGIApp, page: Callable[[Scope, int, str, str], Response | None] = _no_page
    ) -> None:
        self._app = app
        self._page = page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        # Starlette's routes then raise what they cannot answer, instead of answering in plain text.
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
            # In the middle of its request: there is nobody to answer, and nothing failed here.
            return
        except Exception as error:
            answer = self._answer(scope, error)
            if started:
                raise
            await answer(scope, receive, send_with_headers)

    def _answer(self, scope: Scope, error: Exception) -> Response:
        retry_after: float | None = None
        match error:
            case WorkerError():
                status, code = status_of(error), error.code
                message, fix = redacted_error(error, scope.get("caller"))
                retry_after = error.retry_after
            case HTTPException():
                status, fix = error.status_code, ""
                code = CODES.get(status, "usage")
                message = {404: f"there is no {scope['path']}"}.get(status, error.detail)
            case _:
                status, code, fix = 500, "unexpected", "the worker's log has more"
                message = f"unexpected {type(error).__name__}"
                emit("web.failed", method=scope["method"], path=scope["path"], error=type(error).__name__)
        page = self._page(scope, status, message, fix)
        if page is None:
            return error_answer(status, code, message, fix, retry_after)
        page.headers.update(wait_headers(status, retry_after))
        return page


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return to_text(value)
    if isinstance(value, timedelta):
        return format_duration(value)
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value)


# Params of a run at most; tokens and forms are far smaller.
MOST_BYTES = 256 * 1024


async def read_body(request: Request) -> bytes:
    """All of it.

    Raises:
        HTTPException: 413, it is too large.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise HTTPException(413, f"the body is larger than {MOST_BYTES} bytes")
    return bytes(body)


async def read_form(request: Request) -> dict[str, str]:
    """The fields of a form that a browser sends; of one given twice the last.

    Raises:
        UsageError: it is no such form.
    """
    try:
        return dict(parse_qsl((await read_body(request)).decode("ascii"), max_num_fields=50))
    except ValueError:
        raise UsageError("the body is no form") from None
