"""The teller: a thread that writes down what strikes, sees what is over, and tells receivers of both."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

from worker.clock import Clock
from worker.errors import Unavailable
from worker.telemetry.alerts import Alert, Strike, Strikes
from worker.telemetry.events import emit

# Seconds between two looks, and for which what strikes at once is gathered.
LOOK = 2.0
GATHER = 0.25
# Seconds before each further try to deliver an alert; the last of them again and again.
AGAIN = (1.0, 5.0, 30.0, 120.0, 300.0)
# Tries in vain after which that is told (minutes after the first), and after which it is given up (a day).
LATE = 5
MOST_TRIES = 292
# Seconds that the last round may take at the end.
LAST_ROUND = 5.0


class Ledger(Protocol):
    """Where all workers keep what is open, so that a cause is told once and by one of them.

    Each method raises Unavailable where the database does not answer.
    """

    def note(self, strikes: Sequence[Strike]) -> None:
        """Write down what struck; a cause that is not open begins."""
        ...

    def settle(self) -> None:
        """End what is over."""
        ...

    def claim(self) -> tuple[Alert, int] | None:
        """The next alert to be told, for some time by nobody else, and how often it was tried before."""
        ...

    def told(self, alert: Alert) -> None:
        """It needs to be told no more."""
        ...

    def untold(self, alert: Alert, again: float) -> None:
        """It was not taken, and is to be tried again after so many seconds."""
        ...


class Receiver(Protocol):
    def post(self, alert: Alert) -> str | None:
        """Post it once; why it was not taken, or None."""
        ...


class Teller:
    """Needs no loop of the worker. `wake` makes it look soon.

    As long as the receiver takes nothing, it is tried with one alert at a time, the
    oldest; all others wait for that.
    """

    def __init__(self, strikes: Strikes, ledger: Ledger, receiver: Receiver, clock: Clock) -> None:
        self._strikes = strikes
        self._ledger = ledger
        self._receiver = receiver
        self._clock = clock
        self._failures = 0
        self._rest_until = clock.monotonic()
        self._awake = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="teller", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Something struck."""
        self._awake.set()

    def stop(self) -> None:
        """Tell what waits, once each where the receiver takes it, and end."""
        self._stop.set()
        self._awake.set()
        self._thread.join(timeout=LAST_ROUND)

    def round(self) -> None:
        """Look once.

        Raises:
            Unavailable: the database did not answer; nothing is forgotten for that.
        """
        strikes = self._strikes.take()
        if strikes:
            try:
                self._ledger.note(strikes)
            except Exception:
                self._strikes.put_back(strikes)
                raise
        self._ledger.settle()
        while self._clock.monotonic() >= self._rest_until:
            claimed = self._ledger.claim()
            if claimed is None:
                return
            self._deliver(*claimed)

    def _deliver(self, alert: Alert, tries: int) -> None:
        which = {"kind": alert.kind, "status": alert.status, "alert": alert.id}
        fault = self._receiver.post(alert)
        if fault is None:
            self._failures = 0
            self._ledger.told(alert)
            emit("alert.sent", **which)
            return
        self._rest_until = self._clock.monotonic() + _pause(self._failures)
        self._failures += 1
        tries += 1
        if tries == LATE:
            emit("alert.late", **which, error=fault)
        if tries < MOST_TRIES:
            self._ledger.untold(alert, _pause(tries - 1))
        else:
            self._ledger.told(alert)
            emit("alert.undelivered", **which, error=fault)

    def _run(self) -> None:
        while not self._stop.is_set():
            if self._awake.wait(LOOK):
                self._stop.wait(GATHER)
            self._awake.clear()
            try:
                self.round()
            except Unavailable:
                # The database's absence is told elsewhere, and once.
                continue
            except Exception as error:
                emit("loop.failed", loop="alerts", error=type(error).__name__)


def _pause(failures: int) -> float:
    return AGAIN[min(failures, len(AGAIN) - 1)]
