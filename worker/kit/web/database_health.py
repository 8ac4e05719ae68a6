"""Health of `serve` and `provision`, which have no lease: whether the database can be used."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from worker.errors import ConfigurationError, RolesMissing, Unavailable
from worker.kit.web.health import Health
from worker.telemetry.metrics import Metrics
from worker.telemetry.vitals import Notifier

# Seconds between two database checks, and the timeout of each.
CHECK_EVERY = 5.0


class DatabaseHealth(Health):
    """Ready while the database responds and has this release's schema, which `check` raises otherwise."""

    def __init__(self, metrics: Metrics, check: Callable[[], Awaitable[object]]) -> None:
        super().__init__(metrics)
        self._check = check
        self._lacking: tuple[str, ...] = ("starting",)

    def lacking(self) -> list[str]:
        return list(self._lacking)

    def draining(self) -> bool:
        return self._lacking == ("draining",)

    async def look_until(self, stop: asyncio.Event, notifier: Notifier, *, last: float = 0.0) -> None:
        """Check the database until `stop`; then the process may take `last` seconds more to end."""
        while not stop.is_set():
            await self._look()
            self._report(notifier)
            notifier.alive()
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), CHECK_EVERY)
        self._lacking = ("draining",)
        notifier.stopping(last + CHECK_EVERY)

    async def _look(self) -> None:
        try:
            async with asyncio.timeout(CHECK_EVERY):
                await self._check()
        except (Unavailable, TimeoutError):
            self._lacking = ("database",)
        except RolesMissing:
            self._lacking = ("roles",)
        except ConfigurationError:
            self._lacking = ("schema",)
        else:
            self._lacking = ()

    def _report(self, notifier: Notifier) -> None:
        """Tell the service manager what a check has found."""
