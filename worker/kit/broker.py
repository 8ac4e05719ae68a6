"""The broker of a process that runs handlers, if the feature that has it is installed."""

from __future__ import annotations

import asyncio

from worker.clock import Clock
from worker.engine.runners.egress import EgressBroker
from worker.kit.feature import Point
from worker.process.confinement import Confinement
from worker.settings import Settings
from worker.wiring.start import MakeBroker

_BROKER: Point[MakeBroker] = Point("egress.broker", "[execution] network")


def broker_fault(settings: Settings, clock: Clock, confinement: Confinement) -> str | None:
    """Why a broker that starts here and now is not up; None if it is, or the feature is not installed."""
    broker = broker_of(settings, clock, confinement)
    if broker is None:
        return None
    broker.start()
    try:
        return broker.await_start()
    finally:
        asyncio.run(broker.close())


def broker_of(settings: Settings, clock: Clock, confinement: Confinement) -> EgressBroker | None:
    """What sends the requests of runs; it is not started yet."""
    make = _BROKER.find()
    return None if make is None else make(settings, clock, confinement)
