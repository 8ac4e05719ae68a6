"""Run services: what a running handler may ask of the worker, for its own run and org only."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from datetime import datetime, timedelta
from typing import Any, Protocol

from worker.claims.claims import AccessToken, Claims
from worker.claims.decode import enforce
from worker.clock import Clock
from worker.errors import LeaseLost, TokenRefused
from worker.execution.attempts.inflight import InflightRun
from worker.execution.attempts.plan import AttemptPlan
from worker.execution.loops.run_log_writer import RunLogWriter
from worker.ids import RunId
from worker.orgs import OrgRef
from worker.runs.outcome import Error, Outcome, Succeeded, Trail
from worker.runs.run import AdmittedRun
from worker.telemetry.masking import masker

NOTHING_SAID = Succeeded()


def redacted(outcome: Outcome) -> Outcome:
    """The same outcome with every text of it masked: result, detail, message, error and trace."""
    if outcome == NOTHING_SAID:
        return outcome
    changes: dict[str, str | Error] = {}
    for field in fields(outcome):
        value = getattr(outcome, field.name)
        if isinstance(value, str):
            changes[field.name] = masker.mask(value)
        elif isinstance(value, Error):
            changes[field.name] = Error(*map(masker.mask, (value.type, value.message, value.trace)))
    return replace(outcome, **changes) if changes else outcome  # type: ignore[arg-type]


class EnforcedToken(Protocol):
    """A token that was verified and holds for this org, and what it says."""

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
        """A token of this org with some life left, verified and enforced.

        `also_ask` are scopes to ask for that may be missing from it.

        Raises:
            TokenRefused: a token came that must not be used.
            TokenError, Unavailable: no token, or no verdict on one, for now.
        """
        ...


class CheckpointStore(Protocol):
    async def save_checkpoint(self, run: AdmittedRun, data_json: str) -> bool:
        """Store a run's checkpoint, fenced; whether the run was still ours."""
        ...

    async def load_checkpoint(self, run_id: RunId) -> Any:
        """What was saved last, or None."""
        ...


class Services(Protocol):
    """What a link needs of the worker."""

    @property
    def tokens(self) -> TokenSource: ...
    @property
    def checkpoints(self) -> CheckpointStore: ...
    @property
    def journal(self) -> RunLogWriter: ...
    @property
    def clock(self) -> Clock: ...


class AttemptServices:
    """One attempt's line to the worker; `refused` holds a re-minted token's refusal."""

    def __init__(
        self,
        held: InflightRun,
        plan: AttemptPlan,
        trail: Trail,
        *,
        scopes: frozenset[str],
        checkpoint: Any,
        services: Services,
    ) -> None:
        self._held = held
        self._run = held.run
        self._checkpoint = checkpoint
        self._stop = held.stop
        self._plan = plan
        self._trail = trail
        self._scopes = scopes
        self._tokens = services.tokens
        self._checkpoints = services.checkpoints
        self._journal = services.journal
        self._clock = services.clock
        self.refused: TokenRefused | None = None

    async def save(self, data_json: str) -> None:
        """Store a checkpoint.

        Raises:
            LeaseLost: the run is another incarnation's by now, and is being killed here.
        """
        if not await self._checkpoints.save_checkpoint(self._run, masker.mask(data_json)):
            self._stop.kill()
            raise LeaseLost(f"run {self._run.id} is no longer ours")
        self._held.moved = self._held.moved or json.loads(data_json) != self._checkpoint

    async def token(self, *, fresh: bool) -> tuple[AccessToken, Claims]:
        """A token with some life left; an org mismatch or a lost scope ends the run refused."""
        definition = self._plan.definition
        try:
            enforced = await self._tokens.ensure(
                self._plan.org,
                self._plan.issuer,
                audience=definition.audience,
                scopes=self._scopes,
                max_claims_age=definition.max_claims_age,
                fresh=fresh,
            )
            enforce(enforced.claims, org_code=self._plan.org.code, client_id=None, scopes=self._scopes)
        except TokenRefused as refused:
            self.refused = refused
            self._stop.kill()
            # The org reads what its handler logs: this must not name the other org.
            raise TokenRefused(refused.reason, refused.detail) from None
        return enforced.token, enforced.claims

    def progress(self, done: float, total: float | None, note: str | None) -> None:
        progress = {"done": done, "total": total, "note": None if note is None else masker.mask(note)}
        self._trail.progress = progress
        self._journal.progress(self._run, progress)

    def log(self, level: str, source: str, text: str, at: datetime | None = None) -> None:
        self._journal.line(self._run, level, source, text, at)

    def started(self) -> None:
        self._trail.handler_started_at = self._clock.now()

    def used(self, peak_memory: int) -> None:
        self._trail.peak_memory = peak_memory
