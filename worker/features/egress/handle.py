"""The broker as its worker or host sees it: its process, and the attempts that it serves."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import socket
import sys
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from worker.clock import Clock
from worker.engine.runners.child.zygote_handle import HelperProcess
from worker.engine.runners.contract import RunServices, Work
from worker.errors import WorkerError
from worker.features.egress.pacing import OriginCounts
from worker.features.egress.requests import UNKNOWN_CALL
from worker.features.egress.restarts import RESTART, SILENT, START_WITHIN, Restarts
from worker.handlers.calls import AskLimits, AskShare, AskToken, Call, NotACall, PauseOrigin, read
from worker.handlers.given import HeldToken
from worker.handlers.steps import StepError
from worker.model.egress import BoundSecret, placeholder_of, token_name
from worker.model.runs.lease import Lease
from worker.telemetry.events import emit
from worker.telemetry.tracing import TracedRequest, request_span

_log = logging.getLogger(__name__)
Message = Mapping[str, Any]
COMMAND = (sys.executable, "-P", "-m", "worker.features.egress.broker")
# What the broker may call in the name of an attempt.
BROKER_CALLS = (AskToken, AskLimits, AskShare, PauseOrigin)
# Before the names of variables, as no secret is called.
VARIABLE = "variable "
# Seconds until a broker whose control socket is closed is killed.
CLOSE = 1.0
# Seconds that the end of an attempt waits for its record.
RECORD = 1.0
# Variables by which OpenSSL and HTTP libraries find certificate authorities.
AUTHORITIES = ("SSL_CERT_FILE", "SSL_CERT_DIR")


def failed(code: str, message: str, retry_after: float | None = None) -> dict[str, Any]:
    """An answer that is an error."""
    return {"error": {"code": code, "message": message, "retry_after": retry_after}}


ENDED = failed("lease_lost", "the run has ended")
# Seconds after a broker is up again in which attempts still fail because it was not.
AFTERWARDS = 60.0


class BrokerHandle:
    """Implements `engine.runners.egress.EgressBroker`. `confinement` is that of `confinement.confine`."""

    def __init__(
        self,
        clock: Clock,
        confinement: Mapping[str, bool],
        *,
        bound: Sequence[BoundSecret] = (),
        traced: bool = False,
    ) -> None:
        """`bound` are of this process's environment, for all attempts; `traced` if requests have spans."""
        self._clock = clock
        self._confinement = confinement
        self.bound = tuple(bound)
        self.traced = traced
        self._numbers = itertools.count(1)
        self._process: HelperProcess | None = None
        self._lease: Message | None = None
        self._attempts: dict[int, _Attempt] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._counts: dict[str, OriginCounts] = {}
        self._attached = self._closed = self._retired = False
        self._restarts = Restarts(clock)
        # What a broker that does not come up says of that; and when it is killed.
        self._failure = ""
        self._starting: asyncio.TimerHandle | None = None

    @property
    def fault(self) -> str | None:
        return self._restarts.fault

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        arguments, self._failure = [str(os.getpid()), json.dumps(dict(self._confinement))], ""
        try:
            self._process = HelperProcess(COMMAND, arguments, AUTHORITIES)
        except OSError as error:  # there is no memory or process left, or no interpreter any more
            self._process, self._failure = None, f"{type(error).__name__}: {error}"

    def await_start(self) -> str | None:
        process = self._process
        if process is not None and (message := process.first_message(START_WITHIN)) is not None:
            self._receive(message)
        if self._restarts.is_up:
            return None
        return self._failure or ("" if process is None else process.end) or SILENT

    def attach(self) -> None:
        if self._attached:
            return
        self._attached = True
        process = self._process
        if process is None:
            self._ended()
            return
        process.attach(self._receive, self._ended)
        if not self._restarts.is_up:
            self._starting = asyncio.get_running_loop().call_later(START_WITHIN, self._give_up, process)
        if self._lease is not None:
            process.send(self._lease)

    def serve(self, work: Work, services: RunServices) -> _Attempt:
        self.attach()
        return _Attempt(self, next(self._numbers), work, services, self._clock)

    def environment(self, work: Work) -> Mapping[str, str]:
        return {bound.name: placeholder_of(work.run_id, VARIABLE + bound.name) for bound in self.bound}

    def renewed(self, lease: Lease) -> None:
        self._lease = {"op": "lease", "freeze_at": lease.freeze_at}
        if (process := self._process) is not None:
            process.send(self._lease)

    async def close(self) -> None:
        self._closed = True
        for task in self._tasks:
            task.cancel()
        if self._starting is not None:
            self._starting.cancel()
        process, self._process = self._process, None
        if process is not None:
            process.close()
            await process.gone(CLOSE)

    # For attempts

    def add(self, attempt: _Attempt) -> None:
        """Give the broker an attempt, at its first request."""
        self._attempts[attempt.number] = attempt
        if self.fault is not None:
            attempt.starve(float("inf"))
        self._introduce(attempt)

    def remove(self, attempt: _Attempt) -> None:
        self._attempts.pop(attempt.number, None)

    def send(self, message: Message, descriptor: int | None = None) -> None:
        if self._process is not None:
            self._process.send(message, () if descriptor is None else (os.dup(descriptor),))

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _introduce(self, attempt: _Attempt) -> None:
        for message in attempt.introduction():
            self.send(message)
        if attempt.door is not None:
            self._give_door(attempt, self._process)

    def _give_door(self, attempt: _Attempt, process: HelperProcess | None) -> None:
        """Give the broker an attempt's door; later, if this process has no descriptor left for the moment."""
        if attempt.door is None or process is not self._process or attempt.number not in self._attempts:
            return
        try:
            self.send({"op": "door", "number": attempt.number}, attempt.door.fileno())
        except OSError:
            asyncio.get_running_loop().call_later(RESTART, self._give_door, attempt, process)

    # The process

    def _ended(self) -> None:
        if not self._closed:
            self.begin(self._restart())

    async def _restart(self) -> None:
        """Start another broker, and give it what the last one had."""
        process, self._process = self._process, None
        if self._starting is not None:
            self._starting.cancel()
        if process is not None:
            process.close()
            await process.gone(0)
        await asyncio.sleep(self._restarts.retired() if self._retired else self._died(process))
        self._retired = False
        # The next one begins to count at 0, and nothing waits in it.
        self._paced([])
        if self._closed:
            return
        for attempt in self._attempts.values():
            attempt.lost()
        self._attached = False
        self.start()
        self.attach()
        for attempt in self._attempts.values():
            # One that has ended only waits for its record, and would stay in the broker for good.
            if not attempt.ended:
                self._introduce(attempt)

    def _died(self, process: HelperProcess | None) -> float:
        """Report a broker that has died, or was not started; returns the seconds until the next one."""
        pid, how = (None, "") if process is None else (process.pid, process.end)
        reason = self._failure or how
        pause = self._restarts.ended(reason)
        emit("broker.died", pid=pid, attempts=len(self._attempts), reason=reason)
        if self.fault is not None:
            for attempt in self._attempts.values():
                attempt.starve(float("inf"))
        return pause

    def _give_up(self, process: HelperProcess) -> None:
        self._failure = SILENT
        process.kill()

    def _receive(self, message: dict[str, Any]) -> None:
        attempt = self._attempts.get(message.get("number", 0))
        match message["op"]:
            case "ready":
                self._came_up()
            case "failed":
                self._failure = message["reason"]
            case "ask":
                self.begin(self._answer(attempt, message))
            case "sent" if attempt is not None:
                attempt.trace(message)
            case "denied" if attempt is not None:
                attempt.services.denied(message["origin"], message["reason"])
            case "ended" if attempt is not None:
                attempt.recorded(message["rows"])
            case "counted" if attempt is not None:
                attempt.counted += message["rows"]
            case "retired":
                self._retired = True
            case "paced":
                self._paced([OriginCounts(**counts) for counts in message["counts"]])

    def _paced(self, counts: Sequence[OriginCounts]) -> None:
        """Report what the pacer of the broker has counted since it did last."""
        before, self._counts = self._counts, {each.origin: each for each in counts}
        for origin in sorted(before.keys() | self._counts.keys()):
            old, new = (each.get(origin, OriginCounts(origin)) for each in (before, self._counts))
            if old != new:
                emit(
                    "limit.counted",
                    origin=origin,
                    waiting=new.waiting,
                    waited=max(new.waited - old.waited, 0),
                    seconds=max(round(new.seconds - old.seconds, 3), 0.0),
                    refused=max(new.refused - old.refused, 0),
                )

    def _came_up(self) -> None:
        self._restarts.came_up()
        if self._starting is not None:
            self._starting.cancel()
        for attempt in self._attempts.values():
            if attempt.starved:
                attempt.starve(AFTERWARDS)
        emit("broker.started", pid=self.pid)

    async def _answer(self, attempt: _Attempt | None, question: Message) -> None:
        """Answer a call of the broker, in the name of an attempt that it serves."""
        try:
            answer = ENDED if attempt is None else await attempt.answer(question["call"], question["fields"])
        except Exception as error:
            # A question without an answer would leave its request waiting.
            _log.exception("a question of the broker failed")
            answer = failed("internal", f"not possible now ({type(error).__name__})")
        self.send({"op": "answer", "n": question["n"], **answer})


class _Attempt:
    """Implements `engine.runners.egress.BrokeredAttempt`."""

    def __init__(
        self, broker: BrokerHandle, number: int, work: Work, services: RunServices, clock: Clock
    ) -> None:
        self.number = number
        self.services = services
        self.door: socket.socket | None = None
        # Until when its failure may be for want of a broker, monotonic.
        self._starved_until = 0.0
        # The totals of brokers that have left it to another one.
        self.counted: list[dict[str, Any]] = []
        self._broker = broker
        self._work = work
        self._held = HeldToken(work.token, work.claims, clock)
        self._clock = clock
        self._known = self._stopped = self.ended = False
        self._rows: asyncio.Future[list[dict[str, Any]]] | None = None

    @property
    def starved(self) -> bool:
        return self._clock.monotonic() < self._starved_until

    def starve(self, seconds: float) -> None:
        """If it fails within these seconds, it does because no broker was up."""
        self._starved_until = self._clock.monotonic() + seconds

    def open(self, door: socket.socket) -> None:
        # Most runs never send a request: the broker hears of those that do.
        self.door = door
        asyncio.get_running_loop().add_reader(door, self._first)

    def connect(self) -> socket.socket:
        if self.ended or self._stopped:
            raise OSError("the attempt has ended")
        self._make_known()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self._broker.send({"op": "stream", "number": self.number}, theirs.fileno())
        return ours

    def stop(self) -> None:
        self._stopped = True
        if self._known:
            self._broker.send({"op": "stop", "number": self.number})

    async def end(self) -> None:
        if self.ended:
            return
        self.ended = True
        if self._known:
            self._rows = asyncio.get_running_loop().create_future()
            self._broker.send({"op": "end", "number": self.number})
            with suppress(TimeoutError):
                async with asyncio.timeout(RECORD):
                    await self._rows
        self._forget()

    def drop(self) -> None:
        if not self.ended:
            self.ended = True
            if self._known:
                self._broker.send({"op": "end", "number": self.number})
            self._forget()

    def introduction(self) -> list[Message]:
        """What the broker has to know of it. A secret is at most 16 KiB, and goes alone."""
        work = self._work
        about = {
            "op": "attempt",
            "number": self.number,
            "org": self.services.org_id,
            "lists": work.egress.lists,
            "owners": work.egress.owners,
            "api_origins": work.api_origins,
            "private_origins": work.private_origins,
            "insecure_origins": work.insecure_origins,
            "revealed": work.egress.is_open or work.egress.reveal_token,
            "tokens": [(placeholder_of(work.run_id, token_name(*of)), *of) for of in self._tokens()],
            "traced": self._broker.traced,
        }
        messages: list[Message] = [about]
        named = [(bound, bound.name) for bound in work.bound]
        named += [(bound, VARIABLE + bound.name) for bound in self._broker.bound]
        for bound, name in named:
            one = {"value": bound.value, "origin": bound.origin, "header": bound.header}
            placeholder = bound.placeholder or placeholder_of(work.run_id, name)
            messages.append({"op": "secret", "number": self.number, "placeholder": placeholder, **one})
        if self._stopped:
            messages.append({"op": "stop", "number": self.number})
        return messages

    def _tokens(self) -> Iterator[tuple[str, str]]:
        """The audience and the resource of each token for which the run may have a placeholder."""
        yield "", ""
        for audience in self._work.egress.audiences:
            yield audience, ""
            if audience.startswith(("https://", "http://")):
                yield "", audience

    async def answer(self, name: str, fields: Message) -> dict[str, Any]:
        """The answer to a call of the broker in the name of this attempt, or its `error`."""
        if self.ended:
            return ENDED
        call: Call[Any] = read(name, fields)
        if not isinstance(call, BROKER_CALLS):
            raise NotACall(f"a broker may not call {name}")
        try:
            if isinstance(call, AskToken):
                return await self._token(call)
            given: dict[str, Any] = call.answer.write(await self.services.ask(call))
            return given
        except StepError as error:
            return failed(UNKNOWN_CALL, str(error))
        except WorkerError as error:
            return failed(error.code, error.message, getattr(error, "retry_after", None))

    async def _token(self, call: AskToken) -> dict[str, Any]:
        held = self._held
        if call.audience or call.resource:
            held = HeldToken(held.token, held.claims, self._clock)
        if call.fresh or held.stale or held is not self._held:
            held.token, held.claims = await self.services.ask(call)
        seconds = max((held.token.expires_at - held.margin - self._clock.now()).total_seconds(), 0.0)
        return {"text": held.token.reveal(), "seconds": seconds}

    def trace(self, message: Message) -> None:
        """Make the span of a request."""
        request_span(
            self._work.traceparent,
            TracedRequest(
                message["method"],
                message["host"],
                message["port"],
                message["began"],
                message["ended"],
                message["status"],
                message["error"] or None,
            ),
        )

    def recorded(self, rows: list[dict[str, Any]]) -> None:
        """The totals of the attempt, at its end."""
        if total := [*self.counted, *rows]:
            self.services.egress(total)
        if self._rows is not None and not self._rows.done():
            self._rows.set_result(rows)

    def lost(self) -> None:
        """The broker has ended, and with it what it had counted."""
        if self._rows is not None and not self._rows.done():
            self.recorded([])

    def _first(self) -> None:
        """The run has passed its first stream, or all of its processes are gone."""
        if self.door is not None:
            asyncio.get_running_loop().remove_reader(self.door)
            if not self.ended and _has_data(self.door):
                self._make_known()

    def _make_known(self) -> None:
        if not self._known:
            self._known = True
            self._broker.add(self)

    def _forget(self) -> None:
        self._broker.remove(self)
        if self.door is not None:
            asyncio.get_running_loop().remove_reader(self.door)
            self.door.close()
            self.door = None


def _has_data(door: socket.socket) -> bool:
    """Whether it has something to read, and not only its end."""
    try:
        return bool(door.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:
        return False
