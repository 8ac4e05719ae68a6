"""Circuit breaker: pauses requests to an issuer that fails for many orgs, and lets them return one by one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from worker.bounded import remember
from worker.clock import Clock
from worker.errors import (
    AnswerTooLarge,
    CredentialsRejected,
    IssuerUnavailable,
    RequestRejected,
    Throttled,
)
from worker.telemetry.events import emit
from worker.tokens.budget import BudgetPaused

MAX_ORGS = 10_000
WINDOW_ORGS = 20
WINDOW_SECONDS = 10.0
FEW = 5  # with fewer orgs in the window, all must fail, and at least PAIR
PAIR = 2
# Of the orgs in the window.
OPEN_SHARE = 0.5
CLOSE_SHARE = 0.25
CERTAIN = 100  # failures in a row of different orgs: no org can be expected to be healthy
# Seconds between two turns: a share of the time that the breaker has been open, within limits.
TURN_FIRST = 4.0
TURN_LAST = 15.0
TURN_SHARE = 0.25
# Waiting orgs return at this rate per second in total, and each after this many seconds at most.
RETURNS = 20.0
RETURN_LAST = 60.0
RETURN_LATE = 1.5  # a run may wait longer than requested by this factor


class IssuerPaused(IssuerUnavailable):
    """Nothing was sent: the issuer failed for this org and others, and the breaker is open."""

    code = "issuer_paused"


class _Outcome(NamedTuple):
    at: float
    failed: bool


class Breaker:
    """Decides from the outcomes of one issuer's requests by org who may ask. Times are monotonic."""

    def __init__(self, issuer: str, *, clock: Clock) -> None:
        self._issuer = issuer
        self._clock = clock
        self._failed: OrderedDict[str, float] = OrderedDict()
        self._window: OrderedDict[str, _Outcome] = OrderedDict()
        self._failed_in_row = 0
        self._recovered_at = 0.0
        self._opened_at: float | None = None
        self._asking: set[str] = set()
        self._next_turn = 0.0
        self._healthy_waits_until = 0.0
        self._returns: OrderedDict[str, float] = OrderedDict()
        self._last_return = 0.0

    @property
    def is_open(self) -> bool:
        """Whether requests that can wait, such as an early renewal, should."""
        return self._opened_at is not None

    def doubts(self, org: str) -> bool:
        """Whether the org's last request failed."""
        return org in self._failed

    def fails_alone(self, org: str) -> bool:
        """Whether no other org shows an outage, so that an immediate retry costs little."""
        since = self._clock.monotonic() - WINDOW_SECONDS
        others = (seen for name, seen in self._window.items() if name != org)
        return not self.is_open and not any(seen.failed and seen.at > since for seen in others)

    def check(self, org: str) -> None:
        """Raise IssuerPaused if the breaker is open, and it is not this org's turn."""
        if self._opened_at is None:
            return
        now, healthy = self._clock.monotonic(), org not in self._failed
        paused = IssuerPaused(f"issuer {self._issuer} is not responding; this org asks again later")
        if org in self._asking:
            paused.retry_after = 1.0  # its current request ends soon
            raise paused
        if healthy and self._failed_in_row < CERTAIN:
            return
        if now >= self._next_turn and (healthy or now >= self._healthy_waits_until):
            return
        paused.retry_after = self._return_in(org, now)
        if healthy:
            self._healthy_waits_until = now + paused.retry_after * RETURN_LATE
        raise paused

    @contextmanager
    def watch(self, org: str) -> Iterator[None]:
        """Let one request through, and record its outcome; raises as `check` does."""
        self.check(org)
        asked_at = self._clock.monotonic()
        probes = self._opened_at is not None
        if probes:
            self._asking.add(org)
            if org in self._failed or self._failed_in_row >= CERTAIN:
                self._next_turn = asked_at + self._turn(org)
        try:
            yield
        except BudgetPaused:
            raise  # nothing was sent
        except (CredentialsRejected, RequestRejected, Throttled, AnswerTooLarge):
            self._note_response(org)
            raise
        except IssuerUnavailable:
            self._note_failure(org, asked_at)
            raise
        else:
            self._note_response(org)
        finally:
            if probes:
                self._asking.discard(org)

    def _note_response(self, org: str) -> None:
        recovers = self._failed.pop(org, None) is not None
        self._failed_in_row = 0
        self._note(org, failed=False)
        if not self.is_open or not (recovers or self._share() < CLOSE_SHARE):
            return
        if recovers:
            # The outage explains all failures until now.
            self._recovered_at = self._clock.monotonic()
            self._failed.clear()
            self._window.clear()
        self._opened_at = None
        self._returns.clear()
        self._last_return = self._healthy_waits_until = 0.0
        emit("issuer.resumed", issuer=self._issuer)

    def _note_failure(self, org: str, asked_at: float) -> None:
        if asked_at < self._recovered_at:
            return  # sent during an outage that is over
        now = self._clock.monotonic()
        is_sign = org not in self._failed
        remember(self._failed, org, now, MAX_ORGS)
        if not is_sign:
            return
        self._failed_in_row += 1
        self._note(org, failed=True)
        if self.is_open:
            self._next_turn = max(self._next_turn, now + self._turn(org))
        elif self._is_outage():
            self._opened_at = now
            self._next_turn = now + TURN_FIRST
            emit("issuer.paused", issuer=self._issuer, error="unavailable", seconds=TURN_FIRST)

    def _note(self, org: str, *, failed: bool) -> None:
        """Add the newest outcome; old ones leave the window only while the breaker is closed."""
        now = self._clock.monotonic()
        remember(self._window, org, _Outcome(now, failed), WINDOW_ORGS)
        while not self.is_open and next(iter(self._window.values())).at <= now - WINDOW_SECONDS:
            self._window.popitem(last=False)

    def _share(self) -> float:
        """The share of failed orgs in the window."""
        return sum(seen.failed for seen in self._window.values()) / len(self._window)

    def _is_outage(self) -> bool:
        if len(self._window) < FEW:
            return len(self._window) >= PAIR and self._share() == 1.0
        return self._share() >= OPEN_SHARE

    def _turn(self, org: str) -> float:
        """Seconds from this org's turn to the next one."""
        if org not in self._failed or self._opened_at is None:
            return TURN_FIRST
        open_for = self._clock.monotonic() - self._opened_at
        return min(max(TURN_FIRST, open_for * TURN_SHARE), TURN_LAST)

    def _return_in(self, org: str, now: float) -> float:
        """Seconds after which the org may return; the same for all of its runs."""
        return_at = self._returns.get(org, 0.0)
        if return_at <= now:
            self._last_return = max(self._last_return + 1 / RETURNS, now + TURN_FIRST)
            return_at = min(self._last_return, now + RETURN_LAST)
            remember(self._returns, org, return_at, MAX_ORGS)
        return max(return_at - now, 1.0)
