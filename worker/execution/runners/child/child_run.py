"""One run in its own process, as the worker sees it: channel, output, stop, end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

from worker.clock import Clock
from worker.errors import Unavailable, WorkerError
from worker.execution.runners.child import messages
from worker.execution.runners.child.messages import Message
from worker.execution.runners.child.worker_channel import error_message
from worker.execution.runners.contract import (
    LEASE_LOST,
    RunServices,
    StopSignal,
    Work,
    after_stop,
    handler_exited,
    outcome_of_stop,
)
from worker.execution.runners.output import RunOutput
from worker.handlers.json_text import NotStorable, check_json_text
from worker.handlers.steps import StepError
from worker.runs.outcome import Error, Failed, Lost, Outcome
from worker.runs.run import NewStep
from worker.runs.waits import NewWait
from worker.telemetry.events import emit

# Seconds that a process may take to end after it sent its outcome, or was killed.
LAST_STEPS = 2.0
# Requests of one run that are answered at the same time; more of them wait.
MAX_REQUESTS = 16
_READ = 65_536
_LOST = {"lost": "the process that forked it is gone", "frozen": "frozen for longer than max_freeze"}

SendSignal = Callable[[str], None]  # "interrupt" or "kill", for the zygote to send


@dataclass(frozen=True, slots=True)
class Ended:
    """What the zygote reports of a process; `why` is set if it killed the run itself."""

    status: int = 0
    memory: int = 0
    why: str | None = None
    detail: str | None = None


class ChildRun(asyncio.Protocol):
    """Created when its process is about to start; `finish` returns the outcome once it is gone."""

    def __init__(
        self, work: Work, services: RunServices, stop: StopSignal, clock: Clock, send_signal: SendSignal
    ) -> None:
        self._work = work
        self._services = services
        self._send_signal = send_signal
        self._loop = asyncio.get_running_loop()
        self._output = RunOutput(services.log, clock)
        self._unframer = messages.Unframer()
        self._channel: asyncio.Transport | None = None
        self._requests: set[asyncio.Task[None]] = set()
        self._saving = asyncio.Lock()
        self._returned: Outcome | None = None
        self._ended: asyncio.Future[Ended] = self._loop.create_future()
        self._pipes: dict[str, int] = {}
        self._channel_open = False
        self._drained = asyncio.Event()
        self._linger: asyncio.TimerHandle | None = None
        self.stop = stop
        self.unstarted: str | None = None  # why the kernel could not start a process

    async def open(self) -> list[int]:
        """The descriptors for the process: channel, stdout, stderr; the work is already in the first."""
        ours, theirs = socket.socketpair()
        given = [theirs.detach()]
        try:
            self._channel_open = True
            await self._loop.create_connection(lambda: self, sock=ours)
            self._send(messages.work_message(self._work))
            for source in ("stdout", "stderr"):
                given.append(self._pipe(source))
        except OSError:
            for descriptor in given:
                os.close(descriptor)
            raise
        return given

    async def finish(self) -> Outcome:
        """Wait for the end; stop the run when asked to."""
        stopping = asyncio.create_task(self._stop_when_requested())
        self.stop.on_kill(lambda: self._send_signal("kill"))
        try:
            ended = await self._ended
            # All its processes are gone: read what they have written.
            async with asyncio.timeout(LAST_STEPS):
                await self._drained.wait()
        except TimeoutError:
            # A process outside the run holds a descriptor; what it writes is not the run's.
            self._drained.set()
        finally:
            stopping.cancel()
            self.close()
        self._output.close()
        if ended.why in ("out_of_memory", "frozen"):
            self._emit_killed(ended.why)
        if ended.memory:
            self._services.used(ended.memory)
        outcome = outcome_of_end(self._returned, ended, self.stop, memory=self._work.memory)
        if isinstance(outcome, Failed) and self._returned is None:
            self._services.log("error", "log", outcome.error.message)
        return outcome

    def end(self, ended: Ended) -> None:
        """The process and all its descendants are gone, or the zygote is."""
        if ended.why == "no_process":
            self.unstarted = ended.detail
        if not self._ended.done():
            self._ended.set_result(ended)

    def close(self) -> None:
        """Close every descriptor."""
        for source in list(self._pipes):
            self._close_pipe(source)
        for task in self._requests:
            task.cancel()
        if self._linger is not None:
            self._linger.cancel()
        if self._channel is not None:
            self._channel.abort()

    # asyncio.Protocol, for the channel

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._channel = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._unframer.feed(data):
                self._handle(message)
        except (messages.BrokenFrame, KeyError, TypeError, ValueError, StepError):
            error = Error("BrokenChannel", "the run's process sent an invalid message")
            self._returned = Failed(error, "result_invalid")
            self._send_signal("kill")

    def connection_lost(self, error: Exception | None) -> None:
        self._channel_open = False
        self._check_drained()

    # messages of the process

    def _handle(self, message: Message) -> None:
        match message["op"]:
            case "started":
                self._services.started()
            case "progress":
                self._services.progress(*messages.progress_of(message))
            case "save":
                self._answer_later(message, self._save(message["data"]))
            case "token":
                self._answer_later(message, self._token(bool(message["fresh"])))
            case "steps":
                self._answer_later(message, self._load_steps(int(message["after"])))
            case "step":
                self._answer_later(message, self._store_step(messages.step_of(message["step"])))
            case "wait":
                self._answer_later(message, self._open_wait(messages.wait_of(message["wait"])))
            case "budgets":
                self._answer_later(message, self._budgets())
            case "spend":
                self._answer_later(message, self._spend(*messages.spend_of(message)))
            case "end":
                self._returned = messages.outcome_of_message(message["outcome"])
                self._linger = self._loop.call_later(LAST_STEPS, self._send_signal, "kill")

    def _answer_later(self, message: Message, work: Awaitable[Message]) -> None:
        task = asyncio.create_task(self._answer(message["n"], work))
        self._requests.add(task)
        task.add_done_callback(self._answered)
        if len(self._requests) >= MAX_REQUESTS and self._channel is not None:
            self._channel.pause_reading()

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._requests.discard(task)
        if self._channel is not None and not self._channel.is_closing():
            self._channel.resume_reading()

    async def _answer(self, number: int, work: Awaitable[Message]) -> None:
        try:
            answer = await work
        except (WorkerError, StepError) as error:
            answer = {"error": error_message(error)}
        except Exception as error:  # of the store: the handler's call fails
            answer = {"error": error_message(Unavailable(f"not possible now ({type(error).__name__})"))}
        self._send({"op": "answer", "n": number, **answer})

    async def _save(self, data: Any) -> Message:
        if not isinstance(data, str):
            raise Unavailable("a checkpoint is JSON text")
        try:
            check_json_text(data, "checkpoint")
        except NotStorable as error:
            raise Unavailable(str(error)) from None
        async with self._saving:  # in the order they were sent
            await self._services.save(data)
        return {}

    async def _token(self, fresh: bool) -> Message:
        return {"granted": messages.granted_message(*await self._services.token(fresh=fresh))}

    async def _load_steps(self, after: int) -> Message:
        return messages.page_message(await self._services.load_steps(after))

    async def _store_step(self, step: NewStep) -> Message:
        stored = await self._services.store_step(step)
        return {"stored": None if stored == step.result_json else stored}

    async def _open_wait(self, wait: NewWait) -> Message:
        return messages.wait_state_message(await self._services.open_wait(wait))

    async def _budgets(self) -> Message:
        return messages.budgets_message(await self._services.budgets())

    async def _spend(self, meter: str, amount: int, number: int) -> Message:
        return messages.budgets_message(await self._services.spend(meter, amount, number))

    def _send(self, message: Message) -> None:
        if self._channel is not None and not self._channel.is_closing():
            self._channel.write(messages.frame(message))

    # stopping

    async def _stop_when_requested(self) -> None:
        await self.stop.requested.wait()
        await self.stop.escalate(
            lambda reason: self._send({"op": "stop", "reason": reason}),
            lambda: self._send_signal("interrupt"),
        )
        self._emit_killed(self.stop.reason or "lease lost")
        self._send_signal("kill")

    def _emit_killed(self, reason: str) -> None:
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
            self._close_pipe(source)
            self._check_drained()

    def _close_pipe(self, source: str) -> None:
        descriptor = self._pipes.pop(source)
        self._loop.remove_reader(descriptor)
        os.close(descriptor)

    def _check_drained(self) -> None:
        if not self._pipes and not self._channel_open:
            self._drained.set()


def outcome_of_end(
    returned: Outcome | None, ended: Ended, stop: StopSignal, *, memory: int | None = None
) -> Outcome:
    """The outcome of an attempt whose process is gone. `returned` is what it sent, `memory` is in bytes."""
    if stop.killed:
        return LEASE_LOST
    if returned is not None:
        return after_stop(returned, stop)
    if ended.why == "out_of_memory":
        cap = f" of {memory // (1024 * 1024)} MiB" if memory else ""
        return Failed(Error("OutOfMemory", f"the run used more than its cap{cap}"), "out_of_memory")
    if stop.reason is not None:
        return outcome_of_stop(stop)
    if ended.why in _LOST:
        return Lost(_LOST[ended.why])
    return handler_exited(exit_detail(ended.status))


def exit_detail(status: int) -> str:
    """A wait status in words: `exit code 3`, `signal SIGSEGV`."""
    code = os.waitstatus_to_exitcode(status)
    if code == messages.CHANNEL_CLOSED:
        return "its channel to the worker was closed"
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
