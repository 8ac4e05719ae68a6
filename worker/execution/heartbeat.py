"""Heartbeat: renews the worker's lease on its own thread and connection.

A loop blocked by a handler, a full disk of logs or a slow provider must not cost
the lease; so this is a thread with a connection of its own, and it sleeps on the
monotonic clock: a wall clock that jumps back changes nothing.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from worker.clock import Clock
from worker.errors import Unavailable
from worker.execution.holdings import Holdings
from worker.execution.reconcile import Renewal
from worker.runs.run import OwnedRun
from worker.telemetry.events import emit

# Seconds before a renewal that failed is tried again.
AGAIN = 0.5
# Seconds between two words about a lease that cannot be renewed.
QUIET = 5.0


class LeaseStore(Protocol):
    def renew(self) -> tuple[bool, Sequence[OwnedRun]]:
        """Extend the lease; whether it was still ours, and the runs this incarnation owns."""
        ...


class Heartbeat:
    """Renews every `renew` seconds for `lease` seconds from the moment of asking.

    `on_lease` is called in the heartbeat's thread with the monotonic instant until
    which the lease holds, and only where all that was held is still ours: what is not
    must be killed first, or it would be thawed. `on_renewal` in the loop, to reconcile.
    """

    def __init__(
        self,
        store: LeaseStore,
        holdings: Holdings,
        clock: Clock,
        *,
        lease: float,
        renew: float,
        on_lease: Callable[[float], None],
        on_renewal: Callable[[Renewal], None],
    ) -> None:
        self._store = store
        self._holdings = holdings
        self._clock = clock
        self._lease = lease
        self._renew = renew
        self._on_lease = on_lease
        self._on_renewal = on_renewal
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.until = 0.0
        self.contact_since: float | None = None
        self._late_told_at = float("-inf")

    def begin(self) -> None:
        """Count from now: the lease was registered just before."""
        self.contact_since = self._clock.monotonic()
        self.until = self.contact_since + self._lease
        self._on_lease(self.until)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to renew, in a thread of its own; renewals are handed to `loop`."""
        self.begin()
        self._thread = threading.Thread(target=self._run, args=(loop,), name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; the caller ends the lease itself."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=self._lease)

    def unbroken_contact(self) -> float:
        """Seconds since which every renewal has come through in time; 0 once the lease has passed."""
        since, now = self.contact_since, self._clock.monotonic()
        # A worker that was stopped finds its contact broken before its next renewal does.
        return 0.0 if since is None or now > self.until else now - since

    def beat(self) -> Renewal | None:
        """Renew once; None where the database did not answer."""
        try:
            return self._renew_once()
        except Unavailable as error:
            self._tell_late(error)
        except Exception as error:
            emit("loop.failed", loop="heartbeat", error=f"{type(error).__name__}: {error}")
        self.contact_since = None
        return None

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        pause = self._renew
        while not self._stop.wait(pause):
            renewal = self.beat()
            # Soon again after an outage: with its lease passed, this worker is given nothing to run.
            pause = self._renew if renewal is not None else min(self._renew, AGAIN)
            if renewal is not None and not loop.is_closed():
                loop.call_soon_threadsafe(self._on_renewal, renewal)

    def _tell_late(self, error: Unavailable) -> None:
        now = self._clock.monotonic()
        if now - self._late_told_at >= QUIET:
            self._late_told_at = now
            emit("lease.late", error=error.code, remaining=round(self.until - now, 1))

    def _renew_once(self) -> Renewal:
        # Before the statement: an admission that comes in between is held, not yet owned here.
        held = self._holdings.fences()
        asked = self._clock.monotonic()
        registered, owned = self._store.renew()
        answered = self._clock.monotonic()
        # Counted from the question, so that our idea of the lease never outlasts the database's.
        if asked > self.until or not registered:
            emit("lease.lost", late=round(asked - self.until, 1))
            self.contact_since = answered
        elif self.contact_since is None:
            self.contact_since = answered
        renewal = Renewal(held, owned, registered, asked + self._lease)
        if registered:
            self.until = renewal.until
        if renewal.all_ours:
            self._on_lease(renewal.until)
        return renewal
