"""Faults of a server by a seeded script: throttles, 5xx, delays, and responses cut off after the change."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

Kind = Literal["throttle", "error", "late_error", "slow", "cut"]


@dataclass
class Script:
    """What happens to each request: shares of all requests that end in each way, drawn from a seed.

    `throttle`: 429 with Retry-After, nothing done. `error`: 503, nothing done. `late_error`: 502 after the
    request was carried out. `slow`: answered after `delay` seconds. `cut`: carried out, and the
    connection is closed in the middle of the response. `only` chooses the requests, by
    method and path, and `tokens` adds those for tokens; `first` is used up before any share counts.
    """

    seed: int = 0
    throttle: float = 0.0
    error: float = 0.0
    late_error: float = 0.0
    slow: float = 0.0
    cut: float = 0.0
    delay: float = 0.05
    retry_after: str = "1"
    only: Callable[[str, str], bool] = lambda method, path: True
    tokens: bool = False
    first: list[Kind] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def next(self, method: str, path: str) -> Kind | None:
        """The fault of the next request, counted in `done`."""
        if not self.only(method, path):
            return None
        kind = self.first.pop(0) if self.first else self._draw()
        if kind is not None:
            self.done[kind] += 1
        return kind

    def _draw(self) -> Kind | None:
        drawn = self._random.random()
        kinds: tuple[Kind, ...] = ("throttle", "error", "late_error", "slow", "cut")
        for kind in kinds:
            drawn -= getattr(self, kind)
            if drawn < 0:
                return kind
        return None


class Faulty:
    """An application whose requests below /api/, and for tokens if so, meet the faults of a script."""

    def __init__(self, app: ASGIApp, script: Script) -> None:
        self.app = app
        self.script = script

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["type"] == "http" else ""
        is_call = path.startswith("/api/") or (self.script.tokens and path == "/oauth2/token")
        kind = self.script.next(scope["method"], scope["path"]) if is_call else None
        match kind:
            case "throttle":
                await _send(send, 429, retry_after=self.script.retry_after)
            case "error":
                await _send(send, 503)
            case "late_error":
                await self.app(scope, receive, _ignore)
                await _send(send, 502)
            case "slow":
                await asyncio.sleep(self.script.delay)
                await self.app(scope, receive, send)
            case "cut":
                await self._cut(scope, receive, send)
            case None:
                await self.app(scope, receive, send)

    async def _cut(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the head and half of the body, and return: the server closes the connection."""
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(message)

        await self.app(scope, receive, keep)
        head = dict(messages[0])
        body = b"".join(message.get("body", b"") for message in messages[1:]) or b"{}"
        names = [(name, value) for name, value in head["headers"] if name.lower() != b"content-length"]
        await send(head | {"headers": [*names, (b"content-length", str(len(body)).encode())]})
        await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})


async def _ignore(message: Message) -> None:
    pass


async def _send(send: Send, status: int, *, retry_after: str = "") -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"13")]
    if retry_after:
        headers.append((b"retry-after", retry_after.encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b'{"errors":[]}'})
