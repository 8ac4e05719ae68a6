"""One run in a process of its own, as the worker holds it: channel, output, stop, end."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, cast

from worker.clock import Clock
from worker.errors import Unavailable, WorkerError
from worker.execution.runners.child.messages import (
    BrokenFrame,
    Message,
    Unframer,
    frame,
    granted_message,
    outcome_of_message,
    shown_progress,
    work_message,
)
from worker.execution.runners.child.run_line import error_message
from worker.execution.runners.contract import RunServices, StopSignal, Work, save_for_sure
from worker.execution.runners.exit_status import Ended, outcome_of_end
from worker.execution.runners.output import RunOutput
from worker.handlers.json_text import NotStorable, check_json_text
from worker.runs.outcome import Error, Failed, Outcome
from worker.telemetry.events import emit

# Seconds that a process may take to end once it has sent its outcome, or been killed.
LAST_STEPS = 2.0
# Questions of one run at a time; a handler that asks more waits.
ASKING = 16
_READ = 65_536

Signal = Callable[[str], None]  # "interrupt" or "kill", for the zygote to send


class ChildRun(asyncio.Protocol):
    """Made when its process is about to start; `finish` gives the outcome once it is gone."""

    def __init__(self, work: Work, link: RunServices, stop: StopSignal, clock: Clock, signal: Signal) -> None:
        self._work = work
        self._link = link
        self._stop = stop
        self._signal = signal
        self._loop = asyncio.get_running_loop()
        self._output = RunOutput(link.log, clock)
        self._unframer = Unframer()
        self._channel: asyncio.Transport | None = None
        self._asked: set[asyncio.Task[None]] = set()
        self._saving = asyncio.Lock()
        self._said: Outcome | None = None
        self._ended: asyncio.Future[Ended] = self._loop.create_future()
        self._pipes: dict[str, int] = {}
        self._channel_open = False
        self._drained = asyncio.Event()
        self._linger: asyncio.TimerHandle | None = None
        self.unstarted: str | None = None  # why the kernel gave it no process

    async def open(self) -> list[int]:
        """The descriptors for the process: channel, stdout, stderr; the work waits in the first."""
        ours, theirs = socket.socketpair()
        given = [theirs.detach()]
        try:
            self._channel_open = True
            await self._loop.create_connection(lambda: self, sock=ours)
            self._tell(work_message(self._work))
            for source in ("stdout", "stderr"):
                given.append(self._pipe(source))
        except OSError:
            for descriptor in given:
                os.close(descriptor)
            raise
        return given

    async def finish(self) -> Outcome:
        """Wait for the end, stopping the run when asked to."""
        stopping = asyncio.create_task(self._stopping())
        self._stop.on_kill(lambda: self._signal("kill"))
        try:
            ended = await self._ended
            # All its processes are gone: what they have said is there to be read.
            async with asyncio.timeout(LAST_STEPS):
                await self._drained.wait()
        except TimeoutError:
            # A descriptor was handed to a process outside: what that writes is not the run's.
            self._drained.set()
        finally:
            stopping.cancel()
            self.close()
        self._output.close()
        if ended.why in ("out_of_memory", "frozen"):
            self._tell_kill(ended.why)
        if ended.memory:
            self._link.used(ended.memory)
        outcome = outcome_of_end(self._said, ended, self._stop, memory=self._work.memory)
        if isinstance(outcome, Failed) and self._said is None:
            self._link.log("error", "log", outcome.error.message)
        return outcome

    def end(self, ended: Ended) -> None:
        """The process and all below it are gone, or the zygote is."""
        if ended.why == "no_process":
            self.unstarted = ended.detail
        if not self._ended.done():
            self._ended.set_result(ended)

    def close(self) -> None:
        """Let go of every descriptor."""
        for source in list(self._pipes):
            self._shut(source)
        for task in self._asked:
            task.cancel()
        if self._linger is not None:
            self._linger.cancel()
        if self._channel is not None:
            self._channel.abort()

    def freeze(self, at: float) -> None:
        """The zygote has stopped all its processes, at this monotonic instant."""
        self._stop.freeze(at)

    def thaw(self, at: float) -> None:
        """They go on, from this monotonic instant."""
        self._stop.thaw(at)

    # asyncio.Protocol, for the channel

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._channel = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._unframer.feed(data):
                self._hear(message)
        except (BrokenFrame, KeyError, TypeError, ValueError):
            error = Error("BrokenChannel", "the run's process spoke no protocol")
            self._said = Failed(error, "result_invalid")
            self._signal("kill")

    def connection_lost(self, error: Exception | None) -> None:
        self._channel_open = False
        self._check_drained()

    # what the process says

    def _hear(self, message: Message) -> None:
        match message["op"]:
            case "started":
                self._link.started()
            case "progress":
                self._link.progress(*shown_progress(message))
            case "save":
                self._ask(message, self._save(message["data"]))
            case "token":
                self._ask(message, self._token(bool(message["fresh"])))
            case "end":
                self._said = outcome_of_message(message["outcome"])
                self._linger = self._loop.call_later(LAST_STEPS, self._signal, "kill")

    def _ask(self, message: Message, work: Awaitable[Message]) -> None:
        task = asyncio.create_task(self._answer(message["n"], work))
        self._asked.add(task)
        task.add_done_callback(self._answered)
        if len(self._asked) >= ASKING and self._channel is not None:
            self._channel.pause_reading()

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._asked.discard(task)
        if self._channel is not None and not self._channel.is_closing():
            self._channel.resume_reading()

    async def _answer(self, number: int, work: Awaitable[Message]) -> None:
        try:
            answer = await work
        except WorkerError as error:
            answer = {"error": error_message(error)}
        except Exception as error:  # of the store: the handler gets it as an error of its call
            answer = {"error": error_message(Unavailable(f"not possible now ({type(error).__name__})"))}
        self._tell({"op": "answer", "n": number, **answer})

    async def _save(self, data: Any) -> Message:
        if not isinstance(data, str):
            raise Unavailable("a checkpoint is JSON text")
        try:
            check_json_text(data, "checkpoint")
        except NotStorable as error:
            raise Unavailable(str(error)) from None
        async with self._saving:  # in the order they were sent
            await save_for_sure(self._link, data)
        return {}

    async def _token(self, fresh: bool) -> Message:
        return {"granted": granted_message(*await self._link.token(fresh=fresh))}

    def _tell(self, message: Message) -> None:
        if self._channel is not None and not self._channel.is_closing():
            self._channel.write(frame(message))

    # stopping

    async def _stopping(self) -> None:
        stop, interrupted = self._stop, False
        await stop.requested.wait()
        if stop.reason is not None:
            self._tell({"op": "stop", "reason": stop.reason})
        while (now := self._loop.time()) < stop.kill_at:
            if now >= stop.interrupt_at and not interrupted:
                interrupted = True
                self._signal("interrupt")
            await stop.changed(stop.kill_at if interrupted else stop.interrupt_at)
        self._tell_kill(stop.reason or "lease lost")
        self._signal("kill")

    def _tell_kill(self, reason: str) -> None:
        work = self._work
        emit("child.killed", org=work.org_code, run=work.run_id, attempt=work.attempt, reason=reason)

    # output

    def _pipe(self, source: str) -> int:
        ours, theirs = os.pipe()
        os.set_blocking(ours, False)
        self._pipes[source] = ours
        self._loop.add_reader(ours, self._read, source, ours)
        return theirs

    def _read(self, source: str, descriptor: int) -> None:
        try:
            data = os.read(descriptor, _READ)
        except BlockingIOError:
            return
        if data:
            self._output.feed(source, data)
        else:
            self._shut(source)
            self._check_drained()

    def _shut(self, source: str) -> None:
        descriptor = self._pipes.pop(source)
        self._loop.remove_reader(descriptor)
        os.close(descriptor)

    def _check_drained(self) -> None:
        if not self._pipes and not self._channel_open:
            self._drained.set()
