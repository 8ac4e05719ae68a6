"""WSGI middleware that lets only requests with a valid token through."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any

from .access import Denied, Middleware, parted

Environ = dict[str, Any]
StartResponse = Callable[..., Any]
App = Callable[[Environ, StartResponse], Iterable[bytes]]


class RequireToken(Middleware[App, Environ]):
    """WSGI middleware: a request with a valid token gets its `Claims` in `environ["orgworker.claims"]`.

    Parameters and responses are those of the ASGI `RequireToken`; its functions get the
    `environ`. An Authorization value with a comma is refused: servers join two headers so.
    """

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        if environ.get("PATH_INFO", "") in self._open_paths:
            return self._app(environ, start_response)
        try:
            claims = self._rules.claims_sync(environ, parted(environ.get("HTTP_AUTHORIZATION")))
        except Denied as denied:
            body = denied.body
            headers = {**denied.headers, "Content-Length": str(len(body))}
            start_response(f"{denied.status} {HTTPStatus(denied.status).phrase}", list(headers.items()))
            return [body]
        environ["orgworker.claims"] = claims
        return self._app(environ, start_response)
