"""The attempt API: what a running attempt on a host asks of the workers, any of which may answer.

Each method of `CALLS` takes the host's call and its JSON, and returns JSON. What a host sends is parsed by
`wire`, masked again, and written only for runs that its incarnation owns under the named fencing tokens.
"""

from __future__ import annotations

import asyncio
import hmac
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, cast

from worker.bounded import remember
from worker.engine.attempt.answers import admitted, answer
from worker.engine.attempt.tools import row_of
from worker.engine.runners.child.messages import Message
from worker.errors import AccessDenied, LeaseLost, TokenError, TokenRefused, Unavailable
from worker.features.hosts import wire
from worker.features.hosts.delivery import HostTools, Key
from worker.features.hosts.hosted_runs import HostedRuns
from worker.features.hosts.sent import END, LINE, PROGRESS, LineRow, calls_of
from worker.features.hosts.wire import Malformed, Registered, TemporalPlace
from worker.handlers import calls
from worker.handlers.calls import NotACall, OneWayCall, StoreStep
from worker.handlers.catalogue import HandlerEntry
from worker.handlers.json_text import clean
from worker.ids import WorkerId
from worker.model.runs.hosts import SLOTS, HostCaller, TooManyHandlers
from worker.model.runs.run import AdmittedRun, LogLine, OwnedRun
from worker.store.worker_store import WorkerStore
from worker.telemetry.events import emit
from worker.telemetry.mask_in_turn import mask_each

# Seconds that a token is remembered, also for renewals: their statement checks the incarnation.
CALLER_AGE = 5.0
RENEWAL_AGE = 60.0
MAX_CALLERS = 10_000
# Seconds without a call after which an incarnation is no longer remembered here.
IDLE = 600.0
NOT_A_HOST = "hosts need a token of `python -m worker hosts add` that was not removed"


@dataclass(eq=False, repr=False)
class AttemptApi:
    """Answers hosts, for one incarnation of a worker. Durations are in seconds.

    `lease` and `renew_every` are those of hosts, `poll` the time between two looks for waiting runs.
    `temporal` says where hosts of the pools in `placed` are given runs: they come with tickets.
    """

    shared: HostTools
    rows: WorkerStore
    lease: float
    renew_every: float
    poll: float
    # Where hosts of these pools get their tickets.
    temporal: Mapping[str, TemporalPlace] = field(default_factory=dict)
    _incarnations: dict[WorkerId, HostedRuns] = field(default_factory=dict)
    _callers: OrderedDict[tuple[str, str | None], tuple[float, HostCaller]] = field(
        default_factory=OrderedDict
    )
    _tokens: OrderedDict[str, None] = field(default_factory=OrderedDict)
    _closing: set[asyncio.Task[None]] = field(default_factory=set)

    def wake(self) -> None:
        """Look for waiting runs now, for all hosts that wait."""
        self.shared.sharing.wake()
        for runs in self._incarnations.values():
            runs.delivery.changed.set()

    async def close(self) -> None:
        """Write the ends that hosts have reported, and let the runs wait again that they never got."""
        for runs in list(self._incarnations.values()):
            with suppress(Unavailable):  # the hosts hand them back
                await runs.hand_back_undelivered()
            await runs.close()
        self._incarnations.clear()

    def knows(self, token_sha256: str) -> bool:
        """Whether this was the token of a host a moment ago."""
        return token_sha256 in self._tokens

    async def caller(self, token_sha256: str, incarnation: str | None, name: str) -> HostCaller:
        """The host that makes a call.

        Raises:
            TokenError: it has no token, or not one of a host.
            AccessDenied: the incarnation is another host's, or has ended.
        """
        if incarnation is not None and not wire.ID.fullmatch(incarnation):
            incarnation = None
        key, now = (token_sha256, incarnation), self.shared.tools.clock.monotonic()
        read_at, caller = self._callers.get(key, (float("-inf"), None))
        if caller is None or now - read_at > (RENEWAL_AGE if name == "renew" else CALLER_AGE):
            self._callers.pop(key, None)
            caller = await self.shared.store.find(token_sha256, incarnation)
            if caller is None or not hmac.compare_digest(caller.token_sha256, token_sha256):
                self._tokens.pop(token_sha256, None)
                raise TokenError("this is not the token of a host", fix=NOT_A_HOST)
            remember(self._callers, key, (now, caller), MAX_CALLERS)
            remember(self._tokens, token_sha256, None, MAX_CALLERS)
        if name == "register":
            return caller
        if caller.worker is None:
            raise AccessDenied(
                "the incarnation is not one of this host's", fix="send the id that register answered"
            )
        if caller.moved or (caller.ended and name in ("take", "handlers")):
            raise AccessDenied(
                "this incarnation has ended, or its host is in another pool now", fix="register again"
            )
        return caller

    async def call(
        self, caller: HostCaller, name: str, message: Mapping[str, Any], gone: Callable[[], bool]
    ) -> Message | bytes:
        """The answer to one call, as an object or as JSON.

        Raises:
            Malformed: there is no such call, or it is not valid.
            LeaseLost: the run is not, or no longer, this host's.
            StepError, TokenError, Unavailable: as for a run of the worker itself.
        """
        if name == "register":
            return await self._register(caller, message)
        if name not in CALLS and name != "take":
            raise Malformed(f"{wire.NO_CALL} {clean(name, 50)}")
        if caller.ended and caller.worker is not None:
            return await self._after_the_end(caller.worker, name, message)
        runs = self._runs(caller)
        if name == "take":
            return await self._take(runs, message, gone)
        return await CALLS[name](self, runs, message)

    async def _after_the_end(self, worker: WorkerId, name: str, message: Mapping[str, Any]) -> Message:
        """The answer to a call of an ended incarnation, whose runs are no longer its own."""
        if (runs := self._incarnations.get(worker)) is not None:
            self._drop(runs)
        match name:
            case "renew":
                return wire.renewed_message(registered=False, owned=())
            case "finish":
                fences = dict(end.key for end in wire.rows_of(message, "ends", END))
                known = {run_id: fence for run_id, fence in fences.items() if wire.ID.fullmatch(run_id)}
                written = await self.shared.store.ended(worker, known)
                return {"accepted": sorted(run_id for run_id, _ in written)}
            case _ if name in calls.CALLS and calls.CALLS[name].way.batch:
                return {"stored": []}
            case "hand_back":
                return {"runs": []}
            case "unregister":
                # Its lease may have expired while no worker answered.
                await self.shared.store.unregister(worker)
                return {}
            case "logs" | "progress":
                return {}
        raise LeaseLost("this incarnation has ended")

    def _runs(self, caller: HostCaller) -> HostedRuns:
        worker = caller.worker
        if worker is None:
            raise AccessDenied("the incarnation is not one of this host's")
        now = self.shared.tools.clock.monotonic()
        runs = self._incarnations.get(worker)
        if runs is None:
            for gone in [one for one in self._incarnations.values() if now - one.seen_at > IDLE]:
                self._drop(gone)
            runs = self._incarnations[worker] = HostedRuns(caller, worker, self.shared)
        runs.seen_at = now
        return runs

    def _drop(self, runs: HostedRuns) -> None:
        if self._incarnations.get(runs.worker) is not runs:
            return  # another call was answered at the same time
        del self._incarnations[runs.worker]
        closing = asyncio.create_task(runs.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    # incarnations

    async def _register(self, caller: HostCaller, message: Mapping[str, Any]) -> Message:
        with wire.reading("registration"):
            given = wire.REGISTRATION.read(message)
        capacity = {name: given.slots[isolation] for isolation, name in SLOTS.items()}
        store = self.shared.store
        worker = await store.begin(
            caller, capacity=capacity, host=given.host, pid=given.pid, version=given.version
        )
        if given.handlers:
            await self._offer(worker, given.handlers)
        emit("host.registered", host=caller.name, pool=caller.pool, worker=worker, version=given.version)
        return wire.REGISTERED.write(
            Registered(
                worker,
                caller.pool,
                self.lease,
                self.renew_every,
                self.poll,
                self.temporal.get(caller.pool),
            )
        )

    async def _handlers(self, runs: HostedRuns, message: Mapping[str, Any]) -> Message:
        entries = wire.entries_of(message)
        if entries:
            await self._offer(runs.worker, entries)
            runs.delivery.handlers_changed()
        return {}

    async def _offer(self, worker: WorkerId, entries: Sequence[HandlerEntry]) -> None:
        try:
            await self.shared.store.offer(worker, entries)
        except TooManyHandlers as error:
            raise Malformed(str(error), fix="declare fewer handlers on this host, or add a host") from None

    async def _renew(self, runs: HostedRuns, message: Mapping[str, Any]) -> bytes:
        registered, answer = await runs.renew_as_json()
        if not registered:
            self._drop(runs)
        return answer

    async def _unregister(self, runs: HostedRuns, message: Mapping[str, Any]) -> Message:
        await runs.hand_back_undelivered()
        await self.shared.store.unregister(runs.worker)
        self._drop(runs)
        return {}

    async def _hand_back(self, runs: HostedRuns, message: Mapping[str, Any]) -> Message:
        owned = [OwnedRun(*fence.key, None) for fence in wire.rows_of(message, "runs", wire.FENCE)]
        return {"runs": sorted(await runs.hand_back(owned))}

    # attempts

    async def _take(self, runs: HostedRuns, message: Mapping[str, Any], gone: Callable[[], bool]) -> bytes:
        free, wait = wire.take_of(message)
        if (ticket := wire.ticket_of(message)) is not None:
            taken, again = await runs.delivery.take_by(ticket, wait, gone=gone)
            attempts = b",".join(ready.encoded for ready in taken)
            return b'{"attempts":[%s],"again":%s}' % (attempts, b"true" if again else b"false")
        if runs.pool in self.temporal:
            raise Malformed(
                f"the runs of pool {runs.pool} come with tickets of Temporal",
                fix="restart the host: the placer of its pool has changed",
            )
        taken = await runs.delivery.take(free, wait, gone=gone)
        if taken and gone():
            runs.delivery.put_back(taken)
            taken = []
        return b'{"attempts":[%s]}' % b",".join(ready.encoded for ready in taken)

    async def _finish(self, runs: HostedRuns, message: Mapping[str, Any]) -> Message:
        return {"accepted": sorted(await runs.finish(wire.rows_of(message, "ends", END)))}

    # running attempts

    async def _declared(self, runs: HostedRuns, message: Mapping[str, Any], *, name: str) -> Message:
        """The answer to a call that a running handler makes."""
        [sent] = calls_of(name, message)
        hosted = await runs.one(sent.key)
        if sent.call.way.with_handler:
            await runs.check_handler(hosted, sent.handler)
        try:
            return sent.call.answer.write(await answer(sent.call, hosted.running))
        except NotACall as error:
            raise Malformed(str(error)) from None
        except TokenRefused as refused:
            return {"refused": {"reason": refused.reason, "detail": refused.detail}}

    async def _batch(self, runs: HostedRuns, message: Mapping[str, Any], *, name: str) -> Message:
        """The same for calls that come at once. The answer names the runs that are still the host's."""
        rows = []
        sent = calls_of(name, message)
        known = await runs.known(one.key for one in sent)
        for one in sent:
            if (hosted := known.get(one.key)) is None:
                continue
            await runs.check_handler(hosted, one.handler)
            # One run that is lost must not keep what others have stored.
            with suppress(LeaseLost):
                step = await admitted(cast(StoreStep, one.call), hosted.running)
                rows.append(row_of(step, hosted.running))
        return {"stored": sorted(await self.rows.store_steps(rows)) if rows else []}

    async def _notices(self, runs: HostedRuns, message: Mapping[str, Any], *, name: str) -> Message:
        """The same for calls without an answer, which come at once too."""
        sent = calls_of(name, message)
        known = await runs.known(one.key for one in sent)
        for one in sent:
            if (hosted := known.get(one.key)) is not None:
                with suppress(LeaseLost):
                    hosted.running.tell(cast(OneWayCall, one.call))
        # Until they are masked, the host must not end the runs.
        for hosted in known.values():
            await hosted.inflight.stored()
        return {"stored": sorted(known)}

    async def _logs(self, runs: HostedRuns, message: Mapping[str, Any]) -> Message:
        rows = wire.rows_of(message, "lines", LINE)
        known = await runs.known(row.key for row in rows)
        of_run: dict[Key, list[LineRow]] = {}
        for row in rows:
            of_run.setdefault(row.key, []).append(row)
        now = self.shared.tools.clock.now()
        async with runs.logging:
            ours = [
                (row, hosted.run)
                for key, hosted in known.items()
                for row in await hosted.log.accept(hosted.run, of_run[key], self.rows, now)
            ]
            texts = await mask_each([(row.text, run.org_id) for row, run in ours])
            lines = [_line(run, row, text, now) for (row, run), text in zip(ours, texts, strict=True)]
            if lines:
                await self.rows.append_logs(lines)
        return {}

    async def _progress(self, runs: HostedRuns, message: Mapping[str, Any]) -> Message:
        rows = wire.rows_of(message, "rows", PROGRESS)
        known = await runs.known(row.key for row in rows)
        for row in rows:
            if (hosted := known.get(row.key)) is not None:
                # As often as that of a local run: the last one twice a second, which is masked then.
                self.shared.tools.run_log.progress(hosted.run, row.progress)
        return {}


def _line(run: AdmittedRun, row: LineRow, text: str, now: datetime) -> LogLine:
    return LogLine(
        run_id=run.id,
        attempt=run.attempt,
        seq=row.seq,
        org_id=run.org_id,
        at=min(row.at, now),
        level=row.level,
        source=row.source,
        text=text,
    )


def _method_of(call: type[calls.Call[Any]]) -> Callable[..., Awaitable[Message]]:
    if issubclass(call, OneWayCall):
        return AttemptApi._notices
    return AttemptApi._batch if call.way.batch else AttemptApi._declared


Method = Callable[[AttemptApi, HostedRuns, Mapping[str, Any]], Awaitable[Message | bytes]]
# All calls but register and take, which are special.
CALLS: Mapping[str, Method] = {
    name: getattr(AttemptApi, f"_{name}")
    for name in ("handlers", "renew", "unregister", "hand_back", "finish", "logs", "progress")
} | {name: partial(_method_of(call), name=name) for name, call in calls.CALLS.items()}
