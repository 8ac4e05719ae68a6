"""Dispatcher: carries each admitted run to its end, and its end to the database."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from datetime import timedelta

from worker.execution.attempts.attempt import Tools, attempt
from worker.execution.attempts.events import tell_end, tell_fenced_out, tell_unstorable
from worker.execution.attempts.inflight import Inflight, InflightRun
from worker.execution.loops.finisher import Finisher, FinishStore
from worker.execution.runners.contract import StopReason, begin
from worker.ids import RunId
from worker.runs.outcome import EndedAttempt
from worker.runs.run import AdmittedRun

# Attempts begun in one step of the loop: what ends at once is written meanwhile, and nobody waits long.
BURST = 50

# The reason a run ends cancelled for, in its row -> what its handler is told.
STOP_REASONS: dict[str, StopReason] = {
    "requested": "cancel",
    "suspended": "suspended",
    "replaced": "replaced",
    "closed": "closed",
}


class Dispatcher:
    """Starts an attempt for each admitted run and hands its end to the finisher.

    `on_free` is called whenever ends were written, so that admission goes on; `on_end`
    with each that was accepted, and its run if that was still held.
    """

    def __init__(
        self,
        tools: Tools,
        holdings: Inflight,
        store: FinishStore,
        *,
        on_free: Callable[[], None],
        on_end: Callable[[EndedAttempt, InflightRun | None], None],
    ) -> None:
        self._tools = tools
        self._holdings = holdings
        self._on_free = on_free
        self._on_end = on_end
        self._tasks: set[asyncio.Task[None]] = set()
        self._next: deque[InflightRun] = deque()
        self._beginning: asyncio.Task[None] | None = None
        self.finisher = Finisher(store, tools.clock, on_written=self._written, on_unstorable=self._unstorable)

    @property
    def running(self) -> int:
        """How many attempts are under way, or about to be."""
        return len(self._tasks) + len(self._next)

    def start(self, runs: Iterable[AdmittedRun]) -> None:
        """Hold runs that were admitted just now, and begin their attempts in this order."""
        self._next.extend(self._holdings.add(run) for run in runs)
        if self._next and (self._beginning is None or self._beginning.done()):
            self._beginning = begin(self._begin_all(), loop=asyncio.get_running_loop())

    async def _begin_all(self) -> None:
        loop = asyncio.get_running_loop()
        while self._next:
            for _ in range(min(BURST, len(self._next))):
                task = begin(self._carry(self._next.popleft()), loop=loop)
                if not task.done():
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
            await asyncio.sleep(0)

    def cancel(self, run_id: RunId, reason: str) -> None:
        """Ask a held run to stop, for the reason that its row gives."""
        held = self._holdings.get(run_id)
        if held is not None:
            held.stop.request(STOP_REASONS.get(reason, "cancel"), held.cancel_grace.total_seconds())

    async def drain(self, grace: timedelta) -> None:
        """Ask every run to stop, wait until each has ended and its end is written."""
        self.hurry(grace)
        if self._beginning is not None:
            await self._beginning
        while self._tasks:
            await asyncio.wait(set(self._tasks))
        await self.finisher.flushed()

    def hurry(self, grace: timedelta) -> None:
        """Give the runs at most `grace` from now."""
        for held in self._holdings:
            held.stop.request("drain", grace.total_seconds())

    def kill(self) -> None:
        """End every run now: none of them is ours any more."""
        for held in self._holdings:
            held.stop.kill()

    async def _carry(self, held: InflightRun) -> None:
        ended = await attempt(held, self._tools)
        await self._tools.journal.last_words(held.run)
        self.finisher.put(ended)

    def _written(self, ended: EndedAttempt, accepted: bool) -> None:
        held = self._holdings.get(ended.run_id)
        if held is not None and held.run.fencing_token == ended.fencing_token:
            self._tools.journal.ended(held.run)
            self._holdings.release(held)
        if accepted:
            tell_end(ended, held)
            self._on_end(ended, held)
        else:
            tell_fenced_out(ended.run_id, ended.attempt, ended.fencing_token, held)
        self._on_free()

    def _unstorable(self, ended: EndedAttempt, error: Exception) -> None:
        tell_unstorable(ended, error, self._holdings.get(ended.run_id))
