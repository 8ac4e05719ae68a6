"""Heartbeat: renews the worker's lease from its own thread and connection.

A loop blocked by a handler, a full disk or a slow provider must not cost the lease. The thread sleeps on
the monotonic clock, so a wall clock that jumps back changes nothing.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Protocol

from worker.clock import Clock
from worker.engine.attempt.inflight import InflightRuns
from worker.engine.loops.reconciler import Renewal
from worker.errors import Unavailable
from worker.model.runs.lease import Lease
from worker.model.runs.run import OwnedRun
from worker.telemetry.events import emit
from worker.threads import SYSTEM, Threads

# Seconds until a failed renewal is retried, and between two events about that.
RETRY = 0.5
QUIET = 5.0


class LeaseStore(Protocol):
    def renew(self) -> tuple[bool, Sequence[OwnedRun]]:
        """Extend the lease; return whether it was still ours, and the runs this incarnation owns."""


@dataclass(eq=False, repr=False)
class Heartbeat:
    """Renews every `renew` seconds; each renewal lasts for `duration` from the moment of the request.

    `on_lease` is called in this thread if all held runs are still ours: others must be killed first, or they
    would be thawed. `on_renewal` is called on the loop, to reconcile.
    """

    store: LeaseStore
    inflight_runs: InflightRuns
    clock: Clock
    duration: timedelta
    renew: float
    on_lease: Callable[[Lease], None]
    on_renewal: Callable[[Renewal], None]
    threads: Threads = SYSTEM
    _thread: threading.Thread | None = None
    _late_emitted_at: float = float("-inf")

    def __post_init__(self) -> None:
        self._stop = self.threads.flag()
        self.lease = Lease.begun(self.duration, self.clock.monotonic())

    def begin(self) -> None:
        """Start the lease now: it was registered just before."""
        self.lease = Lease.begun(self.duration, self.clock.monotonic())
        self.on_lease(self.lease)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread; renewals are passed to `loop`."""
        self.begin()
        self._thread = self.threads.start("heartbeat", partial(self._run, loop))

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=self.duration.total_seconds())

    def may_recover(self) -> bool:
        """Whether contact has lasted for a whole lease, so that living owners have renewed first."""
        return self.lease.may_recover(self.clock.monotonic())

    def beat(self) -> Renewal | None:
        """Renew once; None if the database did not answer."""
        try:
            return self._renew_once()
        except Unavailable as error:
            now = self.clock.monotonic()
            if now - self._late_emitted_at >= QUIET:
                self._late_emitted_at = now
                emit("lease.late", error=error.code, remaining=round(self.lease.expires_at - now, 1))
        except Exception as error:
            emit("loop.failed", loop="heartbeat", error=f"{type(error).__name__}: {error}")
        self.lease = self.lease.missed()
        return None

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        pause = self.renew
        while not self._stop.wait(pause):
            renewal = self.beat()
            # Retry soon after an outage: while its lease is expired, this worker is not given runs.
            pause = self.renew if renewal is not None else min(self.renew, RETRY)
            if renewal is not None and not loop.is_closed():
                loop.call_soon_threadsafe(self.on_renewal, renewal)

    def _renew_once(self) -> Renewal:
        # Before the statement: a run that is admitted in between is held, but not yet in its answer.
        held = self.inflight_runs.fencing_tokens()
        asked = self.clock.monotonic()
        registered, owned = self.store.renew()
        answered = self.clock.monotonic()
        if asked >= self.lease.expires_at or not registered:
            emit("lease.lost", late=round(asked - self.lease.expires_at, 1))
        self.lease = self.lease.renewed(asked, answered) if registered else self.lease.missed()
        renewal = Renewal(held, owned, registered, self.lease)
        if renewal.all_ours:
            self.on_lease(renewal.lease)
        return renewal
