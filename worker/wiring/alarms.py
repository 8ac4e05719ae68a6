"""The alarms of a worker process: who watches, who is told, from threads of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from worker.clock import Clock
from worker.settings import Settings
from worker.settings.sections import AlertSettings
from worker.store import alerts, health
from worker.store.database import Database
from worker.telemetry import events
from worker.telemetry.alerts import Alert, Strike, Strikes
from worker.telemetry.teller import Teller
from worker.telemetry.watchman import Deadman, Unfired, Watchman
from worker.telemetry.webhook import Webhook
from worker.web.health import Health


@contextlib.contextmanager
def alarms(settings: Settings, database: Database, clock: Clock, asked: Health) -> Iterator[None]:
    """Watch for as long as the block lasts."""
    wanted = settings.alerts

    def oldest() -> Unfired | None:
        with database.autocommit() as connection:
            found = health.oldest_unfired(connection)
        return None if found is None else Unfired(*found)

    watchman = Watchman(
        oldest,
        clock,
        overdue=wanted.overdue.total_seconds(),
        resting=asked.draining,
        alive=lambda: not asked.stalled(),
        deadman=Deadman(wanted.deadman_url, wanted.deadman_every.total_seconds())
        if wanted.deadman_url
        else None,
    )
    with _told(wanted, database, clock):
        watchman.start()
        try:
            yield
        finally:
            watchman.stop()


class SharedLedger:
    """The alerts in the database, for a thread that is no loop of the worker."""

    def __init__(self, database: Database, overdue: float) -> None:
        self._database = database
        self._overdue = overdue

    def note(self, strikes: Sequence[Strike]) -> None:
        with self._database.transaction() as connection:
            alerts.note(connection, strikes)

    def settle(self) -> None:
        if self._is_any():
            with self._database.transaction() as connection:
                alerts.settle(connection, overdue=self._overdue)

    def claim(self) -> tuple[Alert, int] | None:
        # Most of the time there is none, and to look for it should keep no writer waiting.
        if not self._is_any():
            return None
        with self._database.transaction() as connection:
            return alerts.claim(connection)

    def told(self, alert: Alert) -> None:
        with self._database.transaction() as connection:
            alerts.told(connection, alert)

    def untold(self, alert: Alert, again: float) -> None:
        with self._database.transaction() as connection:
            alerts.untold(connection, alert, again)

    def _is_any(self) -> bool:
        with self._database.autocommit() as connection:
            return alerts.is_any(connection)


@contextlib.contextmanager
def _told(wanted: AlertSettings, database: Database, clock: Clock) -> Iterator[None]:
    """Where a webhook is wanted, it is told of what strikes."""
    if not wanted.webhook_url:
        yield
        return
    strikes = Strikes(clock, lambda: teller.wake())
    webhook = Webhook(wanted.webhook_url, wanted.webhook_secret, clock)
    teller = Teller(strikes, SharedLedger(database, wanted.overdue.total_seconds()), webhook, clock)
    unheard = events.listen(strikes.hear)
    teller.start()
    try:
        yield
    finally:
        unheard()
        teller.stop()
        webhook.close()
