"""The breaker of one issuer: it opens when many orgs get no answer, and never holds up a healthy org.

**When it opens.** An org that was answered last time, or never asked, and now gets no
answer is a sign of an outage. An org whose last request failed as well is not: its own
application may be broken. Of the newest 20 orgs of the last 10 s, half of at least five
open the breaker; of fewer than five, all of at least two.

**Who may ask while it is open.** An org whose last request did not fail asks at once, one
request at a time, so a breaker that opened by mistake costs healthy orgs nothing and an
outage costs one request for each org that needs a token. Orgs whose last request failed
take turns: one request every 4 s, later every 15 s. Once 100 orgs in a row have failed
without one answer, healthy orgs take turns as well, one every 4 s and before the others.

**When it closes.** When an org that failed is answered, or when fewer than a quarter of
the newest orgs fail. A rejected secret, a refused scope and a throttle are answers too.

The state is a number for each org that failed, and the newest 20 outcomes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from worker.clock import Clock
from worker.errors import CredentialsRejected, IssuerUnavailable, RequestRejected, Throttled
from worker.telemetry.events import emit
from worker.tokens.budget import BudgetPaused

WINDOW_ORGS, WINDOW_SECONDS = 20, 10.0
FEW = 5  # with fewer orgs in the window, all must fail, and at least PAIR
PAIR = 2
OPEN_SHARE, CLOSE_SHARE = 0.5, 0.25  # of the orgs in the window
CERTAIN = 100  # failures in a row, each of another org: no org can be expected to be healthy
# Seconds between two turns: a share of the time that the breaker has been open, within limits.
TURN_FIRST, TURN_LAST, TURN_SHARE = 4.0, 15.0, 0.25
# Orgs that must wait come back this often a second, all together, and each after a minute at most.
RETURNS, RETURN_LAST = 20.0, 60.0
RETURN_LATE = 1.5  # a run may come back this much later than it was asked to
MAX_ORGS = 10_000

V = TypeVar("V")


class IssuerPaused(IssuerUnavailable):
    """Nothing was sent: the issuer failed for this org and others, and is left alone for a while."""

    code = "issuer_paused"


class _Outcome(NamedTuple):
    at: float
    failed: bool


class Breaker:
    """The outcomes of one issuer's requests by org, and who may ask. Times are monotonic."""

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
        """Whether no other org shows an outage, so that trying again at once costs little."""
        since = self._clock.monotonic() - WINDOW_SECONDS
        others = (seen for name, seen in self._window.items() if name != org)
        return not self.is_open and not any(seen.failed and seen.at > since for seen in others)

    def check(self, org: str) -> None:
        """Raise IssuerPaused if a request of this org would not be let through now."""
        if self._opened_at is None:
            return
        now = self._clock.monotonic()
        healthy = org not in self._failed
        if org not in self._asking:
            if healthy and self._failed_in_row < CERTAIN:
                return
            if now >= self._next_turn and (healthy or now >= self._healthy_waits_until):
                return
        paused = IssuerPaused(f"issuer {self._issuer} is not responding; this org asks again later")
        if org in self._asking:
            paused.retry_after = 1.0  # its request under way ends soon
        else:
            paused.retry_after = self._return_in(org, now)
            if healthy:
                self._healthy_waits_until = now + paused.retry_after * RETURN_LATE
        raise paused

    @contextmanager
    def watch(self, org: str) -> Iterator[None]:
        """Let one request through, and count how it ends.

        Raises:
            IssuerPaused: the breaker is open, and it is not this org's turn.
        """
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
        except IssuerUnavailable:
            self._note_failure(org, asked_at)
            raise
        except (CredentialsRejected, RequestRejected, Throttled):
            self._note_answer(org)
            raise
        else:
            self._note_answer(org)
        finally:
            if probes:
                self._asking.discard(org)

    def _note_answer(self, org: str) -> None:
        recovers = self._failed.pop(org, None) is not None
        self._failed_in_row = 0
        self._note(org, failed=False)
        if not self.is_open or not (recovers or self._share() < CLOSE_SHARE):
            return
        if recovers:
            # What failed until now, the outage explains: each org is as good as new.
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
        _remember(self._failed, org, now, MAX_ORGS)
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
        """Make it the newest outcome; while the breaker is open none grows too old."""
        now = self._clock.monotonic()
        _remember(self._window, org, _Outcome(now, failed), WINDOW_ORGS)
        while not self.is_open and next(iter(self._window.values())).at <= now - WINDOW_SECONDS:
            self._window.popitem(last=False)

    def _share(self) -> float:
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
        """Seconds after which the org may come back, whichever of its runs asks."""
        return_at = self._returns.get(org, 0.0)
        if return_at <= now:
            self._last_return = max(self._last_return + 1 / RETURNS, now + TURN_FIRST)
            return_at = min(self._last_return, now + RETURN_LAST)
            _remember(self._returns, org, return_at, MAX_ORGS)
        return max(return_at - now, 1.0)


def _remember(memory: OrderedDict[str, V], org: str, value: V, most: int) -> None:
    """Add to a memory that holds a bounded number of orgs, the newest."""
    memory[org] = value
    memory.move_to_end(org)
    while len(memory) > most:
        memory.popitem(last=False)
