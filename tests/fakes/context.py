"""A handler's context for unit tests: a fake org and run, responses from a mock transport."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import httpx

Answer = Callable[[httpx.Request], httpx.Response]


@dataclass
class FakeContext:
    """The parts of `worker.Context` that the built-in handlers use; records their calls."""

    answer: Answer
    params: Any
    settings: Any = None
    checkpoint: Any = None
    saved: list[Any] = field(default_factory=list)
    progressed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.org = SimpleNamespace(code="org_acme", name="Acme")
        self.run = SimpleNamespace(
            id="01234567-89ab-7def-8123-456789abcdef",
            scheduled_for=datetime(2030, 1, 1, 3, tzinfo=UTC),
            attempt=1,
            fencing_token=1,
            idempotency_key="01234567-89ab-7def-8123-456789abcdef",
        )
        self.http = self.public_http = httpx.AsyncClient(transport=httpx.MockTransport(self.answer))
        self.log = logging.getLogger("tests.context")

    async def save(self, data: Any) -> None:
        self.saved.append(data)

    def progress(self, done: int, total: int | None = None, note: str | None = None) -> None:
        self.progressed.append(done)
