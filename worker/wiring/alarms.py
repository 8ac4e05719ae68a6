"""The alarms of a worker process: who watches, who is told, from threads of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from worker.clock import Clock
from worker.settings import Settings
from worker.store import health
from worker.store.database import Database
from worker.telemetry import events
from worker.telemetry.alerts import Alerts
from worker.telemetry.watchman import Deadman, Unfired, Watchman
from worker.telemetry.webhook import Webhook
from worker.web.health import Health


@contextlib.contextmanager
def alarms(settings: Settings, database: Database, clock: Clock, asked: Health) -> Iterator[None]:
    """Watch for as long as the block lasts."""
    wanted = settings.alerts
    webhook = Webhook(wanted.webhook_url, wanted.webhook_secret, clock) if wanted.webhook_url else None
    alerts = Alerts(clock, webhook.send if webhook else lambda alert: None)

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
        chore=alerts.tidy,
        deadman=Deadman(wanted.deadman_url, wanted.deadman_every.total_seconds())
        if wanted.deadman_url
        else None,
    )
    unheard = events.listen(alerts.take) if webhook else lambda: None
    if webhook:
        webhook.start()
    watchman.start()
    try:
        yield
    finally:
        watchman.stop()
        unheard()
        if webhook:
            webhook.stop()
