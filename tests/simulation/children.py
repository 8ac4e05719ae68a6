"""The processes of runs under simulation: what the zygote and its children do, without a fork."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from tests.simulation import jobs
from tests.simulation.broker import Brokers, Door, StreamTransport
from tests.simulation.loop import SeededLoop, SimulatedProcess
from tests.simulation.pipes import Pipe
from worker.clock import Clock
from worker.engine.runners.child.pool import ChildPool
from worker.engine.runners.contract import LEASE_LOST, RunServices, StopSignal, Work, handler_exited
from worker.engine.runners.inline import _Attempt, _outcome_of
from worker.handlers.calling import call
from worker.handlers.calls import A, Call, OneWayCall
from worker.handlers.context import Context
from worker.handlers.given import Cancellation
from worker.model.runs import outcome as outcomes
from worker.model.runs.lease import Lease
from worker.model.runs.outcome import Outcome

# Seconds until a zygote that died is replaced.
REPLACED = 0.5


class ChildPort:
    """The port of a handler in a process of its own: its questions and the answers take their time."""

    def __init__(
        self, loop: SeededLoop, services: RunServices, up: Pipe, down: Pipe, asks: Callable[[str], object]
    ) -> None:
        self._loop = loop
        self._asks = asks
        self._services = services
        self.up = up
        self._down = down

    async def ask(self, call: Call[A]) -> A:
        answer: asyncio.Future[A] = self._loop.create_future()
        self._asks(type(call).__name__)
        self.up.send(self._take, call, answer)
        return await answer

    def tell(self, notice: OneWayCall) -> None:
        self.up.send(self._services.tell, notice)

    def _take(self, call: Call[A], answer: asyncio.Future[A]) -> None:
        """In the worker: answer the question in a task of its own."""
        asking = self._loop.create_task(self._services.ask(call))
        asking.add_done_callback(lambda done: self._down.send(self._give, done, answer))

    @staticmethod
    def _give(done: asyncio.Task[A], answer: asyncio.Future[A]) -> None:
        if answer.done():
            return
        if done.cancelled():
            answer.cancel()
        elif (error := done.exception()) is not None:
            answer.set_exception(error)
        else:
            answer.set_result(done.result())


class RunProcess:
    """The process of one run, from the worker's side."""

    def __init__(
        self,
        process: SimulatedProcess,
        stop: StopSignal,
        ended: asyncio.Future[Outcome],
        stop_sending: Callable[[], None],
    ) -> None:
        self.process = process
        self.stop = stop
        self.ended = ended
        self.lost = False
        self._stop_sending = stop_sending

    def end(self, outcome: Outcome) -> None:
        self._stop_sending()
        if not self.ended.done():
            self.ended.set_result(outcome)


class SimulatedChildren(ChildPool):
    """The zygote freezes all runs at the `freeze_at` that the worker has told it, as the real one does."""

    def __init__(
        self,
        loop: SeededLoop,
        worker: SimulatedProcess,
        clock: Clock,
        *,
        freezing: bool,
        max_freeze: float,
        asks: Callable[[str], object],
        brokers: Brokers,
    ) -> None:
        self.broker = brokers.of(clock)
        self._loop = loop
        # Called with the name of each call of a handler.
        self._asks = asks
        self._worker = worker
        self._clock = clock
        self._freezing = freezing
        self._max_freeze = max_freeze
        self._freeze_at = float("inf")
        self._frozen_at: float | None = None
        self._count = 0
        self._running: dict[int, RunProcess] = {}
        self._up = asyncio.Event()
        self._start_zygote()

    def attach(self) -> None:
        """Listen to the broker; the zygote is there already."""
        self.broker.attach()

    def take_describing(self) -> None:
        """No process describes handlers: the simulation gives the catalogue."""

    def renewed(self, lease: Lease) -> None:
        if self._freezing:
            self._down.send(self._take_lease, lease.freeze_at)
            self.broker.renewed(lease)

    async def close(self) -> None:
        self.zygote.kill()
        await self.broker.close()

    async def run(self, work: Work, services: RunServices, stop: StopSignal) -> Outcome:
        await self._up.wait()
        await asyncio.sleep(self._loop.delay())
        if stop.killed:
            return LEASE_LOST
        # As the real zygote does: the lease can have expired since it last looked, or before it began.
        if self._frozen_at is None and self._clock.monotonic() >= self._freeze_at:
            self._watch()
        self._count += 1
        number, loop = self._count, self._loop
        child = SimulatedProcess(loop, f"{self.zygote.name}/{number}", self.zygote)
        if self._frozen_at is not None:
            child.freeze()
        up, down = Pipe(loop, self._worker), Pipe(loop, child)
        port, cancelled = ChildPort(loop, services, up, down, self._asks), Cancellation()
        attempt = _Attempt(work, services, stop, self._clock, None)
        door, brokered = Door(loop, child), self.broker.serve(work, services)
        brokered.open(door)  # type: ignore[arg-type]
        running = self._running[number] = RunProcess(child, stop, loop.create_future(), brokered.stop)
        body = self._body(work, port, cancelled, attempt, running, door)
        task = child.context.run(loop.create_task, body)

        def kill() -> None:
            brokered.stop()
            child.kill()

        stop.on_kill(kill)
        try:
            told: Any = SimpleNamespace(set=lambda reason: down.send(cancelled.set, reason))
            if not stop.killed:
                await attempt.wait(running.ended, told, lambda: down.send(task.cancel))
            child.end()
            door.hang_up()
            await brokered.end()
        finally:
            brokered.drop()
            services.close()
            attempt.log.close()
            child.end()
            del self._running[number]
        if running.lost and not stop.killed:
            return outcomes.Lost("its zygote died")
        return attempt.outcome(running.ended)

    async def _body(
        self,
        work: Work,
        port: ChildPort,
        cancelled: Cancellation,
        attempt: _Attempt,
        running: RunProcess,
        door: Door,
    ) -> None:
        try:
            made = jobs.find(work.entry_point)
            given = work.given(made, attempt.log, self._clock)
            network = {"http": StreamTransport(door)}
            ctx = Context(
                given, port, cancelled, network, lambda outcome: port.up.send(attempt.park, outcome)
            )
            port.up.send(port._services.started)
            outcome = await call(made, ctx)
        except BaseException as error:
            outcome = _outcome_of(error)
        port.up.send(running.end, outcome)

    # faults

    def kill_one(self, place: float) -> bool:
        """SIGKILL of one of the runs; the zygote reports it. Returns whether there was one."""
        alive = [run for run in self._running.values() if run.process.alive]
        if not alive:
            return False
        run = alive[int(place * len(alive))]
        run.process.kill()
        self._up_pipe.send(run.end, handler_exited("killed by signal 9"))
        return True

    def kill_zygote(self) -> None:
        """SIGKILL of the zygote: the runs end with it, and are lost."""
        self.zygote.kill()
        self._up.clear()
        for run in self._running.values():
            run.lost = True
            self._loop.call_later(
                self._loop.delay(), run.end, handler_exited("lost"), context=self._worker.context
            )
        self._loop.call_later(REPLACED, self._start_zygote, context=self._worker.context)

    # the zygote

    def _start_zygote(self) -> None:
        self.zygote = SimulatedProcess(self._loop, f"{self._worker.name}/zygote", self._worker)
        self._down, self._up_pipe = Pipe(self._loop, self.zygote), Pipe(self._loop, self._worker)
        self._frozen_at = None
        self._down.send(self._watch)
        self._up.set()

    def _take_lease(self, freeze_at: float) -> None:
        self._freeze_at = freeze_at
        now = self._clock.monotonic()
        if self._frozen_at is not None and now < freeze_at:
            self._frozen_at = None
            for run in self._running.values():
                run.process.thaw()
                self._up_pipe.send(run.stop.thaw, now)
        self._watch()

    def _watch(self) -> None:
        """Freeze when it is time, kill what is frozen for too long, and look again when that may be."""
        now = self._clock.monotonic()
        if self._frozen_at is None and now >= self._freeze_at:
            self._frozen_at = now
            for run in self._running.values():
                run.process.freeze()
                self._up_pipe.send(run.stop.freeze, now)
        if self._frozen_at is not None and now >= self._frozen_at + self._max_freeze:
            for run in self._running.values():
                run.process.kill()
                self._up_pipe.send(run.end, handler_exited("frozen for longer than max_freeze"))
            return
        due = self._freeze_at if self._frozen_at is None else self._frozen_at + self._max_freeze
        if due != float("inf"):
            self._loop.call_later(max(due - now, 0.001), self._watch_once, due, context=self.zygote.context)

    def _watch_once(self, due: float) -> None:
        if due == self._freeze_at or self._frozen_at is not None:
            self._watch()
