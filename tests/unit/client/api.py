"""A stand-in for the API: one run a key and definition, and answers that a test sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx

TOKEN = "orgworker_op_canary-4711"
URL = "https://jobs.test"


def problem(status: int, code: str, **more: Any) -> httpx.Response:
    """An error of the API; what begins with a capital letter is a header."""
    headers = {name.replace("_", "-"): str(value) for name, value in more.items() if name[0].isupper()}
    body = {"code": code, "detail": f"the detail of {code}", "fix": "the fix", "status": status}
    body |= {name: value for name, value in more.items() if not name[0].isupper()}
    headers["content-type"] = "application/problem+json"
    return httpx.Response(status, headers=headers, content=json.dumps(body))


class FakeApi:
    """Keeps the runs that it has made, in order; `answer` may replace or lose an answer."""

    def __init__(self) -> None:
        # By org, definition and key.
        self.runs: dict[tuple[str, str, str], dict[str, Any]] = {}
        self.requests: list[httpx.Request] = []
        self.before: Callable[[tuple[str, str, str]], httpx.Response | Exception | None] = lambda what: None
        self.after: Callable[[tuple[str, str, str]], httpx.Response | Exception | None] = lambda what: None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return problem(401, "token")
        _, _, _, _, org, definition, _ = request.url.path.split("/")
        what = (org, definition, request.headers["idempotency-key"])
        if (fault := self.before(what)) is not None:
            return raised(fault)
        headers = {}
        params = json.loads(request.content).get("params", {})
        if what in self.runs:
            same = self.runs[what]["params"] == params
            headers = {"idempotency-replayed": "same-params" if same else "other-params"}
        else:
            row = {"id": f"run-{len(self.runs) + 1}", "org": org, "definition": definition}
            self.runs[what] = row | {"state": "waiting", "attempt": 0, "params": params}
        if (fault := self.after(what)) is not None:
            return raised(fault)
        return httpx.Response(201, headers=headers, json=self.runs[what])


def raised(fault: httpx.Response | Exception) -> httpx.Response:
    """A copy, since a response is read once; or raises the error."""
    if isinstance(fault, Exception):
        raise fault
    return httpx.Response(fault.status_code, headers=fault.headers, content=fault.content)
