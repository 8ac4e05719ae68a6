"""An alert receiver on loopback that verifies each request with the code of the documentation."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.fakes.pages import blocks
from tests.fakes.site import wait_until
from worker.demo.serving import ServerThread, bind_loopback

PAGE = Path(__file__).parents[2] / "docs/reference/http.md"
SECRET = "a-secret-shared-with-the-worker"


@dataclass(frozen=True)
class Post:
    """A request: its monotonic time, its id, its alert, and whether the documented check accepts it."""

    at: float
    id: str
    alert: dict[str, Any]
    genuine: bool


@dataclass
class Hook:
    """`taken` are the accepted alerts, `turned_down` those that got a 503 because the receiver was `busy`."""

    taken: list[Post] = field(default_factory=list)
    turned_down: list[Post] = field(default_factory=list)
    pings: list[float] = field(default_factory=list)
    busy: Callable[[], bool] = lambda: False
    port: int = 0

    def __post_init__(self) -> None:
        self._is_genuine = _documented()
        routes = [Route("/alerts", self._take, methods=["POST"]), Route("/ping", self._ping)]
        self.server = ServerThread(Starlette(routes=routes), bind_loopback(self.port)).start()

    def settings(self, **more: str) -> str:
        """The table `[alerts]` of a worker that alerts this receiver; values of `more` are TOML."""
        return settings(self.server.url, **more)

    def told(self, kind: str | None = None) -> list[tuple[str, str]]:
        """Kind and status of each accepted alert, in order."""
        return [
            (post.alert["kind"], post.alert["status"])
            for post in self.taken
            if kind in (None, post.alert["kind"])
        ]

    def wait_for(self, kind: str, status: str, timeout: float = 45.0) -> dict[str, Any]:
        """The first alert of that kind and status."""

        def found() -> list[dict[str, Any]]:
            wanted = (kind, status)
            return [p.alert for p in self.taken if (p.alert["kind"], p.alert["status"]) == wanted]

        return wait_until(found, f"the alert {kind} {status}; told: {self.told()}", timeout=timeout)[0]

    async def _take(self, request: Request) -> Response:
        body, headers = await request.body(), dict(request.headers)
        genuine = self._is_genuine(SECRET, headers, body)
        post = Post(time.monotonic(), headers["webhook-id"], json.loads(body), genuine)
        if self.busy():
            self.turned_down.append(post)
            return Response(status_code=503)
        self.taken.append(post)
        return Response(status_code=204)

    async def _ping(self, request: Request) -> Response:
        self.pings.append(time.monotonic())
        return Response()


def settings(base_url: str, **more: str) -> str:
    """The same for a receiver that has not started yet."""
    given = {"webhook_url": f'"{base_url}/alerts"', "webhook_secret": f'"{SECRET}"'} | more
    return "\n".join(["[alerts]", *(f"{key} = {value}" for key, value in given.items()), ""])


def _documented() -> Callable[[str, dict[str, str], bytes], bool]:
    [code] = [block.text for block in blocks(PAGE.read_text()) if block.language == "python"]
    names: dict[str, Any] = {}
    exec(code, names)
    function: Callable[[str, dict[str, str], bytes], bool] = names["is_genuine"]
    return function
