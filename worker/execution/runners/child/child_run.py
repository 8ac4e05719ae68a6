"""One run in its own process, as the worker sees it: messages, output, stop, outcome."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from worker.clock import Clock
from worker.errors import Unavailable, WorkerError
from worker.execution.runners.child import messages
from worker.execution.runners.child.child_process import ChildProcess, Ended
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
# Seconds between checks of a process that has not read its work yet.
UNREAD = 1.0
# Requests of one run that are answered at the same time; more of them wait.
MAX_REQUESTS = 16
_LOST = {
    "lost": "the process that forked it is gone",
    "frozen": "frozen for longer than max_freeze",
    "stopped": "its process was stopped (SIGSTOP)",
}


class ChildRun:
    """A run in the process that serves it; `finish` returns its outcome once the process is gone."""

    def __init__(
        self,
        process: ChildProcess,
        work: Work,
        services: RunServices,
        stop: StopSignal,
        clock: Clock,
        on_started: Callable[[], None],
    ) -> None:
        self._process = process
        self._on_started = on_started
        self._work = work
        self._services = services
        self._loop = asyncio.get_running_loop()
        self._output = RunOutput(services.log, clock)
        self._unframer = messages.Unframer()
        self._requests: set[asyncio.Task[None]] = set()
        self._saving = asyncio.Lock()
        self._returned: Outcome | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._begun = False
        self.on_output = self._output.feed
        self.stop = stop
        process.serve(self, messages.work_message(work, (work.timeout_at - clock.now()).total_seconds()))
        if work.memory is not None:
            process.signal("cap", memory=work.memory)
        self._unread = self._loop.call_later(UNREAD, self._check_read)

    async def finish(self) -> Outcome | None:
        """Wait for the end, and stop the run when asked to. None: the process ended before the run began."""
        stopping = asyncio.create_task(self._stop_when_requested())
        self.stop.on_kill(lambda: self._process.signal("kill"))
        try:
            ended = await self._process.ended
            # All its processes are gone: read what they have written.
            await self._process.drained(LAST_STEPS)
        finally:
            stopping.cancel()
            self.close()
        if not self._begun and self._to_be_repeated(ended):
            return None
        self._output.close()
        if ended.why in ("out_of_memory", "frozen"):
            self._emit_killed(ended.why)
        if ended.memory:
            self._services.used(ended.memory)
        outcome = outcome_of_end(self._returned, ended, self.stop, memory=self._work.memory)
        if isinstance(outcome, Failed) and self._returned is None:
            self._services.log("error", "log", outcome.error.message)
        return outcome

    def close(self) -> None:
        """Close every descriptor."""
        self._process.close()
        for task in self._requests:
            task.cancel()
        self._unread.cancel()
        if self._linger is not None:
            self._linger.cancel()

    def _to_be_repeated(self, ended: Ended) -> bool:
        """Whether the handler was not called, and another process may call it."""
        if self.stop.asked or ended.why == "frozen":
            return False
        return ended.why in ("no_process", "stopped") or self._process.ended_unread

    def _check_read(self) -> None:
        """Have a process killed that cannot read its work because it is stopped (SIGSTOP)."""
        if not self._process.has_read_all:
            self._process.signal("check")
            self._unread = self._loop.call_later(UNREAD, self._check_read)

    def on_data(self, data: bytes) -> None:
        try:
            for message in self._unframer.feed(data):
                self._handle(message)
        except (messages.BrokenFrame, KeyError, TypeError, ValueError, StepError):
            error = Error("BrokenChannel", "the run's process sent an invalid message")
            self._returned = Failed(error, "result_invalid")
            self._process.signal("kill")

    # messages of the process

    def _handle(self, message: Message) -> None:
        match message["op"]:
            case "started":
                self._begun = True
                self._unread.cancel()
                self._services.started()
                self._on_started()
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
                self._linger = self._loop.call_later(LAST_STEPS, self._process.signal, "kill")

    def _answer_later(self, message: Message, work: Awaitable[Message]) -> None:
        task = asyncio.create_task(self._answer(message["n"], work))
        self._requests.add(task)
        task.add_done_callback(self._answered)
        if len(self._requests) >= MAX_REQUESTS:
            self._process.pause_reading()

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._requests.discard(task)
        self._process.resume_reading()

    async def _answer(self, number: int, work: Awaitable[Message]) -> None:
        try:
            answer = await work
        except (WorkerError, StepError) as error:
            answer = {"error": error_message(error)}
        except Exception as error:  # of the store: the handler's call fails
            answer = {"error": error_message(Unavailable(f"not possible now ({type(error).__name__})"))}
        self._process.send({"op": "answer", "n": number, **answer})

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

    # stopping

    async def _stop_when_requested(self) -> None:
        await self.stop.requested.wait()
        await self.stop.escalate(
            lambda reason: self._process.send({"op": "stop", "reason": reason}),
            lambda: self._process.signal("interrupt"),
        )
        self._emit_killed(self.stop.reason or "lease lost")
        self._process.signal("kill")

    def _emit_killed(self, reason: str) -> None:
        work = self._work
        emit("child.killed", org=work.org_code, run=work.run_id, attempt=work.attempt, reason=reason)


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
