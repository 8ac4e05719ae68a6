"""The vitals of one incarnation, from the parts that know them."""

from __future__ import annotations

from collections.abc import Mapping

from worker.clock import Clock
from worker.execution.admission import Admission
from worker.execution.heartbeat import Heartbeat
from worker.execution.holdings import Holdings
from worker.execution.pulse import Pulse
from worker.execution.scheduler import Scheduler
from worker.runs.run import Isolation
from worker.telemetry.notify import Notifier
from worker.telemetry.vitals import Vitals
from worker.wiring.signals import Signals


def pulse_and_vitals(
    scheduler: Scheduler,
    admission: Admission,
    heartbeat: Heartbeat,
    holdings: Holdings,
    slots: Mapping[Isolation, int],
    notifier: Notifier,
    signals: Signals,
    clock: Clock,
) -> tuple[Pulse, Vitals]:
    """The pulse of the loops that bring work in, which a drain lets rest; and what may be asked of all."""
    ticks = {"scheduler": lambda: scheduler.ticked_at, "admission": lambda: admission.ticked_at}
    pulse = Pulse(ticks, notifier, clock, resting=lambda: signals.asked > 0, status=lambda: vitals.in_words())
    vitals = Vitals(
        ages=pulse.ages,
        stalled=pulse.stalled,
        lease_remaining=lambda: heartbeat.lease.expires_at - clock.monotonic(),
        admitting=lambda: admission.admitting,
        draining=pulse.resting,
        slots={str(isolation): count for isolation, count in slots.items()},
        used=holdings.used,
    )
    return pulse, vitals
