"""Tickets: takes the attempts of this host by the tickets that Temporal passes to it.

An activity lasts as long as the attempt of its ticket. What becomes of the run is between this host and its
workers: an activity returns nothing, never fails, and ends early only when the host stops.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from temporalio import activity
from temporalio.client import Client
from temporalio.service import RPCError
from temporalio.worker import Worker

from worker.clock import Clock
from worker.engine.attempt.inflight import InflightRuns
from worker.engine.signals import wait_for
from worker.errors import Unavailable, WorkerError
from worker.features.hosts.remote import RemoteStore
from worker.features.hosts.temporal import TlsFiles
from worker.features.hosts.temporal.placer import ACTIVITY, HEARTBEAT, connect, queue_of
from worker.features.hosts.wire import Taken, TemporalPlace
from worker.model.runs.hosts import Fence
from worker.model.runs.run import Isolation
from worker.telemetry.events import emit

# Seconds until Temporal is tried again, at first and at most.
TRY_AGAIN = 1.0
LONGEST_TRY = 15.0


@dataclass(eq=False, repr=False)
class TicketTaking:
    """Fills this host's slots with the runs that Temporal offers to its pool; as `Taking` does by polls.

    `start` gets each attempt. `on_taking` is called when Temporal responds, for the first time and after each
    outage at the start. `offers` is false until this host has a handler, and while it can run none.
    """

    store: RemoteStore
    inflight_runs: InflightRuns
    clock: Clock
    pool: str
    place: TemporalPlace
    tls: TlsFiles | None
    identity: str
    slots: Mapping[Isolation, int]
    poll: float
    offers: Callable[[], bool]
    start: Callable[[Sequence[Taken]], None]
    on_taking: Callable[[], None]
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    taking: bool = False
    # The attempts that run here, and the events that end their activities.
    _open: dict[Fence, asyncio.Event] = field(default_factory=dict)
    _takes: set[asyncio.Task[Fence | None]] = field(default_factory=set)
    _stopping: bool = False

    def __post_init__(self) -> None:
        self.ticked_at = self.clock.monotonic()

    async def run(self) -> None:
        """Take until cancelled; then let Temporal's activities end, while the attempts are drained."""
        polling: asyncio.Task[None] | None = None
        try:
            while True:
                self.wake.clear()
                self.ticked_at = self.clock.monotonic()
                self._end_activities()
                if polling is None and self.offers():
                    polling = asyncio.create_task(self._poll())
                await wait_for(self.wake, self.poll)
        finally:
            self._stopping = True
            self._end_activities()
            for task in self._takes:
                # Its worker hands back what this host never gets.
                task.cancel()
            if polling is not None:
                polling.cancel()
                await asyncio.wait({polling})

    async def _poll(self) -> None:
        """Poll the queues of the pool until cancelled; connects again after an error."""
        pause = TRY_AGAIN
        while True:
            try:
                client = await connect(
                    self.place.address, self.place.namespace, identity=self.identity, tls=self.tls
                )
                pause = TRY_AGAIN
                await self._work(client)
            except (RPCError, RuntimeError) as error:
                self.taking = False
                emit("engine.lost", pool=self.pool, error=_short(error))
                await self.clock.sleep(pause)
                pause = min(pause * 2, LONGEST_TRY)

    async def _work(self, client: Client) -> None:
        """Poll one queue for each kind of slot. Raises RuntimeError if a poller gives up."""
        workers = [
            Worker(
                client,
                task_queue=queue_of(self.pool, isolation),
                activities=[self._attempt],
                max_concurrent_activities=count,
                # Temporal gives a run to each open poll of a host that hangs; it is lost for `place_timeout`.
                max_concurrent_activity_task_polls=1,
                disable_eager_activity_execution=True,
            )
            for isolation, count in self.slots.items()
            if count
        ]
        running = [asyncio.create_task(worker.run()) for worker in workers]
        try:
            if not self.taking:
                self.taking = True
                self.on_taking()
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            raise RuntimeError(f"its poller ended: {next(iter(done)).exception()}")
        finally:
            await asyncio.gather(*(worker.shutdown() for worker in workers), return_exceptions=True)
            await asyncio.gather(*running, return_exceptions=True)

    @activity.defn(name=ACTIVITY)
    async def _attempt(self, ticket: str) -> None:
        """One activity: takes the attempt and lasts until it has ended. Never fails."""
        if self._stopping:
            return  # it is placed again
        if not self.offers():
            # It is placed again, and could come back at once.
            await wait_for(self.wake, self.poll)
            return
        taking = asyncio.create_task(self._take(ticket))
        self._takes.add(taking)
        taking.add_done_callback(self._takes.discard)
        # Nothing that Temporal does stops an attempt, or loses one that was just taken.
        fence = await _result_of(taking)
        if fence is None:
            return
        ended = self._open[fence]
        while not ended.is_set():
            activity.heartbeat()
            with suppress(asyncio.CancelledError):
                await wait_for(ended, HEARTBEAT.total_seconds())
        self._open.pop(fence, None)

    async def _take(self, ticket: str) -> Fence | None:
        try:
            attempts = await self.store.take_by(ticket)
        except Unavailable:
            return None  # the run is placed again
        except (WorkerError, ValueError) as error:
            emit("loop.failed", loop="taking", error=_short(error))
            return None
        for taken in attempts:
            fence = taken.run.id, taken.run.fencing_token
            self._open[fence] = asyncio.Event()
            self.start([taken])
            return fence
        return None

    def _end_activities(self) -> None:
        for (run_id, fencing_token), ended in self._open.items():
            inflight = self.inflight_runs.get(run_id)
            if self._stopping or inflight is None or inflight.run.fencing_token != fencing_token:
                ended.set()


async def _result_of(task: asyncio.Task[Fence | None]) -> Fence | None:
    """The result of a task, whatever happens to the caller meanwhile; None if it was cancelled."""
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    return None if task.cancelled() else task.result()


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]
