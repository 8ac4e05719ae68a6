"""The breaker of one issuer: it opens on transient failures only, and one request at a time tests it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from worker.clock import Clock
from worker.errors import CredentialsRejected, IssuerUnavailable, RequestRejected, Throttled
from worker.telemetry.events import emit

FAILURES = 3  # in a row
ORGS = 2  # so that one org's broken application does not stop the others
OPEN_FIRST, OPEN_LAST = 15.0, 60.0
ASKED_LONGEST = 300.0  # what a Retry-After can make of it


class IssuerPaused(IssuerUnavailable):
    """Nothing was sent: the issuer failed a moment ago and is left alone for a while."""

    code = "issuer_paused"


class Breaker:
    """Counts failures in a row over all orgs of an issuer.

    Open, it lets nothing through until its time is up, then one request; each
    failure of that one doubles the time. Any answer that is not a failure closes it:
    a rejected secret or a refused scope says that the issuer is well.
    """

    def __init__(self, issuer: str, *, clock: Clock) -> None:
        self._issuer = issuer
        self._clock = clock
        self._failures = 0
        self._orgs: set[str] = set()
        self._openings = 0
        self._open_until = 0.0
        self._probing = False

    def check(self) -> None:
        """Raise IssuerPaused if a request would not be let through now."""
        left = self._open_until - self._clock.monotonic()
        if self._openings and (left > 0 or self._probing):
            paused = IssuerPaused(f"issuer {self._issuer} does not answer and is left alone for a while")
            # While a probe is under way its outcome is worth waiting for.
            paused.retry_after = max(left, 1.0)
            raise paused

    @contextmanager
    def watch(self, org: str) -> Iterator[None]:
        """Let one request through, and count how it ends.

        Raises:
            IssuerPaused: the breaker is open.
        """
        self.check()
        probe = self._openings > 0
        self._probing = probe
        try:
            yield
        except IssuerUnavailable as failure:
            self._failed(org, probe, failure.retry_after or 0.0)
            raise
        except (CredentialsRejected, RequestRejected, Throttled):
            self._answered()
            raise
        else:
            self._answered()
        finally:
            if probe:
                self._probing = False

    def _answered(self) -> None:
        if self._openings:
            emit("issuer.resumed", issuer=self._issuer)
        self._failures, self._openings = 0, 0
        self._orgs.clear()

    def _failed(self, org: str, probe: bool, asked: float) -> None:
        self._failures += 1
        if len(self._orgs) < ORGS:
            self._orgs.add(org)
        if not probe and (self._openings or self._failures < FAILURES or len(self._orgs) < ORGS):
            return
        seconds = max(min(OPEN_FIRST * 2**self._openings, OPEN_LAST), min(asked, ASKED_LONGEST))
        self._openings = min(self._openings + 1, 10)
        self._open_until = self._clock.monotonic() + seconds
        emit("issuer.paused", issuer=self._issuer, error="unavailable", seconds=round(seconds, 1))
