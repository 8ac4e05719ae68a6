"""Faults that a test simulates. Each happens once, counted over all attempts of the run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import httpx

from worker.engine.runners.contract import StopReason
from worker.engine.trial import FakeTokens, Trial
from worker.errors import IssuerUnavailable
from worker.handlers.results import Duration, as_timedelta
from worker.model.claims import Enforced
from worker.model.orgs import OrgRef
from worker.testing.clock import SettableClock


@dataclass(frozen=True, slots=True)
class _Timed:
    """When the fault happens: exactly one of the three."""

    after_save: int | None = None
    """Right after the checkpoint of that number, counted from 1."""
    after: Duration | None = None
    """Time since the run began: a timedelta, seconds, or text such as `90s`."""
    after_step: int | None = None
    """Right after the result of the step of that number is stored, counted from 1."""

    def __post_init__(self) -> None:
        given = [value for value in (self.after_save, self.after, self.after_step) if value is not None]
        if len(given) != 1:
            name = type(self).__name__
            raise ValueError(f"{name} needs one of after_save=N, after_step=N and after=DURATION")
        for what, number in (("after_save", self.after_save), ("after_step", self.after_step)):
            if number is not None and number < 1:
                raise ValueError(f"{what} counts from 1")


@dataclass(frozen=True, slots=True)
class Crash(_Timed):
    """The run's process is killed; the next attempt gets checkpoint and steps, as after a machine crash."""


@dataclass(frozen=True, slots=True)
class Stop(_Timed):
    """The run is asked to stop within the definition's `cancel_grace`.

    `drain` hands the run back, and another attempt continues it; `timeout` counts as a
    failure; with `cancel`, `suspended`, `replaced` and `closed` the run ends cancelled.
    """

    reason: StopReason = "cancel"
    """`cancel`, `drain`, `timeout`, `suspended`, `replaced` or `closed`."""


@dataclass(frozen=True, slots=True)
class ProviderDown:
    """The identity provider does not respond: the run waits (`no_token`); that is not a failed attempt."""

    after: int = 0
    """How many tokens it issues first."""
    times: int = 1
    """How many token requests fail."""


@dataclass(frozen=True, slots=True)
class WrongOrg:
    """The provider issues a token of another org: the run ends `refused(org_mismatch)`."""

    org: str = "org_other"
    """The code of that org."""
    after: int = 0
    """How many correct tokens it issues first."""


@dataclass(frozen=True, slots=True)
class SecretRotated:
    """The API rejects the run's token with 401, and accepts a new one."""

    after: int = 0
    """How many requests with a token it accepts first."""


Fault = Crash | Stop | ProviderDown | WrongOrg | SecretRotated


class FaultInjector:
    """Counts what a run does, over all its attempts, and injects the faults."""

    def __init__(self, faults: Iterable[Fault], clock: SettableClock) -> None:
        self._left = list(faults)
        self._clock = clock
        self._began_at = clock.monotonic()
        self._saves = self._steps = self._requests = 0
        self._down = self._minted = 0
        self._revoked: set[str] = set()
        self._trial: Trial | None = None
        self._timers: list[asyncio.TimerHandle] = []

    def begin(self, trial: Trial) -> None:
        """Start the timers of an attempt."""
        loop, self._trial = asyncio.get_running_loop(), trial
        for fault in self._left:
            if isinstance(fault, Crash | Stop) and fault.after is not None:
                delay = self._began_at + as_timedelta(fault.after).total_seconds() - self._clock.monotonic()
                self._timers.append(loop.call_later(max(delay, 0), self._inject, fault, trial))

    def end(self) -> None:
        """Cancel the timers of the attempt."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    def check(self) -> None:
        """Raise AssertionError if a fault never happened: the test would prove nothing."""
        if self._left:
            raise AssertionError(
                f"{self._left[0]} never happened: the run saved {self._saves} times, stored {self._steps} "
                f"steps, asked for {self._minted + self._down} tokens and made {self._requests} requests "
                "with one"
            )

    async def saved(self, trial: Trial) -> None:
        """Handle a durable checkpoint."""
        self._saves += 1
        await self._stored(trial, "after_save", self._saves)

    async def stepped(self, trial: Trial) -> None:
        """Handle a stored step."""
        self._steps += 1
        await self._stored(trial, "after_step", self._steps)

    async def _stored(self, trial: Trial, what: str, number: int) -> None:
        for fault in list(self._left):
            if isinstance(fault, Crash | Stop) and getattr(fault, what) == number:
                self._inject(fault, trial)
        if trial.inflight.stop.killed:
            # Such a process never learns what is stored.
            await asyncio.Event().wait()

    def token_requested(self) -> WrongOrg | None:
        """Handle a token request; raises IssuerUnavailable."""
        for fault in list(self._left):
            if isinstance(fault, ProviderDown) and self._minted >= fault.after:
                self._down += 1
                if self._down >= fault.times:
                    self._left.remove(fault)
                    self._down = 0
                raise IssuerUnavailable("the issuer of this test does not respond")
        self._minted += 1
        for fault in list(self._left):
            if isinstance(fault, WrongOrg) and self._minted > fault.after:
                self._left.remove(fault)
                return fault
        return None

    def before_request(self, request: httpx.Request) -> httpx.Response | None:
        """The response to a request whose token is revoked; None passes it to the API."""
        if self._trial is not None and self._trial.inflight.stop.killed:
            raise httpx.ConnectError("the process of this run was killed", request=request)
        token = request.headers.get("Authorization")
        if token is None:
            return None
        self._requests += 1
        for fault in list(self._left):
            if isinstance(fault, SecretRotated) and self._requests > fault.after:
                self._left.remove(fault)
                self._revoked.add(token)
        return httpx.Response(401, request=request) if token in self._revoked else None

    def _inject(self, fault: Crash | Stop, trial: Trial) -> None:
        self._left.remove(fault)
        held = trial.inflight
        if isinstance(fault, Crash):
            held.stop.kill()
        else:
            held.stop.request(fault.reason, held.cancel_grace.total_seconds())


class FaultyTokens(FakeTokens):
    """Fake tokens from a provider that may be down or issue those of another org."""

    def __init__(self, faults: FaultInjector, clock: SettableClock, **options: Any) -> None:
        super().__init__(clock, **options)
        self._faults = faults

    def mint(self, org: OrgRef, scopes: frozenset[str]) -> Enforced:
        wrong = self._faults.token_requested()
        return super().mint(org if wrong is None else OrgRef(org.id, wrong.org), scopes)
