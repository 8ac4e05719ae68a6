"""When nothing goes wrong in a simulation, so that what is promised soon must be there."""

from __future__ import annotations

from collections.abc import Sequence

from tests.simulation.entries import Action
from tests.simulation.world import LEASE, POLL, World

# Seconds after a fault, or the start of a worker, until all works again; until the runs of a dead one have
# been recovered, too: by one that has had a lease of contact, at its next poll.
AFTER, RECOVERED = 12.0, 2 * LEASE + POLL


class Calm:
    """Knows when faults and restarts were; `faults` are those of the plan."""

    def __init__(self, world: World, faults: Sequence[Action]) -> None:
        spans = [(fault.at, fault.at + fault.size) for fault in faults if not fault.kind.endswith(" at")]
        # The slowest answer is under way for so long.
        spans += [(fault.at, fault.at + fault.size + LEASE) for fault in faults if fault.kind == "slow"]
        spans += [(struck.since, struck.until) for struck in world.struck]
        # Also of those that ended by themselves.
        started = ("worker.started", "host.started")
        spans += [(at, at) for at, _, name, _ in world.emitted if name in started and at > AFTER]
        self._spans = spans

    def between(self, since: float, until: float, *, after: float = AFTER) -> bool:
        """Whether no fault was between these times, nor in the seconds `after` before them."""
        return not any(begun < until and since < ended + after for begun, ended in self._spans)
