"""The broker of a worker or host, as its settings and its machine have it."""

from __future__ import annotations

from worker.clock import Clock
from worker.features.egress.handle import BrokerHandle
from worker.process.confinement import Confinement
from worker.settings import Settings


def make_broker(settings: Settings, clock: Clock, confinement: Confinement) -> BrokerHandle:
    """The broker; it confines itself as far as runs are confined."""
    rules = confinement.rules
    confined = {"landlocked": rules is not None, "filtered": rules is not None and rules.filtered}
    return BrokerHandle(clock, confined, traced=settings.tracing.enabled)
