"""Pool: the runner that gives each run its own process, forked by a zygote."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

from worker.clock import Clock
from worker.engine.runners.child import linux, run_folders, seccomp
from worker.engine.runners.child.child_process import ChildProcess, Ended, InboxTurns
from worker.engine.runners.child.child_run import ChildRun, exit_detail
from worker.engine.runners.child.messages import Setup
from worker.engine.runners.child.sandbox import SandboxRules
from worker.engine.runners.child.zygote_handle import Message, ZygoteHandle
from worker.engine.runners.contract import LEASE_LOST, RunServices, StopSignal, Work, outcome_of_stop
from worker.engine.runners.egress import EgressBroker
from worker.handlers.installed import ENVIRONMENT, FOLDERS
from worker.model.runs.lease import Lease
from worker.model.runs.outcome import HandedBack, Outcome
from worker.telemetry.events import emit

# Seconds between starts of a zygote that does not come up, at first and at most; until one whose control
# socket is closed is killed; and between checks for adopted processes that have ended.
RESTART = 0.5
LONGEST_RESTART = 10.0
CLOSE = 5.0
REAP_EVERY = 30.0
# Forks of a worker's zygote after which it shares its pages: as many later ones save what this takes.
SHARE_AFTER = 30
# Processes that may end before they read the work of one run; then the run is handed back.
TRIES = 3


class Spares:
    """Processes forked ahead of their runs, at most `count` for sealed runs and as many for others.

    Each serves one run. There are none before the first run of their kind, and they are replaced while no run
    waits for its process. `fork` gets whether a process is sealed; it raises OSError.
    """

    def __init__(self, count: int, fork: Callable[[bool], Coroutine[Any, Any, ChildProcess]]) -> None:
        self._count = count
        self._fork = fork
        self._idle: dict[int, ChildProcess] = {}
        self._starting: set[int] = set()
        self._kinds: dict[bool, None] = {}
        self._refilling: asyncio.Task[None] | None = None
        self._pause = 0.0

    def take(self, *, sealed: bool) -> ChildProcess | None:
        """The oldest of this kind that is alive."""
        for process in [each for each in self._idle.values() if each.sealed == sealed]:
            del self._idle[process.number]
            if process.usable:
                self._pause = 0.0
                return process
        return None

    def starting(self, process: ChildProcess) -> None:
        """A run waits for this process."""
        self._kinds[process.sealed] = None
        self._starting.add(process.number)

    def started(self, number: int) -> None:
        """The handler of this process is about to be called, or the process has ended."""
        self._starting.discard(number)
        self.refill()

    def died(self, number: int) -> bool:
        """Whether this process ended before it had a run; then others are forked after a pause."""
        if self._idle.pop(number, None) is None:
            return False
        self._pause = min(max(self._pause * 2, RESTART), LONGEST_RESTART)
        return True

    def refill(self) -> None:
        """Fork what is missing, unless a run waits for its process."""
        if self._refilling is None and not self._starting and self._missing():
            self._refilling = asyncio.create_task(self._refill())

    def retire(self) -> list[ChildProcess]:
        """Give up all that have no run; the caller ends them."""
        idle, self._idle = list(self._idle.values()), {}
        return idle

    def close(self) -> None:
        self._count = 0
        if self._refilling is not None:
            self._refilling.cancel()

    async def _refill(self) -> None:
        try:
            await asyncio.sleep(self._pause)
            while (missing := self._missing()) and not self._starting:
                process = await self._fork(missing[0])
                self._idle[process.number] = process
        except OSError:  # no descriptors, for instance: the next run tries again
            pass
        finally:
            self._refilling = None

    def _missing(self) -> list[bool]:
        """The kinds of which there are too few."""
        idle = Counter(process.sealed for process in self._idle.values())
        return [sealed for sealed in self._kinds if idle[sealed] < self._count]


class ChildPool:
    """Call `start` from the main thread before any key is read.

    `lock_fd` is the descriptor of the SQLite file's lock, which the zygote holds while it lives. The zygote
    imports the `preload` modules or distributions. Without `sandbox` the runs are not confined. `spares`
    processes of each kind are forked ahead. After `share_after` forks, if it is given, the zygote shares its
    pages with later ones. With `describes` the first zygote also forks a process that describes handlers. If
    there is a `broker`, it sends the requests of handlers.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        freezing: bool = True,
        max_freeze: timedelta = timedelta(minutes=10),
        preload: Sequence[str] = (),
        pass_environment: Sequence[str] = (),
        lock_fd: int | None = None,
        sandbox: SandboxRules | None = None,
        spares: int = 0,
        share_after: int | None = None,
        describes: bool = False,
        broker: EgressBroker | None = None,
    ) -> None:
        self._clock = clock
        self.broker = broker
        self._seals = broker is not None and seccomp.known()
        self._freezing = freezing
        self._setup = Setup(
            folder="",
            lock=lock_fd,
            environment=(*ENVIRONMENT, *pass_environment),
            preload=tuple(preload),
            max_freeze=max_freeze.total_seconds(),
            sandbox=sandbox,
            spares=spares > 0,
            share_after=share_after,
        )
        self._zygote: ZygoteHandle | None = None
        self._describes = describes
        self._describing: socket.socket | None = None
        self._closed = False
        self._lease: Message | None = None
        self._numbers = itertools.count(1)
        self._processes: dict[int, ChildProcess] = {}
        self._runs: dict[int, ChildRun] = {}
        self._spares = Spares(spares, lambda sealed: self._fork(grouped=True, sealed=sealed))
        self._up = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()
        self._reaping: asyncio.Task[None] | None = None
        self._pause = RESTART
        self._turns: InboxTurns | None = None

    def start(self) -> None:
        """Start the zygote. Needs no running loop."""
        linux.hide_memory()  # it contains the key ring and every org's tokens
        linux.become_subreaper()
        linux.allow_many_descriptors()
        self._setup = replace(self._setup, folder=tempfile.mkdtemp(prefix=FOLDERS))
        if self.broker is not None:
            self.broker.start()
        if not self._describes:
            self._zygote = ZygoteHandle(self._setup)
            return
        self._describing, theirs = socket.socketpair()
        with theirs:
            self._zygote = ZygoteHandle(replace(self._setup, describing=theirs.fileno()))

    def attach(self) -> None:
        """Listen to the zygote and the broker on the running loop; `run` does it if needed."""
        if self._reaping is None and self._zygote is not None:
            self._use(self._zygote)
            if self.broker is not None:
                self.broker.attach()
            self._reaping = asyncio.create_task(self._reap_periodically())

    def take_describing(self) -> socket.socket | None:
        """The socket of the process that describes handlers, once: it does so once."""
        taken, self._describing = self._describing, None
        return taken

    @property
    def zygote_pid(self) -> int | None:
        return None if self._zygote is None else self._zygote.pid

    def renewed(self, lease: Lease) -> None:
        """The lease is renewed: runs may continue until its `freeze_at`. Thread-safe."""
        if self._freezing:
            self._lease = {"op": "lease", "freeze_at": lease.freeze_at}
            if self._zygote is not None:
                self._zygote.send(self._lease)
            if self.broker is not None:
                self.broker.renewed(lease)

    async def run(self, work: Work, services: RunServices, stop: StopSignal) -> Outcome:
        """Run the handler in its own process; none of its processes is left afterwards."""
        self.attach()
        sealed = self._seals and not work.egress.is_open
        for _ in range(TRIES):
            zygote = await self._ready(stop)
            if stop.killed:
                return LEASE_LOST
            if zygote is None:
                return outcome_of_stop(stop) if stop.asked else HandedBack("the worker is ending")
            try:
                process = self._spares.take(sealed=sealed)
                if process is None:
                    process = await self._fork(grouped=work.memory is not None, sealed=sealed)
            except OSError as error:
                return await self._cannot_start(error.strerror)
            outcome = await self._serve(process, work, services, stop)
            if outcome is not None:
                return outcome
            ended = process.ended.result()
            if ended.why == "no_process":
                return await self._cannot_start(ended.detail)
            reason = ended.why or exit_detail(ended.status)
            emit("child.replaced", org=work.org_code, run=work.run_id, attempt=work.attempt, reason=reason)
        return await self._cannot_start(f"{TRIES} ended before they had read the run")

    async def _serve(
        self, process: ChildProcess, work: Work, services: RunServices, stop: StopSignal
    ) -> Outcome | None:
        number = process.number
        if self._turns is None:
            self._turns = InboxTurns(asyncio.get_running_loop().call_soon)
        self._spares.starting(process)
        started = partial(self._spares.started, number)
        given = (process, work, services, stop, self._clock, started, self._turns, self.broker)
        self._runs[number] = run = ChildRun(*given)
        try:
            return await run.finish()
        except asyncio.CancelledError:
            process.signal("kill")
            raise
        finally:
            self._runs.pop(number, None)

    async def _fork(self, *, grouped: bool, sealed: bool) -> ChildProcess:
        """A new process, which waits for its work; in a cgroup if `grouped`. Raises OSError."""
        zygote, number = self._zygote, next(self._numbers)
        if zygote is None or not self._up.is_set():
            raise OSError(errno.ECHILD, "the zygote is gone")
        folder, brokered = run_folders.name_in(self._setup.folder), self.broker is not None
        process = ChildProcess(number, folder, zygote.send, brokered=brokered, sealed=sealed)
        self._processes[number] = process  # before the next await, so that it ends if the zygote dies
        try:
            os.makedirs(process.folder, 0o700)
            descriptors = await process.open()
        except OSError:
            self._end(number, Ended(why="no_process"))
            raise
        of = {"folder": process.folder, "grouped": grouped, "sealed": sealed}
        zygote.send({"op": "start", "run": number, **of}, descriptors)
        return process

    async def close(self) -> None:
        self._closed = True
        self._up.set()
        self._spares.close()
        if (describing := self.take_describing()) is not None:
            describing.close()
        zygote, self._zygote = self._zygote, None
        if zygote is not None:
            zygote.close()
            await zygote.gone(CLOSE)
        for number in list(self._processes):
            self._end(number, Ended(why="lost"))
        if self.broker is not None:
            await self.broker.close()
        if self._reaping is not None:
            self._reaping.cancel()
        if self._background:
            await asyncio.wait(self._background)
        run_folders.remove(self._setup.folder)

    async def _ready(self, stop: StopSignal) -> ZygoteHandle | None:
        """The zygote, once it is up; None if the run or the worker is stopped before that."""
        if not self._up.is_set():
            waits = [asyncio.create_task(event.wait()) for event in (self._up, stop.requested)]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        return self._zygote if self._up.is_set() else None

    def _use(self, zygote: ZygoteHandle) -> None:
        zygote.attach(self._handle, lambda: self._in_background(self._replace(zygote)))
        self._zygote = zygote
        if self._lease is not None:
            zygote.send(self._lease)

    def _handle(self, message: Message) -> None:
        match message["op"]:
            case "ended":
                self._end(
                    message["run"],
                    Ended(message["status"], message["memory"], message["why"], message.get("detail")),
                )
            case "frozen":
                for run in self._runs.values():
                    run.stop.freeze(message["at"])
                if self._runs:
                    emit("children.frozen", runs=len(self._runs))
            case "thawed":
                for run in self._runs.values():
                    run.stop.thaw(message["at"])
                if self._runs:
                    emit("children.thawed", runs=len(self._runs), seconds=round(message["seconds"], 3))
            case "replaced":  # system files, which the rules of spares do not allow yet
                for process in self._spares.retire():
                    process.signal("kill")
                self._spares.refill()
            case "ready":
                self._up.set()
                self._pause = RESTART
                self._spares.refill()
                if message["describing"] is not None:
                    self._in_background(linux.reap_at_end(message["describing"]))
                for name, error in message["preload_failures"]:
                    emit("handler.broken", distribution=name, error=f"preload: {error}")

    def _end(self, number: int, ended: Ended) -> None:
        process = self._processes.pop(number, None)
        if process is not None:
            process.end(ended)
            if number not in self._runs:
                process.close()
            self._remove(process.folder)
        if self._spares.died(number) and not self._closed:
            emit("spare.died", reason=ended.detail or ended.why or exit_detail(ended.status))
        self._spares.started(number)

    async def _replace(self, zygote: ZygoteHandle) -> None:
        """Kill the runs of a dead zygote, which are lost, and start another zygote."""
        if self._closed or zygote is not self._zygote:
            return
        was_up = self._up.is_set()
        self._up.clear()
        self._zygote = None  # `close` must not end it again
        zygote.close()
        await zygote.gone(0)
        emit("zygote.died", pid=zygote.pid, runs=len(self._runs))
        self._spares.retire()
        for number in list(self._processes):
            self._end(number, Ended(why="lost"))
        if not was_up:
            await self._after_a_bad_start()
        while not self._closed:
            try:
                return self._use(ZygoteHandle(self._setup))
            except OSError as error:  # there is no memory, process or descriptor left
                emit("loop.failed", loop="zygote", error=f"{type(error).__name__}: {error}")
                await self._wait_longer()

    async def _after_a_bad_start(self) -> None:
        # Runs wait until a zygote is up: losing them would use up their recoveries.
        if self._setup.preload:
            error = "the zygote died while importing this; continuing without it"
            emit("handler.broken", distribution=", ".join(self._setup.preload), error=f"preload: {error}")
            self._setup = replace(self._setup, preload=())
            return
        await self._wait_longer()

    async def _wait_longer(self) -> None:
        await asyncio.sleep(self._pause)
        self._pause = min(self._pause * 2, LONGEST_RESTART)

    async def _cannot_start(self, why: str | None) -> Outcome:
        # Otherwise it would be admitted again at once.
        await asyncio.sleep(1.0)
        return HandedBack(f"no process could be started: {why}")

    async def _reap_periodically(self) -> None:
        # As PID 1 of a container the worker inherits all orphans.
        while True:
            await asyncio.sleep(REAP_EVERY)
            for process in linux.adopted(linux.processes()):
                if process.state == "Z" and self._zygote is not None and process.pid != self._zygote.pid:
                    linux.reap(process.pid)

    def _remove(self, folder: str) -> None:
        try:
            os.rmdir(folder)
        except OSError:  # the handler has left files in it
            self._in_background(asyncio.to_thread(run_folders.remove, folder))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
