"""Context: what a handler may touch; BlockingContext is the same for a handler that blocks."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from worker.claims.claims import AccessToken, Claims, flag_value
from worker.handlers.json_text import clean, to_json_text
from worker.handlers.worker_port import (
    BlockingTokenSource,
    BlockingWorkerPort,
    HeldToken,
    TokenSource,
    WorkerPort,
)

if TYPE_CHECKING:
    import httpx

P = TypeVar("P")
S = TypeVar("S")

NOTE_LIMIT = 500
# The members that are HTTP clients, each made at its first use.
CLIENTS = frozenset({"http", "public_http"})


@dataclass(frozen=True, slots=True)
class Org:
    """The org that a run acts for."""

    code: str
    """As in the token."""
    name: str
    """For people."""


@dataclass(frozen=True, slots=True)
class ThisRun:
    """The run that is on: `idempotency_key` is the same on each attempt, `fencing_token` grows with it."""

    id: str
    """The run's id, as `runs list` prints it."""
    scheduled_for: datetime
    """The instant that the schedule names; aware, in UTC. The same on each attempt."""
    attempt: int
    """1, then one more with each try, whatever ended the ones before."""
    fencing_token: int
    """Grows with each attempt; whoever writes elsewhere may compare it."""
    idempotency_key: str
    """The same on each attempt and on a retry by hand; `ctx.http` sends it as `Idempotency-Key`."""


class Cancellation:
    """Whether the run was asked to end, and why; `wait()` returns when it is."""

    reason: str | None
    """`drain`, `cancel`, `timeout`, `suspended` or `replaced`; None as long as it was not asked to end."""

    def __init__(self) -> None:
        self.reason = None
        self._event = asyncio.Event()

    def note(self, reason: str) -> None:
        """Show the reason; callable from any thread, also while the loop is blocked."""
        self.reason = self.reason or reason

    def set(self, reason: str) -> None:
        """Wake those who wait; on the loop only."""
        self.note(reason)
        self._event.set()

    def is_set(self) -> bool:
        """Whether the run was asked to end."""
        return self.reason is not None

    async def wait(self) -> None:
        """Return when the run is asked to end."""
        await self._event.wait()


class BlockingCancellation:
    """Whether the run was asked to end, and why; `wait(timeout)` blocks, in seconds."""

    reason: str | None
    """As `Cancellation.reason`."""

    def __init__(self) -> None:
        self.reason = None
        self._event = threading.Event()

    def set(self, reason: str) -> None:
        self.reason = self.reason or reason
        self._event.set()

    def is_set(self) -> bool:
        return self._event.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        return self._event.wait(timeout)


@dataclass(slots=True)
class Given(Generic[P, S]):
    """What a context is made of: the attempt, and where its token may go. Never changed."""

    org: Org
    run: ThisRun
    params: P
    settings: S
    checkpoint: Any
    deadline: datetime
    api_origins: tuple[str, ...]
    log: logging.Logger
    held: HeldToken
    traceparent: str | None = None
    private_origins: tuple[str, ...] = ()
    insecure_origins: tuple[str, ...] = ()


class _Shared(Generic[P, S]):
    """The members that do not wait for anything."""

    org: Org
    """The org that the run acts for."""
    run: ThisRun
    """The run that is on."""
    params: P
    """The definition's params, as the handler's model, or a plain mapping."""
    settings: S
    """The token's properties over the model's defaults, as the handler's model, or a plain mapping."""
    checkpoint: Any
    """What the run saved last, in this attempt's predecessors; None where it saved nothing."""
    deadline: datetime
    """When the attempt is stopped, if it has not ended; aware, in UTC."""
    log: logging.Logger
    """Writes to the run's log, as `logging` and `print` do."""

    def __init__(self, given: Given[P, S], line: WorkerPort | BlockingWorkerPort) -> None:
        self.org = given.org
        self.run = given.run
        self.params = given.params
        self.settings = given.settings
        self.checkpoint = given.checkpoint
        self.deadline = given.deadline
        self.log = given.log
        self._held = given.held
        self._origins = given.api_origins
        # Where `public_http` connects to any address.
        self._trusted = (*given.api_origins, *given.private_origins)
        self._insecure_origins = given.insecure_origins
        self._traceparent = given.traceparent
        self._to_worker = line

    @property
    def claims(self) -> Claims:
        """What the newest token says of the org."""
        return self._held.claims

    def flag(self, name: str, default: Any = False) -> Any:
        """The value of a feature flag in the newest token; a property of that name stands in for it."""
        return flag_value(self.claims, name, default)

    def progress(self, done: float, total: float | None = None, note: str | None = None) -> None:
        """Show how far the run is; may be called often, the newest counts."""
        check_progress(done, total)
        self._to_worker.progress(done, total, None if note is None else clean(note, NOTE_LIMIT))


class Context(_Shared[P, S]):
    """What an async handler may touch: its org's run, token and API, and nothing of another org."""

    def __init__(self, given: Given[P, S], line: WorkerPort, cancelled: Cancellation) -> None:
        super().__init__(given, line)
        self.cancelled = cancelled
        self._line = line
        self._source = TokenSource(given.held, line)

    @cached_property
    def http(self) -> httpx.AsyncClient:
        """An httpx client that sends the org's token to the issuer's `api_origins` and nowhere else."""
        return self._client(None)

    @cached_property
    def public_http(self) -> httpx.AsyncClient:
        """As `ctx.http`, for a URL from params: it reaches public addresses and listed origins only."""
        from worker.handlers.public_http import PublicTransport

        return self._client(PublicTransport(self._trusted))

    def _client(self, transport: httpx.AsyncBaseTransport | None) -> httpx.AsyncClient:
        from worker.handlers.http import org_client

        return org_client(
            self._source,
            self._origins,
            self.run.idempotency_key,
            insecure_origins=self._insecure_origins,
            traceparent=self._traceparent,
            transport=transport,
        )

    async def token(self) -> AccessToken:
        """The org's token with some life left; its text is `.reveal()`."""
        return await self._source.token()

    async def save(self, data: Any) -> None:
        """Store a checkpoint of at most 1 MiB of JSON; the next attempt gets it as `ctx.checkpoint`.

        Returns when it is durable. Another worker that has taken the run over since makes it fail.
        """
        await self._line.save(to_json_text(data, "checkpoint"))


class BlockingContext(_Shared[P, S]):
    """What a handler that blocks may touch: the members of `Context`, without await."""

    def __init__(self, given: Given[P, S], line: BlockingWorkerPort, cancelled: BlockingCancellation) -> None:
        super().__init__(given, line)
        self.cancelled = cancelled
        self._line = line
        self._source = BlockingTokenSource(given.held, line)

    @cached_property
    def http(self) -> httpx.Client:
        """An httpx client that sends the org's token to the issuer's `api_origins` and nowhere else."""
        return self._client(None)

    @cached_property
    def public_http(self) -> httpx.Client:
        """As `ctx.http`, for a URL from params: it reaches public addresses and listed origins only."""
        from worker.handlers.public_http import BlockingPublicTransport

        return self._client(BlockingPublicTransport(self._trusted))

    def _client(self, transport: httpx.BaseTransport | None) -> httpx.Client:
        from worker.handlers.http import blocking_org_client

        return blocking_org_client(
            self._source,
            self._origins,
            self.run.idempotency_key,
            insecure_origins=self._insecure_origins,
            traceparent=self._traceparent,
            transport=transport,
        )

    def token(self) -> AccessToken:
        """The org's token with some life left; its text is `.reveal()`."""
        return self._source.token()

    def save(self, data: Any) -> None:
        """Store a checkpoint of at most 1 MiB of JSON; the next attempt gets it as `ctx.checkpoint`.

        Returns when it is durable. Another worker that has taken the run over since makes it fail.
        """
        self._line.save(to_json_text(data, "checkpoint"))


async def close_http(ctx: Context[Any, Any]) -> None:
    """Close the clients of a handler that has ended, those that it has used."""
    for name in CLIENTS & ctx.__dict__.keys():
        await getattr(ctx, name).aclose()


def close_blocking_http(ctx: BlockingContext[Any, Any]) -> None:
    """The same for a handler that blocks."""
    for name in CLIENTS & ctx.__dict__.keys():
        getattr(ctx, name).close()


def check_progress(done: Any, total: Any) -> None:
    """Raise ValueError unless both can be shown: finite numbers, `total` or None."""
    for what, number in (("done", done), ("total", total)):
        if number is None and what == "total":
            continue
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"progress: {what} is a finite number")
