"""One run in its own process, as the worker sees it: messages, output, stop, outcome."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from worker.clock import Clock
from worker.engine.runners.child import linux, messages
from worker.engine.runners.child.child_process import CHECKED_AT_ONCE, ChildProcess, Ended, Inbox, InboxTurns
from worker.engine.runners.child.messages import MALFORMED, BrokenMessage, Message
from worker.engine.runners.contract import (
    LEASE_LOST,
    GivenErrors,
    RunServices,
    StopSignal,
    Work,
    after_handler,
    after_stop,
    handler_exited,
    outcome_of_stop,
)
from worker.engine.runners.egress import EgressBroker, unless_starved
from worker.engine.runners.output import RunOutput
from worker.errors import LeaseLost, WorkerError
from worker.handlers.calls import AskToken, Call, NotACall, OneWayCall, read
from worker.handlers.json_text import NotStorable, check_json_text
from worker.handlers.parts import Count
from worker.handlers.steps import StepError
from worker.model.runs.outcome import Error, Failed, Lost, Outcome
from worker.telemetry.events import emit

# Seconds that a process may take to end after it sent its outcome, or was killed.
LAST_STEPS = 2.0
# Seconds between checks of a process that has not read its work yet.
UNREAD = 1.0
# Requests of one run that are answered at the same time; more of them wait.
MAX_REQUESTS = 16
# The numbers of requests.
_NUMBER = Count(2**53)
# JSON texts with a name and a limit each, as `Inbox.check` takes them.
Unchecked = Sequence[tuple[str, str, int]]
# The end of a run whose process does not keep to the protocol.
BROKEN = handler_exited("it sent an invalid message")
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
        turns: InboxTurns,
        broker: EgressBroker | None = None,
    ) -> None:
        self._process = process
        # What its clients send goes by the broker; a run with a list of what it may reach, is sealed.
        self._brokered = None if broker is None else broker.serve(work, services)
        self._sealed = broker is not None and not work.egress.is_open
        self._on_started = on_started
        self._work = work
        self._services = services
        self._loop = asyncio.get_running_loop()
        self._output = RunOutput(services.log, clock)
        self._inbox = Inbox(
            turns,
            process,
            self._receive,
            # Once it has ended, its outcome must not wait behind its calls.
            holds=lambda: (self._is_busy or process.is_behind) and not process.ended.done(),
            on_broken=self._refuse,
            time=self._loop.time,
            call_later=self._loop.call_later,
        )
        self._requests: set[asyncio.Task[None]] = set()
        self._returned: Outcome | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._begun = False
        self._ending: asyncio.Task[None] | None = None
        self.on_data = self._inbox.feed
        self.on_room = self._inbox.go_on
        self.on_output = self._output.feed
        self.stop = stop
        environment = {} if broker is None else broker.environment(work)
        seconds = (work.timeout_at - clock.now()).total_seconds()
        process.serve(
            self, messages.first_message(work, seconds, sealed=self._sealed, environment=environment)
        )
        # What the run passes meanwhile waits in the door.
        if self._brokered is not None and (door := process.take_door()) is not None:
            self._brokered.open(door)
        if work.memory is not None:
            process.signal("cap", memory=work.memory)
        self._unread = self._loop.call_later(UNREAD, self._check_read)

    async def finish(self) -> Outcome | None:
        """Wait for the end, and stop the run when asked to. None: the process ended before the run began."""
        stopping = asyncio.create_task(self._stop_when_requested())
        self.stop.on_kill(self._kill)
        try:
            ended = await self._process.ended
            # All its processes are gone: read what they have written.
            await self._process.drained(LAST_STEPS)
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_STEPS):
                    await self._inbox.emptied()
            if self._ending is not None:
                await asyncio.wait({self._ending})
            if self._brokered is not None:
                await self._brokered.end()
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
        outcome = outcome_of_end(
            self._returned, ended, self.stop, memory=self._work.memory, errors=self._services.errors
        )
        outcome = unless_starved(outcome, self._brokered)
        if isinstance(outcome, Failed) and (self._returned is None or outcome.reason == "handler_exited"):
            self._services.log("error", "log", outcome.error.message)
        return outcome

    def close(self) -> None:
        """Close every descriptor."""
        self._process.close()
        self._inbox.close()
        if self._brokered is not None:
            self._brokered.drop()
        if self._ending is not None:
            self._ending.cancel()
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

    # messages of the process

    def _receive(self, message: Message) -> None:
        """Act on one message. Raises BrokenMessage for any that our own code does not send."""
        try:
            act = self._read(message)
        except (*MALFORMED, StepError) as error:
            raise BrokenMessage("not a message") from error
        act()

    def _read(self, message: Message) -> Callable[[], None]:
        """What a message asks for. Raises one of `MALFORMED`."""
        texts = _Texts()
        match message["op"]:
            case "started":
                return self._start
            case "end":
                outcome = messages.outcome_of_message(message["outcome"], texts.check)
                return partial(self._end, outcome, texts.unchecked)
            case name:
                call = read(name, message, texts.check)
        if isinstance(call, OneWayCall):
            return partial(self._tell, call)
        if not call.way.from_process:
            raise NotACall(f"{name} is not a call of a run's process")
        number = _NUMBER.read(message["n"], texts.check)
        return partial(self._answer_later, number, call, texts.unchecked)

    def _start(self) -> None:
        if not self._begun:
            self._begun = True
            self._unread.cancel()
            self._services.started()
            self._on_started()

    def _tell(self, notice: OneWayCall) -> None:
        with suppress(LeaseLost):
            self._services.tell(notice)

    def _end(self, outcome: Outcome, unchecked: Unchecked) -> None:
        """Take the outcome; only the first one counts."""
        if self._linger is not None:
            return
        self._linger = self._loop.call_later(LAST_STEPS, self._kill)
        self._stop_sending()
        if unchecked:
            self._ending = asyncio.create_task(self._check_end(outcome, unchecked))
        else:
            self._returned = outcome

    async def _check_end(self, outcome: Outcome, unchecked: Unchecked) -> None:
        try:
            for text in unchecked:
                await self._inbox.check(*text)
        except NotStorable:
            self._refuse()
        else:
            self._returned = self._returned or outcome

    def _refuse(self) -> None:
        """End a run whose process does not keep to the protocol."""
        self._returned = BROKEN
        self._inbox.close()
        self._kill()

    def _kill(self) -> None:
        self._stop_sending()
        self._process.signal("kill")

    def _stop_sending(self) -> None:
        if self._brokered is not None:
            self._brokered.stop()

    @property
    def _is_busy(self) -> bool:
        return len(self._requests) >= MAX_REQUESTS

    def _answer_later(self, number: int, call: Call[Any], unchecked: Unchecked) -> None:
        if self._is_busy:  # it has ended, and gets no answer
            return
        task = asyncio.create_task(self._answer(number, call, unchecked))
        self._requests.add(task)
        task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._requests.discard(task)
        self._inbox.go_on()

    async def _answer(self, number: int, call: Call[Any], unchecked: Unchecked) -> None:
        try:
            for text in unchecked:
                await self._inbox.check(*text)
            given = await self._services.ask(call)
            if self._sealed and isinstance(call, AskToken):
                given = messages.hidden(self._work, given[0], call), given[1]
            answer = call.answer.write(given)
        except (NotStorable, NotACall):
            self._refuse()
            return
        except (WorkerError, StepError) as error:
            answer = {"error": messages.error_message(error)}
        self._process.send({"op": "answer", "n": number, **answer})

    # stopping

    async def _stop_when_requested(self) -> None:
        await self.stop.requested.wait()
        await self.stop.escalate(
            lambda reason: self._process.send({"op": "stop", "reason": reason}),
            lambda: self._process.signal("interrupt"),
        )
        self._emit_killed(self.stop.reason or "lease lost")
        self._kill()

    def _emit_killed(self, reason: str) -> None:
        work = self._work
        emit("child.killed", org=work.org_code, run=work.run_id, attempt=work.attempt, reason=reason)


class _Texts:
    """The JSON texts of a message that are too long to be checked at once."""

    def __init__(self) -> None:
        self.unchecked: list[tuple[str, str, int]] = []

    def check(self, text: str, what: str, limit: int) -> None:
        if not isinstance(text, str):
            raise TypeError("not a text")
        if len(text) <= CHECKED_AT_ONCE:
            check_json_text(text, what, limit)
        else:
            self.unchecked.append((text, what, limit))


def outcome_of_end(
    returned: Outcome | None,
    ended: Ended,
    stop: StopSignal,
    *,
    memory: int | None = None,
    errors: GivenErrors | None = None,
) -> Outcome:
    """The outcome of an attempt whose process is gone.

    `returned` is what it sent, `memory` is in bytes, and `errors` are those that it was given.
    """
    if stop.killed:
        return LEASE_LOST
    if returned is BROKEN:
        return after_stop(returned, stop)
    if returned is not None:
        return after_handler(returned, stop, errors or GivenErrors())
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
    return linux.exit_words(code)
