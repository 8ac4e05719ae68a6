"""Remote store: what `WorkerStore` is to a worker's loops, for those of a host, over the attempt API."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar

from worker.engine.attempt.answers import Running
from worker.engine.attempt.inflight import InflightRuns, trace_step
from worker.engine.loops.step_writer import StepWriter
from worker.errors import Busy, LeaseLost, TokenRefused
from worker.features.hosts import wire
from worker.features.hosts.control import AsyncControl, BlockingControl, ControlDenied, encode
from worker.features.hosts.sent import END, LINE, PROGRESS, End, LineRow, ProgressRow, Sent, sent_message
from worker.features.hosts.wire import FENCE, Fence, Malformed, Registered, Registration, Taken
from worker.handlers.calls import A, Call, TraceStep, answer_in
from worker.handlers.catalogue import HandlerEntry
from worker.handlers.steps import StepError
from worker.ids import RunId
from worker.model.runs.outcome import SUCCEEDED, EndedAttempt, Error, Failed, Outcome
from worker.model.runs.run import AdmittedRun, Isolation, LogLine, OwnedRun

# The share of the bytes that a call may have which its rows take.
PART = 0.75
# Seconds that a call may take beyond the wait of a take.
ANSWER_SECONDS = 10.0
# Seconds that a worker may take to prepare the attempt of a ticket before it is asked again.
TICKET_WAIT = 10.0
# Maximum seconds until handlers are offered again to a worker that asked for them later.
LATER = 5.0


# Not frozen, as `EndedAttempt`.
@dataclass(slots=True)
class HostedEnd(EndedAttempt):
    """How an attempt ended on this host. Its worker decides what becomes of the run.

    `sealed` is what that worker wrote down when the attempt began; `moved` as in `InflightRun`.
    """

    returned: Outcome = SUCCEEDED
    sealed: str = field(default="", repr=False)
    moved: bool = False


@dataclass(eq=False, repr=False)
class RemoteStore:
    """One incarnation of this host, as its workers know it.

    The async methods are for the loop; `renew` is for the heartbeat's thread. A call that no worker answers
    raises Unavailable. Once a worker denies the incarnation, no run is this host's any more.
    """

    control: AsyncControl
    heartbeat: BlockingControl
    inflight_runs: InflightRuns
    now: Callable[[], datetime]
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    # the incarnation

    async def register(self, registration: Registration) -> Registered:
        """Start an incarnation. Raises ControlDenied if the token is not accepted."""
        message = wire.REGISTRATION.write(registration)
        return wire.REGISTERED.read(await self.control.call("register", message, repeat=False))

    async def put(self, entries: Sequence[HandlerEntry]) -> None:
        """Offer these handlers too, or report why they do not load."""
        for part in _parts("handlers", "entries", map(wire.ENTRY.write, entries)):
            while True:
                try:
                    await self.control.call("handlers", part)
                    break
                except Busy as busy:
                    # Its worker still reads its own. Reading all of ours again would cost more.
                    await self.sleep(min(busy.retry_after or LATER, LATER))

    async def offer(self, names: Sequence[str]) -> None:
        """Nothing: the workers know what was put."""

    async def complete(self, known: Mapping[str, Collection[str]]) -> None:
        """Every handler that is installed here was put."""
        await self.control.call("handlers", {"entries": [], "complete": True})

    async def unregister(self) -> None:
        """End the incarnation."""
        await self.control.call("unregister", {})

    def renew(self) -> tuple[bool, list[OwnedRun]]:
        """Extend the lease; whether it was still ours, and the runs that this incarnation owns."""
        try:
            return wire.renewed_of(self.heartbeat.call("renew", {}))
        except ControlDenied:
            # The host was removed, or got another pool: nothing that this incarnation writes counts.
            return False, []

    async def hand_back_rest(self) -> None:
        """After a drain, let those runs wait again whose admission was not answered in time."""
        _, owned = wire.renewed_of(await self.control.call("renew", {}))
        unknown = [run for run in owned if self.inflight_runs.get(run.id) is None]
        if unknown:
            await self.hand_back(unknown)

    async def hand_back(self, owned: Sequence[OwnedRun]) -> set[RunId]:
        """Let runs wait again that this incarnation owns but does not know."""
        rows = [FENCE.write(Fence(run.id, run.fencing_token)) for run in owned]
        answers = [await self.control.call("hand_back", part) for part in _parts("hand_back", "runs", rows)]
        return {RunId(run_id) for answer in answers for run_id in answer["runs"]}

    # attempts

    async def take(self, free: Mapping[Isolation, int], wait: float) -> list[Taken]:
        """Runs for these slots, as soon as there are any, at most after `wait` seconds."""
        message = {"free": dict(free), "wait": wait}
        answer = await self.control.call("take", message, seconds=wait + ANSWER_SECONDS, repeat=False)
        return self._ours(answer)

    async def take_by(self, ticket: str) -> list[Taken]:
        """The run of a ticket; nothing if the ticket is not valid, or the attempt has ended already."""
        while True:
            message = {"ticket": ticket, "wait": TICKET_WAIT}
            answer = await self.control.call(
                "take", message, seconds=TICKET_WAIT + ANSWER_SECONDS, repeat=False
            )
            if not answer.get("again"):
                return self._ours(answer)

    def _ours(self, answer: Mapping[str, Any]) -> list[Taken]:
        """The attempts of an answer, without those that came so late that they were handed back."""
        attempts = map(wire.taken_of, answer["attempts"])
        return [taken for taken in attempts if not self.inflight_runs.is_late(taken.run)]

    async def finish(self, ended: Sequence[EndedAttempt]) -> set[RunId]:
        """Report how attempts ended; the runs whose end was accepted."""
        accepted: set[RunId] = set()
        for part in _parts("finish", "ends", (END.write(self._end_of(end)) for end in ended)):
            answer = await self._fenced("finish", part)
            if answer is None:
                break
            accepted.update(RunId(run_id) for run_id in answer["accepted"])
        return accepted

    def _end_of(self, ended: EndedAttempt) -> End:
        if not isinstance(ended, HostedEnd):
            raise TypeError(f"the end of run {ended.run_id} is not that of a host")
        outcome = ended.returned
        if ended.reason == "result_unstorable":
            error = ended.error or {"type": "ResultUnstorable", "message": ""}
            outcome = Failed(Error(error["type"], error["message"]), "result_unstorable", ended.detail)
        trail, began = ended.trail, ended.trail.handler_started_at
        return End(
            run=ended.run_id,
            fencing_token=ended.fencing_token,
            outcome=outcome,
            sealed=ended.sealed,
            handler_seconds=None if began is None else (self.now() - began).total_seconds(),
            peak_memory=trail.peak_memory,
            progress=trail.progress,
            moved=ended.moved,
            asks=trail.asks,
            egress=trail.egress,
        )

    # what running handlers ask for, and tell

    async def ask(self, sent: Sent) -> dict[str, Any]:
        """The answer to a call of a run that this host holds. Raises as `_call`."""
        return await self._call(sent.call.path, sent_message(sent))

    async def store_steps(self, rows: Sequence[SentRow]) -> set[tuple[RunId, int]]:
        """Send calls that travel together; the runs, with fencing tokens, that are still ours."""
        ours: set[tuple[RunId, int]] = set()
        for way in dict.fromkeys(row.sent.call.way for row in rows):
            of_way = (sent_message(row.sent) for row in rows if row.sent.call.way == way)
            for part in _parts(way.name, way.batch, of_way):
                answer = await self._fenced(way.name, part)
                if answer is None:
                    return ours
                ours.update((RunId(run_id), fencing_token) for run_id, fencing_token in answer["stored"])
        return ours

    async def write_progress(self, rows: Sequence[tuple[RunId, int, Mapping[str, Any]]]) -> None:
        for part in _parts("progress", "rows", (PROGRESS.write(ProgressRow(*row)) for row in rows)):
            await self._fenced("progress", part)

    async def append_logs(self, rows: Sequence[LogLine]) -> None:
        """Append lines to the logs of runs that this host holds."""
        for part in _parts("logs", "lines", self._lines(rows)):
            await self._fenced("logs", part)

    def _lines(self, rows: Sequence[LogLine]) -> Iterator[dict[str, Any]]:
        for line in rows:
            inflight = self.inflight_runs.get(line.run_id)
            if inflight is not None and inflight.run.attempt == line.attempt:
                said = line.seq, line.at, line.level, line.source, line.text
                yield LINE.write(LineRow(line.run_id, inflight.run.fencing_token, *said))

    async def _fenced(self, name: str, message: bytes) -> dict[str, Any] | None:
        """The answer, or None if the run, or none at all, is ours any more."""
        try:
            return await self._call(name, message)
        except LeaseLost:
            return None

    async def _call(self, name: str, message: Mapping[str, Any] | bytes) -> dict[str, Any]:
        """The answer of a worker.

        Raises:
            LeaseLost: the run, or none at all, is ours any more.
            StepError: the worker does not know the call.
        """
        try:
            return await self.control.call(name, message)
        except ControlDenied as denied:
            raise LeaseLost(denied.message) from None
        except Malformed as error:
            if not error.message.startswith(wire.NO_CALL):
                raise
            raise StepError(
                f"the worker does not know the call {name}; upgrade the workers before handlers that use it"
            ) from None


@dataclass(frozen=True, slots=True)
class SentRow:
    """A call that waits for others to be sent with; `size` are the bytes of its texts."""

    run: AdmittedRun
    sent: Sent
    size: int

    @property
    def what(self) -> str:
        """What the call stores, for people."""
        call = self.sent.call
        return next((f"{what} {name}" for what, name in call.row.names(call)), call.way.name)


@dataclass(frozen=True, slots=True)
class RemoteActs:
    """Lets the workers do what the handlers on this host ask; `rows` sends together what may be."""

    store: RemoteStore
    rows: StepWriter
    # The worker does, with the end of the attempt: it has the alerts.
    reports_denials: ClassVar[bool] = False

    async def act(self, call: Call[A], of: Running) -> A:
        """As `Acts.act`. Raises StepError as well, if the worker does not know the call."""
        run = of.run
        if isinstance(call, TraceStep) and of.inflight.traced_here:
            trace_step(call.span, of.inflight)
            return None  # type: ignore[return-value]
        sent = Sent(run.id, run.fencing_token, of.trail.handler, call)
        if call.way.batch:
            size = sum(len(text.encode()) for text in call.row.texts(call))
            if not await self.rows.store_step(SentRow(run, sent, size)):
                raise LeaseLost(f"run {run.id} is no longer ours")
            return None  # type: ignore[return-value]
        answer = await self.store.ask(sent)
        if (refused := answer.get("refused")) is not None:
            raise TokenRefused(refused["reason"], refused["detail"])
        return answer_in(call, answer)


def _parts(call: str, name: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    """The bodies of calls with these rows, none larger than the API takes."""
    part: list[bytes] = []
    size, most = 0, PART * wire.BODY_BYTES[call]
    for row in rows:
        encoded = encode(row)
        if part and (size + len(encoded) > most or len(part) == wire.MAX_ROWS):
            yield _body(name, part)
            part, size = [], 0
        part.append(encoded)
        size += len(encoded) + 1
    if part:
        yield _body(name, part)


def _body(name: str, rows: Sequence[bytes]) -> bytes:
    return b'{"%s":[%s]}' % (name.encode(), b",".join(rows))
