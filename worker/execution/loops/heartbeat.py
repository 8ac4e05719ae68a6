"""Heartbeat: renews the worker's lease from its own thread and connection.

A loop blocked by a handler, a full disk or a slow provider must not cost the lease. The thread sleeps on
the monotonic clock, so a wall clock that jumps back changes nothing.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol

from worker.clock import Clock
from worker.errors import Unavailable
from worker.execution.attempts.inflight import InflightRuns
from worker.execution.loops.reconciler import Renewal
from worker.runs.lease import Lease
from worker.runs.run import OwnedRun
from worker.telemetry.events import emit

# Seconds until a failed renewal is retried, and between two events about that.
RETRY = 0.5
QUIET = 5.0


class LeaseStore(Protocol):
    def renew(self) -> tuple[bool, Sequence[OwnedRun]]:
        """Extend the lease; return whether it was still ours, and the runs this incarnation owns."""
        ...


class Heartbeat:
    """Renews every `renew` seconds; each renewal lasts for `lease` from the moment of the request.

    `on_lease` is called in the heartbeat's thread with the renewed lease, if everything that was held is
    still ours: runs that are not must be killed first, or they would be thawed. `on_renewal` is called on
    the loop, to reconcile.
    """

    def __init__(
        self,
        store: LeaseStore,
        inflight_runs: InflightRuns,
        clock: Clock,
        *,
        lease: timedelta,
        renew: float,
        on_lease: Callable[[Lease], None],
        on_renewal: Callable[[Renewal], None],
    ) -> None:
        self._store = store
        self._inflight_runs = inflight_runs
        self._clock = clock
        self.lease = Lease.begun(lease, clock.monotonic())
        self._renew = renew
        self._on_lease = on_lease
        self._on_renewal = on_renewal
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._late_emitted_at = float("-inf")

    def begin(self) -> None:
        """Start the lease now: it was registered just before."""
        self.lease = Lease.begun(self.lease.duration, self._clock.monotonic())
        self._on_lease(self.lease)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread; renewals are passed to `loop`."""
        self.begin()
        self._thread = threading.Thread(target=self._run, args=(loop,), name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread; the caller ends the lease itself."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=self.lease.duration.total_seconds())

    def may_recover(self) -> bool:
        """Whether contact has lasted for a whole lease, so that living owners have renewed first."""
        return self.lease.may_recover(self._clock.monotonic())

    def beat(self) -> Renewal | None:
        """Renew once; None if the database did not answer."""
        try:
            return self._renew_once()
        except Unavailable as error:
            self._emit_late(error)
        except Exception as error:
            emit("loop.failed", loop="heartbeat", error=f"{type(error).__name__}: {error}")
        self.lease = self.lease.missed()
        return None

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        pause = self._renew
        while not self._stop.wait(pause):
            renewal = self.beat()
            # Retry soon after an outage: while its lease is expired, this worker is not given runs.
            pause = self._renew if renewal is not None else min(self._renew, RETRY)
            if renewal is not None and not loop.is_closed():
                loop.call_soon_threadsafe(self._on_renewal, renewal)

    def _emit_late(self, error: Unavailable) -> None:
        now = self._clock.monotonic()
        if now - self._late_emitted_at >= QUIET:
            self._late_emitted_at = now
            emit("lease.late", error=error.code, remaining=round(self.lease.expires_at - now, 1))

    def _renew_once(self) -> Renewal:
        # Before the statement: a run that is admitted in between is held, but not yet in its answer.
        held = self._inflight_runs.fencing_tokens()
        asked = self._clock.monotonic()
        registered, owned = self._store.renew()
        answered = self._clock.monotonic()
        if asked >= self.lease.expires_at or not registered:
            emit("lease.lost", late=round(asked - self.lease.expires_at, 1))
        self.lease = self.lease.renewed(asked, answered) if registered else self.lease.missed()
        renewal = Renewal(held, owned, registered, self.lease)
        if renewal.all_ours:
            self._on_lease(renewal.lease)
        return renewal
