"""Starts: what products have started in their own transactions becomes runs. Every worker makes them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection

from worker.clock import Clock
from worker.errors import Unavailable
from worker.ids import DefinitionId
from worker.model.runs.run import MadeRuns
from worker.telemetry.events import emit

# The share of its time that a backlog takes at most: the rest is for firing and for the ends of runs.
BUSY = 0.6
# Seconds until the starts of a definition that this version cannot read are tried again.
PUT_OFF = 60.0


# Makes the next runs: those of definitions after the first argument first, none of those in the second.
MakeRuns = Callable[[DefinitionId | None, Collection[DefinitionId]], Awaitable[MadeRuns]]


class Starts:
    """Makes runs in batches while there are starts, then looks once a poll: no notification is sent.

    `on_made` is called after runs were made, so that they are admitted at once.
    """

    def __init__(self, make: MakeRuns, clock: Clock, *, poll: float, on_made: Callable[[], None]) -> None:
        self._make = make
        self._clock = clock
        self._poll = poll
        self._on_made = on_made
        self._put_off: dict[DefinitionId, float] = {}

    async def run(self) -> None:
        after: DefinitionId | None = None
        while True:
            began = self._clock.monotonic()
            made = await self._step(after)
            after = made.passed
            if made.made:
                took = self._clock.monotonic() - began
                await self._clock.sleep(took * (1 - BUSY) / BUSY)
            elif after is None:
                await self._clock.sleep(self._poll)

    async def _step(self, after: DefinitionId | None) -> MadeRuns:
        now = self._clock.monotonic()
        self._put_off = {id_: until for id_, until in self._put_off.items() if until > now}
        try:
            made = await self._make(after, self._put_off.keys())
        except Unavailable:
            return MadeRuns()
        for id_, (org, name, error) in made.unreadable.items():
            emit("definition.failed", org=org, definition=name, error=error)
            self._put_off[id_] = now + PUT_OFF
        for run in made.refused:
            emit(
                "run.changed",
                org=run.org,
                run=run.run_id,
                definition=run.definition,
                attempt=run.attempt,
                state=run.state,
                reason=run.reason,
            )
        if made.runs:
            self._on_made()
        if made.made:
            emit("starts.made", count=made.runs, refused=len(made.refused))
        return made
