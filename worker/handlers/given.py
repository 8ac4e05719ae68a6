"""Given: the data of one attempt that a context is made of, and how a handler learns that it must stop.

Also the state: what a definition remembers between its runs, a JSON object of at most 64 KiB. Each attempt
loads it, and what the handler changed is committed with the run's success.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Generic, TypeVar

from worker.clock import Clock
from worker.guard.claims import Claims
from worker.handlers.job import Job
from worker.handlers.json_text import NotStorable, check_json_text, to_json_text
from worker.model.batches import ModelApi
from worker.model.runs.budgets import BudgetState
from worker.secret import AccessToken
from worker.telemetry.tracing import Detail

P = TypeVar("P")
S = TypeVar("S")
# Opens a stream to the broker. Raises OSError once the attempt has ended.
Connect = Callable[[], socket.socket]


@dataclass(slots=True)
class HeldToken:
    """The newest token and claims of a run, and whether to renew them before use."""

    token: AccessToken
    claims: Claims
    clock: Clock

    @property
    def stale(self) -> bool:
        """Whether so little of the token's life is left that a call might outlast it."""
        return self.clock.now() >= self.token.expires_at - self.margin

    @property
    def margin(self) -> timedelta:
        """What of the token's life is left for the calls that it is used for."""
        life = self.token.expires_at - self.claims.issued_at
        return min(max(life / 5, timedelta(seconds=2)), timedelta(seconds=60))


@dataclass(frozen=True, slots=True)
class Org:
    """The org that a run acts for."""

    code: str
    """As in the token."""
    name: str
    """Display name."""


@dataclass(frozen=True, slots=True)
class ThisRun:
    """The current run."""

    id: str
    """The run's id, as `runs list` prints it."""
    scheduled_for: datetime
    """The scheduled time; aware, in UTC. The same on each attempt."""
    attempt: int
    """Counts from 1, however earlier attempts ended."""
    fencing_token: int
    """Grows with each attempt, so that another system can reject writes of an older one."""
    idempotency_key: str
    """The same on each attempt and on a manual retry. `ctx.http` sends it as `Idempotency-Key`; inside a
    step it sends one made of this key, the step and the number of the request."""


class Cancellation:
    """Whether the run was asked to stop, and why."""

    reason: str | None
    """`drain`, `cancel`, `timeout`, `suspended`, `replaced`, `closed` or `parent`; None until the run is
    asked to stop."""

    def __init__(self) -> None:
        self.reason = None
        # Most runs never wait for it.
        self._event: asyncio.Event | None = None

    def note(self, reason: str) -> None:
        """Set the reason; callable from any thread, also while the loop is blocked."""
        self.reason = self.reason or reason

    def set(self, reason: str) -> None:
        """Set the reason and wake `wait`; on the loop only."""
        self.note(reason)
        if self._event is not None:
            self._event.set()

    def is_set(self) -> bool:
        """Whether the run was asked to stop."""
        return self.reason is not None

    async def wait(self) -> None:
        """Return when the run is asked to stop."""
        if self.reason is None:
            self._event = self._event or asyncio.Event()
            await self._event.wait()


class BlockingCancellation:
    """The same for a handler that blocks; `wait` takes a timeout in seconds."""

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
    """The data of one attempt that a context is made of.

    `replays` if earlier ones may have stored steps; `budgets` are those of the org that may stop it,
    None without any. With `meter_usage` the clients count the `usage` of the answers of models. `secrets`
    are those that the handler declares. With `connect` the broker sends the requests of the clients.
    `audiences` are those for which it may ask for another token. `traces` is what it reports of its steps.
    `model_apis` are those of `[batches]`; with `batched` its model requests go into batches.
    """

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
    traces: Detail = "none"
    private_origins: tuple[str, ...] = ()
    insecure_origins: tuple[str, ...] = ()
    replays: bool = False
    job: Job | None = None
    state: State | None = None
    api_base_url: str = ""
    budgets: tuple[BudgetState, ...] | None = None
    meter_usage: bool = False
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    connect: Connect | None = None
    audiences: tuple[str, ...] = ()
    model_apis: tuple[ModelApi, ...] = ()
    batched: bool = False

    @property
    def trusted_origins(self) -> tuple[str, ...]:
        """The origins for which `public_http` connects to any address."""
        return self.api_origins + self.private_origins


STATE_LIMIT = 64 * 1024


class State:
    """The state of one attempt: the handler's own copy, and how it was loaded."""

    __slots__ = ("_loaded", "value")

    def __init__(self, loaded: Mapping[str, Any]) -> None:
        # Without a limit: numbers that the database has normalised can be longer.
        self._loaded = to_json_text(loaded, "state", limit=sys.maxsize)
        self.value: dict[str, Any] = json.loads(self._loaded)

    def changed(self) -> str | None:
        """The JSON text to commit, or None if nothing changed; raises NotStorable."""
        text = to_json_text(self.value, "state", limit=sys.maxsize)
        if text == self._loaded:
            return None
        check_state_text(text)
        return text


def to_state_text(value: Mapping[str, Any]) -> str:
    """A state as JSON text; raises NotStorable."""
    text = to_json_text(value, "state", limit=STATE_LIMIT)
    check_object(text)
    return text


def check_state_text(text: str) -> None:
    """Raise NotStorable for text that `to_state_text` would not write: a run's process may send anything."""
    check_json_text(text, "state", limit=STATE_LIMIT)
    check_object(text)


def check_object(text: str) -> None:
    """Raise NotStorable for JSON text that is not an object."""
    if not text.lstrip().startswith("{"):
        raise NotStorable("the state is not a JSON object")
