"""Stage: the faults of one run, each brought about at its place."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import httpx

from worker.errors import IssuerUnavailable
from worker.execution.trial.fake_tokens import FakeToken, FakeTokens
from worker.execution.trial.trial import Trial
from worker.orgs import OrgRef
from worker.testing.clock import SettableClock, in_seconds
from worker.testing.faults import Crash, Fault, ProviderDown, SecretRotated, Stop, WrongOrg


class Stage:
    """Counts what a run does, over all its attempts, and has happen what the test ordered."""

    def __init__(self, faults: Iterable[Fault], clock: SettableClock) -> None:
        self._left = list(faults)
        self._clock = clock
        self._began_at = clock.monotonic()
        self._saves = self._requests = 0
        self._down = self._minted = 0
        self._revoked: set[str] = set()
        self._trial: Trial | None = None
        self._timers: list[asyncio.TimerHandle] = []

    def begin(self, trial: Trial) -> None:
        """An attempt begins: what is to happen at a time is set for it."""
        loop, self._trial = asyncio.get_running_loop(), trial
        for fault in self._left:
            if isinstance(fault, Crash | Stop) and fault.after is not None:
                delay = self._began_at + in_seconds(fault.after) - self._clock.monotonic()
                self._timers.append(loop.call_later(max(delay, 0), self._strike, fault, trial))

    def end(self) -> None:
        """The attempt has ended."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    def check(self) -> None:
        """Fail a test that ordered what never came about: it shows nothing.

        Raises:
            AssertionError: names the fault.
        """
        for fault in self._left:
            raise AssertionError(
                f"{fault} never happened: the run saved {self._saves} times, asked for "
                f"{self._minted + self._down} tokens and made {self._requests} requests with one"
            )

    async def saved(self, trial: Trial) -> None:
        """A checkpoint is durable."""
        self._saves += 1
        for fault in list(self._left):
            if isinstance(fault, Crash | Stop) and fault.after_save == self._saves:
                self._strike(fault, trial)
        if trial.held.stop.killed:
            await asyncio.Event().wait()  # a killed process never hears that its checkpoint is stored

    def asked(self) -> WrongOrg | None:
        """A token is asked for: which other org it is to be of, if it comes.

        Raises:
            IssuerUnavailable: the provider is down.
        """
        for fault in list(self._left):
            if isinstance(fault, ProviderDown) and self._minted >= fault.after:
                self._down += 1
                if self._down >= fault.times:
                    self._left.remove(fault)
                    self._down = 0
                raise IssuerUnavailable("the issuer of this test does not answer")
        self._minted += 1
        for fault in list(self._left):
            if isinstance(fault, WrongOrg) and self._minted > fault.after:
                self._left.remove(fault)
                return fault
        return None

    def before_request(self, request: httpx.Request) -> httpx.Response | None:
        """A request is about to reach the API: what it gets instead, if its token is revoked."""
        if self._trial is not None and self._trial.held.stop.killed:
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

    def _strike(self, fault: Crash | Stop, trial: Trial) -> None:
        self._left.remove(fault)
        held = trial.held
        if isinstance(fault, Crash):
            held.stop.kill()
        else:
            held.stop.request(fault.reason, held.cancel_grace.total_seconds())


class StagedTokens(FakeTokens):
    """Made-up tokens, from a provider that may be down or give another org's."""

    def __init__(
        self,
        stage: Stage,
        clock: SettableClock,
        *,
        properties: Mapping[str, Any] | None,
        flags: Mapping[str, Any] | None,
        scopes: Sequence[str] | None,
        lifetime: timedelta,
    ) -> None:
        super().__init__(clock, properties=properties, flags=flags, scopes=scopes, lifetime=lifetime)
        self._stage = stage

    def mint(self, org: OrgRef, scopes: frozenset[str]) -> FakeToken:
        wrong = self._stage.asked()
        return super().mint(org if wrong is None else OrgRef(org.id, wrong.org), scopes)
