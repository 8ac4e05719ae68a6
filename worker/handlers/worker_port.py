"""Worker port: what a context asks of the worker: tokens, checkpoints, progress."""

from __future__ import annotations

from datetime import timedelta
from typing import Protocol

from worker.claims.claims import AccessToken, Claims
from worker.clock import Clock


class WorkerPort(Protocol):
    """How a context reaches the worker from an event loop."""

    async def save(self, data_json: str) -> None: ...

    async def token(self, *, fresh: bool) -> tuple[AccessToken, Claims]: ...

    def progress(self, done: float, total: float | None, note: str | None) -> None: ...


class BlockingWorkerPort(Protocol):
    """The same for a handler that blocks in its own process."""

    def save(self, data_json: str) -> None: ...

    def token(self, *, fresh: bool) -> tuple[AccessToken, Claims]: ...

    def progress(self, done: float, total: float | None, note: str | None) -> None: ...


class HeldToken:
    """The newest token and claims of a run, and whether they should be renewed before use."""

    def __init__(self, token: AccessToken, claims: Claims, clock: Clock) -> None:
        self.token = token
        self.claims = claims
        self._clock = clock

    @property
    def stale(self) -> bool:
        """Whether so little of the token's life is left that a call might outlive it."""
        life = self.token.expires_at - self.claims.issued_at
        margin = min(max(life / 5, timedelta(seconds=2)), timedelta(seconds=60))
        return self._clock.now() >= self.token.expires_at - margin

    def take(self, renewed: tuple[AccessToken, Claims]) -> AccessToken:
        """Keep a renewed token; the claims follow it."""
        self.token, self.claims = renewed
        return self.token


class TokenSource:
    """Gives the run's token from an event loop, renewed ahead of its expiry."""

    def __init__(self, held: HeldToken, line: WorkerPort) -> None:
        self._held = held
        self._line = line

    async def token(self, *, fresh: bool = False) -> AccessToken:
        if fresh or self._held.stale:
            return self._held.take(await self._line.token(fresh=fresh))
        return self._held.token


class BlockingTokenSource:
    """Gives the run's token to a handler that blocks, renewed ahead of its expiry."""

    def __init__(self, held: HeldToken, line: BlockingWorkerPort) -> None:
        self._held = held
        self._line = line

    def token(self, *, fresh: bool = False) -> AccessToken:
        if fresh or self._held.stale:
            return self._held.take(self._line.token(fresh=fresh))
        return self._held.token
