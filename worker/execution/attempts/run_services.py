"""Run services: what all attempts share, and what a running handler may ask of the worker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta
from random import Random
from typing import Any, Protocol

from worker.claims.claims import AccessToken, Claims
from worker.claims.decode import enforce
from worker.clock import Clock
from worker.errors import LeaseLost, TokenRefused, Unavailable
from worker.execution.attempts.handler_registry import HandlerRegistry
from worker.execution.attempts.inflight import Deadlines, InflightRun
from worker.execution.attempts.plan import AttemptPlan, Plans
from worker.execution.loops.run_log_writer import RunLogWriter
from worker.execution.runners.contract import Runner
from worker.ids import RunId
from worker.orgs import OrgRef
from worker.runs.outcome import Error, Outcome, Succeeded, Trail
from worker.runs.run import AdmittedRun, Isolation
from worker.telemetry.masking import masker

# Seconds between two tries to save a checkpoint, at first and at most.
RETRY_SAVE = 0.1
LONGEST_RETRY_SAVE = 2.0
_NOTHING_RETURNED = Succeeded()


def redacted(outcome: Outcome) -> Outcome:
    """The same outcome with every text masked: result, detail, message, error and trace."""
    if outcome == _NOTHING_RETURNED:
        return outcome
    changes: dict[str, str | Error] = {}
    for field_ in fields(outcome):
        value = getattr(outcome, field_.name)
        if isinstance(value, str):
            changes[field_.name] = masker.mask(value)
        elif isinstance(value, Error):
            changes[field_.name] = Error(*map(masker.mask, (value.type, value.message, value.trace)))
    return replace(outcome, **changes) if changes else outcome  # type: ignore[arg-type]


class EnforcedToken(Protocol):
    """A token that was verified and enforced for its org."""

    @property
    def token(self) -> AccessToken: ...
    @property
    def claims(self) -> Claims: ...


class TokenSource(Protocol):
    async def ensure(
        self,
        org: OrgRef,
        issuer: str,
        *,
        audience: str | None,
        scopes: frozenset[str],
        also_ask: frozenset[str] = frozenset(),
        max_claims_age: timedelta | None = None,
        fresh: bool = False,
    ) -> EnforcedToken:
        """A verified and enforced token of this org with some life left.

        `also_ask` are scopes to request that the token may lack.

        Raises:
            TokenRefused: the issuer's token must not be used.
            TokenError, Unavailable: no token, or no verdict on it, for now.
        """
        ...


class CheckpointStore(Protocol):
    async def save_checkpoint(self, run: AdmittedRun, data_json: str) -> bool:
        """Store a run's checkpoint, fenced; returns whether the run was still ours."""
        ...

    async def load_checkpoint(self, run_id: RunId) -> Any:
        """The newest checkpoint, or None."""
        ...


@dataclass(frozen=True, slots=True)
class Tools:
    """What all attempts of this process share."""

    plans: Plans
    tokens: TokenSource
    handlers: HandlerRegistry
    runners: Mapping[Isolation, Runner]
    checkpoints: CheckpointStore
    run_log: RunLogWriter
    clock: Clock
    random: Random
    deadlines: Deadlines = field(default_factory=Deadlines)


class AttemptServices:
    """The `RunServices` of one attempt; `refused` holds the error of a renewed token that was refused."""

    def __init__(
        self,
        inflight: InflightRun,
        plan: AttemptPlan,
        trail: Trail,
        *,
        scopes: frozenset[str],
        checkpoint: Any,
        tools: Tools,
    ) -> None:
        self._inflight = inflight
        self._run = inflight.run
        self._plan = plan
        self._trail = trail
        self._scopes = scopes
        self._checkpoint = checkpoint
        self._tools = tools
        self._closed = False
        self.refused: TokenRefused | None = None

    async def save(self, data_json: str) -> None:
        """Store a checkpoint, fenced and durable, and wait while the database is unavailable.

        The handler must not fail because of an outage; without renewals its run is frozen anyway.

        Raises:
            LeaseLost: another incarnation owns the run, which is being killed here.
        """
        pause, masked = RETRY_SAVE, masker.mask(data_json)
        while True:
            self._check_open()
            try:
                saved = await self._tools.checkpoints.save_checkpoint(self._run, masked)
                break
            except Unavailable:
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_RETRY_SAVE)
        if not saved:
            self._inflight.stop.kill()
            raise LeaseLost(f"run {self._run.id} is no longer ours")
        self._inflight.moved = self._inflight.moved or json.loads(data_json) != self._checkpoint

    async def token(self, *, fresh: bool) -> tuple[AccessToken, Claims]:
        """A token with some life left; one of another org or without a scope ends the run refused."""
        self._check_open()
        definition, org = self._plan.definition, self._plan.org
        try:
            enforced = await self._tools.tokens.ensure(
                org,
                self._plan.issuer,
                audience=definition.audience,
                scopes=self._scopes,
                max_claims_age=definition.max_claims_age,
                fresh=fresh,
            )
            enforce(enforced.claims, org_code=org.code, client_id=None, scopes=self._scopes)
        except TokenRefused as refused:
            self.refused = refused
            self._inflight.stop.kill()
            # The org can read what its handler logs, so this must not name the other org.
            raise TokenRefused(refused.reason, refused.detail) from None
        return enforced.token, enforced.claims

    def progress(self, done: float, total: float | None, note: str | None) -> None:
        self._check_open()
        progress = {"done": done, "total": total, "note": None if note is None else masker.mask(note)}
        self._trail.progress = progress
        self._tools.run_log.progress(self._run, progress)

    def log(self, level: str, source: str, text: str, at: datetime | None = None) -> None:
        self._tools.run_log.line(self._run, level, source, text, at)

    def started(self) -> None:
        self._trail.handler_started_at = self._tools.clock.now()

    def used(self, peak_memory: int) -> None:
        self._trail.peak_memory = peak_memory

    def close(self) -> None:
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise LeaseLost("the run has ended")
