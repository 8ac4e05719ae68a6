"""Health of `serve` and `provision`, which have no lease: whether the database can be used."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

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


class Following(Protocol):
    """Follows an issuer; `doing` says how in a word."""

    doing: Any


class ProvisionHealth(DatabaseHealth):
    """Also tells what the loops do that follow the issuers."""

    _loops: Mapping[str, Following] = {}
    _is_ready = False

    def follow(self, loops: Mapping[str, Following]) -> None:
        """Tell what these loops do, by issuer."""
        self._loops = loops

    def details(self) -> Mapping[str, Any]:
        return {"issuers": {name: loop.doing for name, loop in self._loops.items()}}

    def _report(self, notifier: Notifier) -> None:
        lacking = [f"no {name}" for name in self._lacking]
        status = "; ".join([*lacking, *(f"{name}: {loop.doing}" for name, loop in self._loops.items())])
        if not lacking and not self._is_ready:
            self._is_ready = True
            notifier.ready(status)
        notifier.status(status)
