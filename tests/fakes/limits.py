"""Limits that tests do not reach."""

from __future__ import annotations

from worker.clock import Clock, SystemClock
from worker.web.clients import Limits


def no_limits(clock: Clock | None = None) -> Limits:
    return Limits(clock or SystemClock(), logins_per_minute=10**9, calls_per_second=10**9)
