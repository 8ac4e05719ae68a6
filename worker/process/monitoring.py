"""Monitoring of a worker process: alerts, overdue schedules, the dead man's switch and traces."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import httpx

from worker.clock import Clock
from worker.errors import Unavailable
from worker.settings.sections import AlertSettings
from worker.store import alerts
from worker.store.database import Database
from worker.store.health import oldest_unfired
from worker.telemetry import events
from worker.telemetry.alerts import Alert, Strikes, Webhook
from worker.telemetry.events import emit
from worker.threads import SYSTEM, Threads

# Seconds between two rounds, and seconds in which simultaneous causes are collected.
ROUND_EVERY = 2.0
COLLECT = 0.25
# Seconds before each retry of a delivery; the last one repeats.
RETRY_DELAYS = (1.0, 5.0, 30.0, 120.0, 300.0)
# Failed attempts before `alert.late` (after minutes), and before the alert is given up (after a day).
LATE = 5
MAX_ATTEMPTS = 292
# Seconds for the last round at the end of the process.
LAST_ROUND = 5.0
# The overdue monitor looks this often in `[alerts] overdue`.
LOOKS = 4


class LoopHealth(Protocol):
    def draining(self) -> bool:
        """Whether the worker is stopping."""

    def stalled(self) -> list[str]:
        """The loops that do not tick; none during a drain."""


@contextlib.contextmanager
def monitoring(
    settings: AlertSettings,
    database: Database,
    clock: Clock,
    health: LoopHealth,
    threads: Threads = SYSTEM,
) -> Iterator[None]:
    """Run the overdue monitor and, if a webhook is configured, deliver alerts, in threads of their own."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(alerting(settings, database, clock, threads))
        monitor = OverdueMonitor(partial(_oldest_unfired, database), clock, settings, health, threads=threads)
        monitor.start()
        stack.callback(monitor.stop)
        yield


@contextlib.contextmanager
def alerting(
    settings: AlertSettings, database: Database, clock: Clock, threads: Threads = SYSTEM
) -> Iterator[None]:
    """If a webhook is configured, deliver alerts, in a thread of its own."""
    if not settings.webhook_url:
        yield
        return
    with contextlib.ExitStack() as stack:
        webhook = Webhook(settings.webhook_url, settings.webhook_secret, clock)
        stack.callback(webhook.close)
        overdue = settings.overdue.total_seconds()
        dispatcher = AlertDispatcher(database, webhook, clock, overdue=overdue, threads=threads)
        dispatcher.start()
        stack.callback(dispatcher.stop)
        stack.callback(events.listen(dispatcher.strikes.hear))
        yield


class AlertDispatcher:
    """Stores the causes that events report, and delivers the alerts that follow from them.

    The alerts are shared by all workers: one of them claims and delivers each. While the receiver
    does not accept alerts, only the oldest one is retried.
    """

    def __init__(
        self,
        database: Database,
        webhook: Webhook,
        clock: Clock,
        *,
        overdue: float,
        threads: Threads = SYSTEM,
    ) -> None:
        self._database = database
        self._webhook = webhook
        self._clock = clock
        self._overdue = overdue
        self._failures = 0
        self._pause_until = clock.monotonic()
        self._threads = threads
        self._awake, self._stop = threads.flag(), threads.flag()
        self._thread: threading.Thread | None = None
        self.strikes = Strikes(clock, self._awake.set)

    def start(self) -> None:
        self._thread = self._threads.start("alerts", self._run)

    def stop(self) -> None:
        """Try to deliver the remaining alerts once, then end."""
        self._stop.set()
        self._awake.set()
        if self._thread is not None:
            self._thread.join(timeout=LAST_ROUND)

    def round(self) -> None:
        """Store new causes, end those that are over, deliver what is pending.

        Raises Unavailable if the database does not respond; the next round stores the causes then.
        """
        strikes = self.strikes.take()
        if strikes:
            try:
                with self._database.transaction() as connection:
                    alerts.note(connection, strikes)
            except Exception:
                self.strikes.put_back(strikes)
                raise
        if self._is_any():
            with self._database.transaction() as connection:
                alerts.resolve_ended(connection, overdue=self._overdue)
        # A write transaction blocks other writers of SQLite, so it is used only if there are alerts.
        while self._clock.monotonic() >= self._pause_until and self._is_any():
            with self._database.transaction() as connection:
                claimed = alerts.claim(connection)
            if claimed is None:
                return
            self._deliver(*claimed)

    def _is_any(self) -> bool:
        with self._database.autocommit() as connection:
            return alerts.is_any(connection)

    def _deliver(self, alert: Alert, attempts: int) -> None:
        fields = {"kind": alert.kind, "status": alert.status, "alert": alert.id}
        fault = self._webhook.post(alert)
        if fault is None:
            self._failures = 0
            self._close(alert)
            emit("alert.sent", **fields)
            return
        self._pause_until = self._clock.monotonic() + _retry_delay(self._failures)
        self._failures += 1
        attempts += 1
        if attempts == LATE:
            emit("alert.late", **fields, error=fault)
        if attempts < MAX_ATTEMPTS:
            with self._database.transaction() as connection:
                alerts.retry_later(connection, alert, _retry_delay(attempts - 1))
        else:
            self._close(alert)
            emit("alert.undelivered", **fields, error=fault)

    def _close(self, alert: Alert) -> None:
        with self._database.transaction() as connection:
            alerts.mark_delivered(connection, alert)

    def _run(self) -> None:
        stopping = False
        while not stopping:
            if self._awake.wait(ROUND_EVERY):
                self._stop.wait(COLLECT)
            self._awake.clear()
            # Before the round: a cause that comes up during it belongs to another one.
            stopping = self._stop.is_set()
            try:
                self.round()
            except Unavailable:
                # `database.lost` reports it.
                continue
            except Exception as error:
                emit("loop.failed", loop="alerts", error=type(error).__name__)


def _retry_delay(failures: int) -> float:
    return RETRY_DELAYS[min(failures, len(RETRY_DELAYS) - 1)]


@dataclass(eq=False, repr=False)
class OverdueMonitor:
    """Reports schedules that no worker fires, and gives the sign of life to the dead man's switch.

    `schedule.overdue` needs two consecutive looks that find the same lateness, so it comes within
    twice the setting, and a database that has just come back raises no alarm. `oldest` returns the
    org, the definition and the lateness in seconds of the schedule that is due for longest.
    """

    oldest: Callable[[], tuple[str, str, float] | None]
    clock: Clock
    settings: AlertSettings
    health: LoopHealth
    client: httpx.Client | None = None
    threads: Threads = SYSTEM
    _seen_before: bool = field(default=False, init=False)
    _reported: bool = field(default=False, init=False)
    _ping_failed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._overdue = self.settings.overdue.total_seconds()
        self._ping_at = self.clock.monotonic()
        self._stop = self.threads.flag()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = self.threads.start("overdue monitor", self._run)

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    def look(self) -> None:
        """Check once. Reports nothing in a drain or while the database is unavailable."""
        if self.health.draining():
            return
        try:
            found = self.oldest()
        except Unavailable:
            self._seen_before = False
            return
        late = found is not None and found[2] >= self._overdue
        if found is not None and late and self._seen_before and not self._reported:
            self._reported = True
            org, definition, seconds = found
            emit("schedule.overdue", org=org, definition=definition, seconds=round(seconds, 1))
        elif not late and self._reported:
            self._reported = False
            emit("schedule.caught_up")
        self._seen_before = late

    def ping(self) -> None:
        """Give the sign of life if it is due and all loops tick."""
        now = self.clock.monotonic()
        if not self.settings.deadman_url or now < self._ping_at or self.health.stalled():
            return
        self._ping_at = now + self.settings.deadman_every.total_seconds()
        if self.client is None:  # to open one takes 20 ms, and most workers have no such switch
            self.client = httpx.Client(timeout=5.0)
        try:
            self.client.get(self.settings.deadman_url).raise_for_status()
            self._ping_failed = False
        except httpx.HTTPError as error:
            if not self._ping_failed:
                emit("deadman.failed", error=type(error).__name__)
            self._ping_failed = True

    def _run(self) -> None:
        pause = self._overdue / LOOKS
        if self.settings.deadman_url:
            pause = min(pause, self.settings.deadman_every.total_seconds())
        while not self._stop.wait(pause):
            for step in (self.look, self.ping):
                try:
                    step()
                except Exception as error:
                    emit("loop.failed", loop="watchman", error=type(error).__name__)
        if self.client is not None:
            self.client.close()


def _oldest_unfired(database: Database) -> tuple[str, str, float] | None:
    with database.autocommit() as connection:
        return oldest_unfired(connection)
