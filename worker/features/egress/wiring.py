"""The broker of a worker or host, as its settings and its machine have it."""

from __future__ import annotations

import os

from worker.clock import Clock
from worker.features.egress.handle import BrokerHandle
from worker.model.egress import BoundSecret
from worker.process.confinement import Confinement
from worker.settings import Settings


def make_broker(settings: Settings, clock: Clock, confinement: Confinement) -> BrokerHandle:
    """The broker; it confines itself as far as runs are confined."""
    rules = confinement.rules
    confined = {"landlocked": rules is not None, "filtered": rules is not None and rules.filtered}
    variables = [
        BoundSecret(name, os.environ[name], binding.origin, binding.header or None)
        for name, binding in settings.execution.bind_environment.items()
        if name in os.environ
    ]
    return BrokerHandle(clock, confined, bound=variables, traced=settings.tracing.enabled)
