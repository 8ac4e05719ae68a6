"""Pool: the runner that gives each run its own process, forked by a zygote."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

from worker.clock import Clock
from worker.execution.runners.child import linux
from worker.execution.runners.child.child_run import ChildRun, Ended
from worker.execution.runners.child.messages import Setup
from worker.execution.runners.child.sandbox import Rules
from worker.execution.runners.contract import LEASE_LOST, RunServices, StopSignal, Work, outcome_of_stop
from worker.handlers.installed import ENVIRONMENT, FOLDERS, environment
from worker.runs.lease import Lease
from worker.runs.outcome import HandedBack, Outcome
from worker.telemetry.events import emit

Message = Mapping[str, Any]
_DATAGRAM = 65_536
_STEP = 0.002
# Seconds between starts of a zygote that does not come up, at first and at most; until one whose control
# socket is closed is killed; and between checks for adopted processes that have ended.
RESTART = 0.5
LONGEST_RESTART = 10.0
CLOSE = 5.0
REAP_EVERY = 30.0


class ZygoteHandle:
    """One zygote process, alive or not. `send` is thread-safe."""

    def __init__(self, setup: Setup) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        lock = [] if setup.lock is None else [setup.lock]
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "worker.execution.runners.child.zygote"),
                    *(str(theirs.fileno()), replace(setup, parent=os.getpid()).as_json()),
                ],
                env=environment(setup.environment),
                pass_fds=[theirs.fileno(), *lock],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.pid = self._process.pid
        born = linux.process_of(self.pid)
        self._started = 0.0 if born is None else born.started
        self._pidfd = os.pidfd_open(self.pid)
        self._sending = threading.Lock()
        self._unsent: deque[tuple[bytes, Sequence[int]]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        emit("zygote.started", pid=self.pid)

    def attach(self, on_message: Callable[[Message], None], on_death: Callable[[], None]) -> None:
        """Listen on the running loop; `on_death` is called once, when the process is gone."""
        self._loop = loop = asyncio.get_running_loop()

        def died() -> None:
            loop.remove_reader(self._pidfd)
            self._receive(on_message)  # its last messages
            loop.remove_reader(self._control)
            on_death()

        loop.add_reader(self._control, self._receive, on_message)
        loop.add_reader(self._pidfd, died)

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send a message, in order and without waiting; closes the descriptors once they are sent."""
        with self._sending:
            self._unsent.append((json.dumps(message).encode(), descriptors))
            if not self._flush() and self._loop is not None:
                self._loop.call_soon_threadsafe(self._send_later)

    def close(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._control)
            self._loop.remove_reader(self._pidfd)
            self._loop.remove_writer(self._control)
        self._control.close()

    async def gone(self, patience: float) -> None:
        """Wait until the process has ended, killing it after `patience` seconds; kill what it leaves."""
        loop = asyncio.get_running_loop()
        until = loop.time() + patience
        while self._process.poll() is None:
            if loop.time() >= until:
                self._process.kill()
            await asyncio.sleep(_STEP)
        await self._end_adopted()
        os.close(self._pidfd)

    async def _end_adopted(self) -> None:
        """Kill what the dead zygote has left to this process, a subreaper: it is younger than the zygote."""
        while True:
            table = linux.processes()
            left = {process.pid for process in linux.adopted(table) if process.started >= self._started}
            if not left:
                return
            linux.send(left | linux.descendants(table, left), signal.SIGKILL)
            await asyncio.sleep(_STEP)
            for pid in left:
                linux.reap(pid)

    def _receive(self, on_message: Callable[[Message], None]) -> None:
        while True:
            try:
                data = self._control.recv(_DATAGRAM)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:  # closed; the pidfd reports the end of the process
                if self._loop is not None:
                    self._loop.remove_reader(self._control)
                return
            on_message(json.loads(data))

    def _flush(self) -> bool:
        while self._unsent:
            data, descriptors = self._unsent[0]
            try:
                socket.send_fds(self._control, [data], descriptors)
            except BlockingIOError:
                return False
            except OSError:  # it is dead; its runs are about to end
                pass
            self._unsent.popleft()
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _send_later(self) -> None:
        if self._loop is not None and self._control.fileno() >= 0:
            self._loop.add_writer(self._control, self._writable)

    def _writable(self) -> None:
        with self._sending:
            if self._flush() and self._loop is not None:
                self._loop.remove_writer(self._control)


class ChildPool:
    """Call `start` from the main thread before any key is read.

    `lock_fd` is the descriptor of the SQLite file's lock, which the zygote holds while it lives. The zygote
    imports the `preload` modules or distributions. Without `sandbox` the runs are not confined.
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
        sandbox: Rules | None = None,
    ) -> None:
        self._clock = clock
        self._freezing = freezing
        self._setup = Setup(
            folder="",
            lock=lock_fd,
            environment=(*ENVIRONMENT, *pass_environment),
            preload=tuple(preload),
            max_freeze=max_freeze.total_seconds(),
            sandbox=sandbox,
        )
        self._zygote: ZygoteHandle | None = None
        self._closed = False
        self._lease: Message | None = None
        self._numbers = itertools.count(1)
        self._runs: dict[int, ChildRun] = {}
        self._up = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()
        self._reaping: asyncio.Task[None] | None = None
        self._pause = RESTART

    def start(self) -> None:
        """Start the zygote. Needs no running loop."""
        linux.hide_memory()  # it contains the key ring and every org's tokens
        linux.become_subreaper()
        linux.allow_many_descriptors()
        self._setup = replace(self._setup, folder=tempfile.mkdtemp(prefix=FOLDERS))
        self._zygote = ZygoteHandle(self._setup)

    def attach(self) -> None:
        """Listen to the zygote on the running loop; `run` does it if needed."""
        if self._reaping is None and self._zygote is not None:
            self._use(self._zygote)
            self._reaping = asyncio.create_task(self._reap_periodically())

    @property
    def zygote_pid(self) -> int | None:
        return None if self._zygote is None else self._zygote.pid

    def renewed(self, lease: Lease) -> None:
        """The lease is renewed: runs may continue until its `freeze_at`. Thread-safe."""
        if self._freezing:
            self._lease = {"op": "lease", "freeze_at": lease.freeze_at}
            if self._zygote is not None:
                self._zygote.send(self._lease)

    async def run(self, work: Work, services: RunServices, stop: StopSignal) -> Outcome:
        """Run the handler in its own process; none of its processes is left afterwards."""
        self.attach()
        zygote = await self._ready(stop)
        if stop.killed:
            return LEASE_LOST
        if zygote is None:
            return outcome_of_stop(stop) if stop.asked else HandedBack("the worker is ending")
        number = next(self._numbers)
        run = ChildRun(work, services, stop, self._clock, lambda op: zygote.send({"op": op, "run": number}))
        self._runs[number] = run  # before the next await, so that it ends if the zygote dies
        try:
            folder = self._folder(number)
            os.makedirs(folder, 0o700)
            descriptors = await run.open()
        except OSError as error:
            del self._runs[number]
            run.close()
            return await self._cannot_start(error.strerror)
        start = {"op": "start", "run": number, "folder": folder, "memory": work.memory}
        start["seconds"] = (work.timeout_at - self._clock.now()).total_seconds()
        zygote.send(start, descriptors)
        try:
            outcome = await run.finish()
        except asyncio.CancelledError:
            zygote.send({"op": "kill", "run": number})
            raise
        if run.unstarted is not None:
            return await self._cannot_start(run.unstarted)
        return outcome

    async def close(self) -> None:
        self._closed = True
        self._up.set()
        zygote, self._zygote = self._zygote, None
        if zygote is not None:
            zygote.close()
            await zygote.gone(CLOSE)
        for number in list(self._runs):
            self._end(number, Ended(why="lost"))
        if self._reaping is not None:
            self._reaping.cancel()
        if self._background:
            await asyncio.wait(self._background)
        shutil.rmtree(self._setup.folder, ignore_errors=True)

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
            case "ready":
                self._up.set()
                self._pause = RESTART
                for name, error in message["preload_failures"]:
                    emit("handler.broken", distribution=name, error=f"preload: {error}")

    def _end(self, number: int, ended: Ended) -> None:
        run = self._runs.pop(number, None)
        if run is not None:
            run.end(ended)
        folder = self._folder(number)
        try:
            os.rmdir(folder)
        except OSError:  # the handler has left files in it
            self._in_background(asyncio.to_thread(shutil.rmtree, folder, True))

    async def _replace(self, zygote: ZygoteHandle) -> None:
        """Kill the runs of a dead zygote, which are lost, and start another zygote."""
        if self._closed or zygote is not self._zygote:
            return
        was_up = self._up.is_set()
        self._up.clear()
        zygote.close()
        await zygote.gone(0)
        lost = list(self._runs)
        emit("zygote.died", pid=zygote.pid, runs=len(lost))
        for number in lost:
            self._end(number, Ended(why="lost"))
        if not was_up:
            await self._after_a_bad_start()
        if not self._closed:
            self._use(ZygoteHandle(self._setup))

    async def _after_a_bad_start(self) -> None:
        # Runs wait until a zygote is up: losing them would use up their recoveries.
        if self._setup.preload:
            error = "the zygote died while importing this; continuing without it"
            emit("handler.broken", distribution=", ".join(self._setup.preload), error=f"preload: {error}")
            self._setup = replace(self._setup, preload=())
            return
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

    def _folder(self, number: int) -> str:
        return os.path.join(self._setup.folder, str(number))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
