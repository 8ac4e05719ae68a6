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
from worker.claims.digests import Digests
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

        It may lack the scopes in `also_ask`. Raises TokenRefused if the issuer's token must not be used,
        TokenError and Unavailable if there is no token, or no verdict on it, for now.
        """


class CheckpointStore(Protocol):
    async def save_checkpoint(self, run: AdmittedRun, data_json: str) -> bool:
        """Store a run's checkpoint, fenced; returns whether the run was still ours."""

    async def load_checkpoint(self, run_id: RunId) -> Any:
        """The newest checkpoint, or None."""


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
    digests: Digests | None = None
    deadlines: Deadlines = field(default_factory=Deadlines)


@dataclass(eq=False, repr=False)
class AttemptServices:
    """The `RunServices` of one attempt; `refused` holds the error of a renewed token that was refused."""

    inflight: InflightRun
    plan: AttemptPlan
    trail: Trail
    scopes: frozenset[str]
    checkpoint: Any
    tools: Tools
    refused: TokenRefused | None = None
    _closed: bool = False

    async def save(self, data_json: str) -> None:
        """Store a checkpoint, fenced and durable; wait while the database is away. Raises LeaseLost."""
        pause, masked = RETRY_SAVE, masker.mask(data_json)
        while True:
            self._check_open()
            try:
                saved = await self.tools.checkpoints.save_checkpoint(self.inflight.run, masked)
                break
            except Unavailable:
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_RETRY_SAVE)
        if not saved:
            self.inflight.stop.kill()
            raise LeaseLost(f"run {self.inflight.run.id} is no longer ours")
        self.inflight.moved = self.inflight.moved or json.loads(data_json) != self.checkpoint

    async def token(self, *, fresh: bool) -> tuple[AccessToken, Claims]:
        """A token with some life left; one of another org or without a scope ends the run refused."""
        self._check_open()
        definition, org = self.plan.definition, self.plan.org
        try:
            enforced = await self.tools.tokens.ensure(
                org,
                self.plan.issuer,
                audience=definition.audience,
                scopes=self.scopes,
                max_claims_age=definition.max_claims_age,
                fresh=fresh,
            )
            enforce(enforced.claims, org_code=org.code, client_id=None, scopes=self.scopes)
        except TokenRefused as refused:
            self.refused = refused
            self.inflight.stop.kill()
            # The org can read what its handler logs, so this must not name the other org.
            raise TokenRefused(refused.reason, refused.detail) from None
        return enforced.token, enforced.claims

    def progress(self, done: float, total: float | None, note: str | None) -> None:
        self._check_open()
        progress = {"done": done, "total": total, "note": None if note is None else masker.mask(note)}
        self.trail.progress = progress
        self.tools.run_log.progress(self.inflight.run, progress)

    def log(self, level: str, source: str, text: str, at: datetime | None = None) -> None:
        self.tools.run_log.line(self.inflight.run, level, source, text, at)

    def started(self) -> None:
        self.trail.handler_started_at = self.tools.clock.now()

    def used(self, peak_memory: int) -> None:
        self.trail.peak_memory = peak_memory

    def close(self) -> None:
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise LeaseLost("the run has ended")
