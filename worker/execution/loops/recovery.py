"""Recovery: a dead worker's runs wait again, or fail when they were lost too often."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from worker.clock import Clock
from worker.errors import Unavailable
from worker.runs.run import Recovered
from worker.telemetry.events import emit


class RecoveryStore(Protocol):
    async def recover(self, still: Callable[[], bool]) -> Sequence[Recovered]:
        """Take the runs of workers whose lease has passed; give what became of them.

        `still` is asked once more, in another thread, when the database has answered.
        """
        ...


class Recovery:
    """Recovers every `poll` seconds, once this worker has been in contact for a whole lease.

    After an outage every lease has passed; the wait lets living owners renew first. A
    recovery that the outage itself has held up must not slip through at its end.
    """

    def __init__(
        self,
        store: RecoveryStore,
        clock: Clock,
        *,
        poll: float,
        may_recover: Callable[[], bool],
        on_recovered: Callable[[Sequence[Recovered]], None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._poll = poll
        self._may_recover = may_recover
        self._on_recovered = on_recovered

    async def run(self) -> None:
        """Look for dead workers for ever; ends by cancellation only."""
        while True:
            await self._clock.sleep(self._poll)
            if not self._may_recover():
                continue
            try:
                recovered = await self._store.recover(self._may_recover)
            except Unavailable:
                continue
            tell(recovered)
            if recovered:
                self._on_recovered(recovered)


def tell(recovered: Sequence[Recovered]) -> None:
    """One event for each run that was taken from a dead worker."""
    for run in recovered:
        emit(
            "run.recovered",
            org=run.org,
            run=run.run_id,
            definition=run.definition,
            attempt=run.attempt,
            worker=run.worker,
            state=run.state,
        )
