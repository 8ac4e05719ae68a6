"""Finisher: attempts that ended become rows, in batches, and none is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from worker.clock import Clock
from worker.errors import Unavailable
from worker.ids import RunId
from worker.runs.outcome import EndedAttempt
from worker.telemetry.events import emit

# Rows in one statement, at most: what ended while the last were written. On a quiet disk
# a hundred do; on a slow one each commit is dear, and more of them share it, as do those
# that SQLite's one writer has waiting.
BATCH = 2000
# Seconds between tries while the database is away.
RETRY = 0.5


class FinishStore(Protocol):
    async def finish(self, ended: Sequence[EndedAttempt]) -> set[RunId]:
        """Write the ends, fenced; give the runs whose row holds what we wrote."""
        ...


class Finisher:
    """Flushes all that ended since its last flush in one statement.

    `on_written` hears of every end once it is settled: written, or found to be
    another incarnation's by now (`accepted` false); `on_unstorable` of one that the
    database does not take as it is, with why.
    """

    def __init__(
        self,
        store: FinishStore,
        clock: Clock,
        *,
        on_written: Callable[[EndedAttempt, bool], None],
        on_unstorable: Callable[[EndedAttempt, Exception], None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._on_written = on_written
        self._on_unstorable = on_unstorable
        self._ended: list[EndedAttempt] = []
        self._some = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def put(self, ended: EndedAttempt) -> None:
        """Take an end over; it is durable within one flush."""
        self._ended.append(ended)
        self._idle.clear()
        self._some.set()

    async def flushed(self) -> None:
        """Wait until everything taken so far is written."""
        await self._idle.wait()

    async def run(self) -> None:
        """Flush for ever; ends by cancellation only."""
        while True:
            await self._some.wait()
            batch, self._ended = self._ended[:BATCH], self._ended[BATCH:]
            if not self._ended:
                self._some.clear()
            await self._write(batch)
            if not self._ended:
                self._idle.set()

    async def _write(self, batch: list[EndedAttempt]) -> None:
        while True:
            try:
                accepted = await self._store.finish(batch)
            except Unavailable:
                # The database is away: what ended waits here, and renewal says who owns it.
                await self._clock.sleep(RETRY)
                continue
            except Exception as error:
                if len(batch) > 1:
                    for one in batch:
                        await self._write([one])
                    return
                if batch[0].reason == "result_unstorable":
                    emit("loop.failed", loop="finisher", error=type(error).__name__)
                    await self._clock.sleep(RETRY)
                self._on_unstorable(batch[0], error)
                batch = [unstorable(batch[0], error)]
                continue
            for ended in batch:
                self._on_written(ended, ended.run_id in accepted)
            return


def unstorable(ended: EndedAttempt, error: Exception) -> EndedAttempt:
    """The same end as failed(result_unstorable), without what the database did not take."""
    return replace(
        ended,
        outcome="failed",
        state="failed",
        reason="result_unstorable",
        detail=type(error).__name__,
        result=None,
        error={"type": "ResultUnstorable", "message": "the database does not take this result"},
        error_cause="result_unstorable",
        trail=replace(ended.trail, claims=None, flags=None, progress=None),
    )
