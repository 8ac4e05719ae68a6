"""When nothing goes wrong in a simulation, so that what is promised soon must be there."""

from __future__ import annotations

from collections.abc import Sequence

from tests.simulation.plan import Action
from tests.simulation.world import LEASE, POLL, World

# Seconds after a fault until all is as before: a lease until runs are recovered, another one of contact
# before that, and the poll that finds them.
AFTER = 2 * LEASE + POLL


class Calm:
    """Knows when faults and restarts were; `faults` are those of the plan."""

    def __init__(self, world: World, faults: Sequence[Action]) -> None:
        lasting = [(fault.at, fault.at + fault.size) for fault in faults if not fault.kind.endswith(" at")]
        lasting += [(struck.since, struck.until) for struck in world.struck]
        # Also of those that ended by themselves.
        lasting += [
            (at, at)
            for at, _, name, _ in world.emitted
            if name in ("worker.started", "host.started") and at > 5
        ]
        self._spans = lasting

    def between(self, since: float, until: float) -> bool:
        return not any(begun < until and since < ended + AFTER for begun, ended in self._spans)
