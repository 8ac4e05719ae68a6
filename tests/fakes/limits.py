"""Limits that tests do not reach."""

from __future__ import annotations

from worker.clock import Clock, SystemClock
from worker.kit.web.clients import ClientLimits


def no_limits(clock: Clock | None = None) -> ClientLimits:
    return ClientLimits(clock or SystemClock(), logins_per_minute=10**9, calls_per_second=10**9)
