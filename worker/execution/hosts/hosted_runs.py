"""Hosted runs: what a worker does for one incarnation of a host, from admission to the written end.

The database has all that counts, so any worker can go on where this one stops: a run that is not known here
is read from there. What another worker had admitted but not delivered is handed back by the host.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Protocol

from worker.bounded import remember
from worker.clock import from_text, to_text
from worker.errors import (
    Busy,
    ConfigurationError,
    DefinitionError,
    LeaseLost,
    NotFound,
    StoreUnavailable,
    TokenRefused,
    Unavailable,
    WorkerError,
)
from worker.execution.attempts import events
from worker.execution.attempts.attempt import (
    Prepared,
    conclude,
    limits_of,
    outcome_of_error,
    prepare,
    without_state,
)
from worker.execution.attempts.handler_registry import HandlerRegistry
from worker.execution.attempts.inflight import InflightRun
from worker.execution.attempts.run_services import Tools
from worker.execution.hosts import wire
from worker.execution.hosts.wire import End, Malformed, Taken
from worker.execution.loops.finisher import Finisher
from worker.execution.runners.contract import StopSignal
from worker.handlers.catalogue import HandlerEntry
from worker.ids import RunId, WorkerId
from worker.runs import outcome as outcomes
from worker.runs.hosts import HostCaller
from worker.runs.outcome import EndedAttempt, Trail
from worker.runs.placing import Ticket
from worker.runs.run import AdmittedRun, Isolation, OwnedRun
from worker.telemetry.events import emit
from worker.telemetry.masking import masker

# Seconds for which the handlers of an incarnation are remembered.
HANDLERS_AGE = 5.0
# Seconds that a call waits until its ends are written, and that a run unknown here waits for its token.
WRITTEN_WITHIN = 5.0
TOKEN_WITHIN = 2.0
# Ends that are remembered: a host repeats those whose answer was lost.
MOST_ENDS = 10_000
# Maximum attempts that one take returns, and roughly their maximum bytes.
MOST_TAKEN = 500
TAKEN_BYTES = 8 * 1024 * 1024

# Seconds between two looks whether a host still waits for the run of a ticket, and after which it does not.
TICKET_LOOK = 1.0
TICKET_AGE = 15.0

Key = tuple[RunId, int]


class HostedStore(Protocol):
    """The database, for the incarnations of hosts; `store/host_store.py` says what each method does."""

    async def find(self, token_sha256: str, incarnation: str | None) -> HostCaller | None: ...
    async def begin(
        self, caller: HostCaller, *, capacity: Mapping[str, int], host: str, pid: int, version: str
    ) -> WorkerId: ...
    async def renew(self, worker: WorkerId) -> tuple[bool, list[OwnedRun]]: ...
    async def unregister(self, worker: WorkerId) -> None: ...
    async def offer(self, worker: WorkerId, entries: Sequence[HandlerEntry]) -> None: ...
    async def offered(self, worker: WorkerId) -> list[HandlerEntry]: ...
    async def owned(self, worker: WorkerId, fences: Mapping[RunId, int]) -> list[AdmittedRun]: ...
    async def ended(self, worker: WorkerId, fences: Mapping[RunId, int]) -> set[Key]: ...
    async def admit(
        self,
        worker: WorkerId,
        pool: str,
        offered: Mapping[str, int | None],
        free: Mapping[Isolation, int],
    ) -> list[AdmittedRun]: ...
    async def take_ticket(self, worker: WorkerId, ticket: Ticket) -> AdmittedRun | None: ...
    async def finish(self, worker: WorkerId, ended: Sequence[EndedAttempt]) -> set[RunId]: ...
    async def hand_back(self, worker: WorkerId, owned: Sequence[OwnedRun]) -> set[RunId]: ...
    def forget(self, worker: WorkerId) -> None: ...


class Sealer(Protocol):
    """Seals text for one place under the key ring, as text; None if it does not open."""

    def seal(self, text: str, place: Sequence[object]) -> str: ...
    def open(self, sealed: str, place: Sequence[object]) -> str | None: ...


@dataclass(slots=True, eq=False)
class HostedRun:
    """A run that a host holds, as this worker knows it.

    `handler` is None if another worker prepared the attempt. `refused` is the error of a renewed token.
    `sizes` are the bytes of the results of its steps by place, beside `stored` bytes of earlier ones.
    """

    inflight: InflightRun
    handler: str | None = None
    refused: TokenRefused | None = None
    stored: int | None = None
    sizes: dict[int, int] = field(default_factory=dict)

    @property
    def run(self) -> AdmittedRun:
        return self.inflight.run


@dataclass(slots=True)
class _Ticket:
    """The ticket of a run that is not delivered yet, and when the host last asked for it."""

    sha256: str
    asked_at: float


@dataclass(frozen=True, slots=True)
class _Ends:
    """The `FinishStore` of one incarnation."""

    store: HostedStore
    worker: WorkerId

    async def finish(self, ended: Sequence[EndedAttempt]) -> set[RunId]:
        return await self.store.finish(self.worker, ended)


@dataclass(frozen=True, slots=True)
class HostTools:
    """What all incarnations share. `on_end` is called with each accepted end."""

    tools: Tools
    store: HostedStore
    sealer: Sealer
    on_end: Callable[[EndedAttempt, InflightRun | None], None]


class HostedRuns:
    """The runs of one incarnation of a host."""

    def __init__(self, caller: HostCaller, worker: WorkerId, shared: HostTools) -> None:
        self.pool = caller.pool
        self.worker = worker
        self.seen_at = shared.tools.clock.monotonic()
        self._shared = shared
        self._store = shared.store
        self._clock = shared.tools.clock
        self._known: dict[Key, HostedRun] = {}
        # Admitted and not delivered yet; those of them that are ready, as JSON.
        self._undelivered: dict[Key, InflightRun] = {}
        self._ready: dict[Key, bytes] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._admitting = asyncio.Lock()
        self._tools: Tools = shared.tools
        self._handlers_until = float("-inf")
        self._writing: dict[Key, asyncio.Future[bool]] = {}
        self._ended: OrderedDict[Key, bool] = OrderedDict()
        # Set when a take should look again.
        self.changed = asyncio.Event()
        # The runs that each open take has admitted, and the tickets of those that came with one.
        self._takes: list[set[Key]] = []
        self._tickets: dict[Key, _Ticket] = {}
        ends = _Ends(self._store, worker)
        self._finisher = Finisher(ends, self._clock, self._written, self._unstorable)
        self._writer = asyncio.create_task(self._finisher.run(), name="hosted ends")

    async def close(self) -> None:
        """Write what has ended, and drop all others: the host hands back what it never got."""
        for task in self._tasks:
            task.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(WRITTEN_WITHIN):
                await self._finisher.flushed()
        self._writer.cancel()
        await asyncio.gather(self._writer, *self._tasks, return_exceptions=True)
        for inflight in (*self._undelivered.values(), *(hosted.inflight for hosted in self._known.values())):
            inflight.drop_tokens()
        self._store.forget(self.worker)

    # admission

    async def take(
        self, free: Mapping[Isolation, int], wait: float, *, poll: float, gone: Callable[[], bool]
    ) -> list[tuple[Key, bytes]]:
        """Attempts for these slots as JSON, as soon as one is ready, at most after `wait` seconds.

        `gone` says that the host no longer waits. Several takes may be open, each for slots of its own.
        """
        mine: set[Key] = set()
        self._takes.append(mine)
        deadline = self._clock.monotonic() + wait
        try:
            while not gone():
                self.changed.clear()
                if not self._deliverable(mine):
                    mine |= await self._admit(free, mine)
                if (taken := self._deliverable(mine)) and not gone():
                    return self._deliver(taken)
                left = deadline - self._clock.monotonic()
                if left <= 0:
                    break
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(left, poll)):
                        await self.changed.wait()
            return []
        finally:
            # What it has admitted goes to the next take.
            self._takes.remove(mine)

    async def take_by(
        self, ticket: Ticket, wait: float, *, gone: Callable[[], bool]
    ) -> tuple[list[tuple[Key, bytes]], bool]:
        """The attempt of a ticket as JSON, if it is valid, and whether to ask again because it is not ready.

        Empty also if the attempt has ended without its handler.
        """
        key = ticket.run_id, ticket.fencing_token
        known = self._tickets.get(key)
        if known is None:
            tools = await self.tools()
            if not tools.pool_rules.usable([self.pool]):
                raise Busy(f"this worker has other rules of pool {self.pool} than the stored ones")
            run = await self._store.take_ticket(self.worker, ticket)
            if run is None:
                return [], False
            known = self._tickets[key] = _Ticket(ticket.sha256, self._clock.monotonic())
            self._undelivered[key] = InflightRun(run, StopSignal())
            with suppress(Unavailable):  # the attempt reads for itself what is missing
                await tools.prepare([run])
            self.start(run, tools)
        elif known.sha256 != ticket.sha256:
            return [], False
        known.asked_at = self._clock.monotonic()
        deadline = known.asked_at + wait
        while key in self._undelivered and key not in self._ready:
            known.asked_at = self._clock.monotonic()
            left = deadline - known.asked_at
            if left <= 0 or gone():
                return [], True
            self.changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, TICKET_LOOK)):
                    await self.changed.wait()
        if key not in self._ready:
            return [], False
        if gone():
            return [], True
        del self._tickets[key]
        return self._deliver([key]), False

    async def _hand_back_unasked(self) -> None:
        """Let runs wait again that came with a ticket, and that the host no longer asks for."""
        before = self._clock.monotonic() - TICKET_AGE
        unasked = [key for key, ticket in self._tickets.items() if ticket.asked_at < before]
        if unasked:
            with suppress(Unavailable):  # the next renewal tries again
                await self.hand_back([OwnedRun(*key, None) for key in unasked])
                for key in unasked:
                    self._tickets.pop(key, None)

    def _deliverable(self, mine: set[Key]) -> list[Key]:
        """What is ready and was admitted for this take, or for one that has ended."""
        others = set[Key]().union(*(take for take in self._takes if take is not mine))
        return [key for key in self._ready if key not in others and key not in self._tickets]

    def _deliver(self, keys: Sequence[Key]) -> list[tuple[Key, bytes]]:
        taken: list[tuple[Key, bytes]] = []
        size = 0
        for key in keys:
            encoded = self._ready[key]
            if taken and (size + len(encoded) > TAKEN_BYTES or len(taken) >= MOST_TAKEN):
                break
            del self._ready[key]
            del self._undelivered[key]
            self._tickets.pop(key, None)
            taken.append((key, encoded))
            size += len(encoded)
        return taken

    def put_back(self, taken: Sequence[tuple[Key, bytes]]) -> None:
        """Deliver these with the next take: the host has not got them."""
        for key, encoded in taken:
            if (hosted := self._known.get(key)) is not None:
                self._undelivered[key] = hosted.inflight
                self._ready[key] = encoded
        self.changed.set()

    async def _admit(self, free: Mapping[Isolation, int], mine: set[Key]) -> set[Key]:
        async with self._admitting:
            others = set[Key]().union(*(take for take in self._takes if take is not mine), self._tickets)
            coming = Counter(
                inflight.run.isolation for key, inflight in self._undelivered.items() if key not in others
            )
            left = {isolation: max(0, slots - coming[isolation]) for isolation, slots in free.items()}
            tools = await self.tools()
            # While the rules of its pool differ from the stored ones, this worker takes no run of it.
            if not any(left.values()) or not tools.pool_rules.usable([self.pool]):
                return set()
            offered = tools.handlers.limits()
            if not offered:
                return set()
            runs = await self._store.admit(self.worker, self.pool, offered, left)
            if not runs:
                return set()
            for run in runs:
                self._undelivered[run.id, run.fencing_token] = InflightRun(run, StopSignal())
            with suppress(Unavailable):  # each attempt reads for itself what is missing
                await tools.prepare(runs)
            for run in runs:
                self.start(run, tools)
        # Mostly their tokens are in the cache, and all are ready after one turn.
        await asyncio.sleep(0)
        return {(run.id, run.fencing_token) for run in runs}

    def start(self, run: AdmittedRun, tools: Tools) -> None:
        """Prepare an attempt that this incarnation owns, to be delivered."""
        key = run.id, run.fencing_token
        inflight = self._undelivered.setdefault(key, InflightRun(run, StopSignal()))
        task = asyncio.create_task(self._prepare(key, inflight, tools))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _prepare(self, key: Key, inflight: InflightRun, tools: Tools) -> None:
        run, trail = inflight.run, Trail(inflight.run.handler)
        try:
            prepared = await prepare(inflight, trail, tools)
        except Exception as error:
            prepared = outcome_of_error(error, inflight, tools.random)
        if key not in self._undelivered:
            inflight.drop_tokens()
        elif isinstance(prepared, Prepared):
            taken = self._taken(run, inflight, prepared, trail)
            self._known[key] = HostedRun(inflight, trail.handler)
            self._ready[key] = json.dumps(wire.taken_message(taken), separators=(",", ":")).encode()
        else:
            ended = await conclude(inflight, prepared, trail, tools)
            self._write(key, ended)
        self.changed.set()

    def _taken(self, run: AdmittedRun, inflight: InflightRun, prepared: Prepared, trail: Trail) -> Taken:
        plan = inflight.plan
        if plan is None:
            raise LeaseLost(f"run {run.id} was not prepared")
        kept = {name: getattr(trail, name) for name in _SEALED}
        if trail.token_ready_at is not None:
            kept["token_ready_at"] = to_text(trail.token_ready_at)
        text = json.dumps(kept | {"commits": prepared.commits}, separators=(",", ":"))
        return Taken(
            run=run,
            org=plan.org.code,
            definition=plan.definition.name,
            cancel_grace=prepared.limits.cancel_grace,
            timeout=prepared.limits.timeout,
            work=prepared.work,
            sealed=self._shared.sealer.seal(text, self._place((run.id, run.fencing_token))),
        )

    def _place(self, key: Key) -> list[object]:
        return [*key, self.worker]

    async def tools(self) -> Tools:
        """What attempts of this incarnation use: the handlers are those that the host offers."""
        now = self._clock.monotonic()
        if now >= self._handlers_until:
            entries = await self._store.offered(self.worker)
            # The host has already left out what its operator does not allow.
            registry = HandlerRegistry(frozenset(entry.distribution for entry in entries))
            for entry in entries:
                registry.add(entry)
            self._tools = replace(self._shared.tools, handlers=registry)
            self._handlers_until = now + HANDLERS_AGE
        return self._tools

    def handlers_changed(self) -> None:
        """Read the handlers again before the next admission."""
        self._handlers_until = float("-inf")
        self.changed.set()

    # running

    async def known(self, keys: Iterable[Key]) -> dict[Key, HostedRun]:
        """Of these runs those that the incarnation owns under these fencing tokens."""
        keys = {key for key in keys if wire.ID.fullmatch(key[0])}
        found = {key: self._known[key] for key in keys if key in self._known}
        if missing := keys - found.keys():
            runs = await self._store.owned(self.worker, dict(missing))
            tools = await self.tools()
            if runs:
                await tools.plans.load(runs)
            for run in runs:
                hosted = HostedRun(InflightRun(run, StopSignal()))
                await self._learn(hosted, tools)
                found[run.id, run.fencing_token] = self._known[run.id, run.fencing_token] = hosted
        return found

    async def one(self, key: Key) -> HostedRun:
        """A run that the incarnation owns. Raises LeaseLost."""
        hosted = (await self.known([key])).get(key)
        if hosted is None:
            raise LeaseLost(f"run {key[0]} is not, or no longer, this host's")
        return hosted

    async def _learn(self, hosted: HostedRun, tools: Tools) -> None:
        """Read the plan of a run that another worker has prepared, and mask its token here too."""
        inflight = hosted.inflight
        try:
            inflight.plan = plan = await tools.plans.of(inflight.run)
        except (DefinitionError, ConfigurationError, NotFound):
            return  # the attempt ends as one whose definition cannot be read
        limits = limits_of(inflight, tools)
        inflight.scopes = limits.scopes
        with suppress(WorkerError, TimeoutError):
            async with asyncio.timeout(TOKEN_WITHIN):
                enforced = await tools.tokens.ensure(plan.org, plan.issuer, **tools.token_of(plan, limits))
                inflight.hold(enforced.token)

    async def handler_of(self, hosted: HostedRun, named: str) -> str:
        """The handler that a host names for its run, if the attempt may be of it. Raises Malformed."""
        if hosted.handler is None:
            plan, run = hosted.inflight.plan, hosted.run
            variants = () if plan is None else plan.definition.variants
            possible = {run.handler, *(variant.handler for variant in variants)}
            if named not in possible:
                possible.add((await self._tools.checkpoints.load_progress(run.id)).handler or "")
            if named not in possible:
                raise Malformed(f"handler: run {run.id} is not one of {named}")
            hosted.handler = named
            entry = (await self.tools()).handlers.get(named)
            if named != run.handler and entry is not None:
                hosted.inflight.scopes |= frozenset(entry.scopes)
        if named != hosted.handler:
            raise Malformed(f"handler: the attempt of run {hosted.run.id} is one of {hosted.handler}")
        return named

    async def renew(self) -> tuple[bool, list[OwnedRun]]:
        """Extend the lease; the runs that the host should hold, without those that were not delivered."""
        await self._hand_back_unasked()
        before = set(self._known)
        registered, owned = await self._store.renew(self.worker)
        if before:
            for key in before.difference([(run.id, run.fencing_token) for run in owned]):
                if key not in self._writing and key not in self._undelivered:
                    self._forget(key)
        if not self._undelivered:
            return registered, owned
        delivered: list[OwnedRun] = []
        for run in owned:
            inflight = self._undelivered.get((run.id, run.fencing_token))
            if inflight is None:
                delivered.append(run)
            elif run.cancel_reason is not None:
                inflight.stop.request("suspended" if run.cancel_reason == "suspended" else "cancel", 0.0)
        return registered, delivered

    async def hand_back_undelivered(self) -> None:
        """Let the runs wait again that the host never got."""
        rest = [OwnedRun(run_id, fencing_token, None) for run_id, fencing_token in self._undelivered]
        if rest:
            await self.hand_back(rest)

    async def hand_back(self, owned: Sequence[OwnedRun]) -> set[RunId]:
        """Let runs of this incarnation wait again; returns those that do."""
        owned = [run for run in owned if wire.ID.fullmatch(run.id)]
        handed = await self._store.hand_back(self.worker, owned) if owned else set()
        for run in owned:
            if run.id in handed:
                self._forget((run.id, run.fencing_token))
        return handed

    def _forget(self, key: Key) -> None:
        self._ready.pop(key, None)
        self._tickets.pop(key, None)
        for found in (self._undelivered.pop(key, None), self._known.pop(key, None)):
            if found is not None:
                inflight = found.inflight if isinstance(found, HostedRun) else found
                inflight.drop_tokens()

    # ends

    async def finish(self, ends: Sequence[End]) -> list[RunId]:
        """Write how attempts ended; returns the runs whose end is stored.

        Raises:
            StoreUnavailable: not all are written yet. The host sends them again.
        """
        keys = {(end.run_id, end.fencing_token) for end in ends if wire.ID.fullmatch(end.run_id)}
        waiting = {key: self._writing[key] for key in keys if key in self._writing}
        done = {key for key in keys if self._ended.get(key)}
        hosted = await self.known(keys - waiting.keys() - self._ended.keys())
        tools = await self.tools()
        for end in ends:
            key = end.run_id, end.fencing_token
            if key in hosted and key not in waiting:
                waiting[key] = self._write(key, await self._conclude(end, hosted[key], tools))
        if unknown := keys - waiting.keys() - self._ended.keys():
            done |= await self._store.ended(self.worker, dict(unknown))
        if waiting:
            _, pending = await asyncio.wait(waiting.values(), timeout=WRITTEN_WITHIN)
            if pending:
                raise StoreUnavailable("the database did not take the ends in time")
        done |= {key for key, written in waiting.items() if written.result()}
        return [run_id for run_id, _ in done]

    async def _conclude(self, end: End, hosted: HostedRun, tools: Tools) -> EndedAttempt:
        inflight, key = hosted.inflight, (end.run_id, end.fencing_token)
        text = self._shared.sealer.open(end.sealed, self._place(key))
        if text is None:
            raise Malformed(f"sealed: it is not that of run {end.run_id}, or was changed")
        kept = json.loads(text)
        commits = kept.pop("commits")
        if kept["token_ready_at"] is not None:
            kept["token_ready_at"] = from_text(kept["token_ready_at"])
        trail = Trail(**kept)
        now = self._clock.now()
        if end.handler_seconds is not None:
            # By the host's clock, within what this one allows.
            earliest = trail.token_ready_at or inflight.run.started_at
            trail.handler_started_at = max(earliest, now - _seconds(end.handler_seconds, now))
        trail.peak_memory = end.peak_memory
        if end.progress is not None:
            note = end.progress["note"]
            trail.progress = {**end.progress, "note": None if note is None else masker.mask(note)}
        trail.asks = end.asks
        inflight.moved = inflight.moved or end.moved
        outcome = end.outcome
        if hosted.refused is not None:
            outcome = outcome_of_error(hosted.refused, inflight, tools.random)
        elif not commits:
            outcome = without_state(outcome)
        if isinstance(outcome, outcomes.NoToken):
            most = timedelta(minutes=1)
            outcome = replace(outcome, retry_after=min(max(outcome.retry_after, timedelta()), most))
        return await conclude(inflight, outcome, trail, tools)

    def _write(self, key: Key, ended: EndedAttempt) -> asyncio.Future[bool]:
        written = self._writing[key] = asyncio.get_running_loop().create_future()
        self._finisher.put(ended)
        return written

    def _written(self, ended: EndedAttempt, accepted: bool) -> None:
        key = ended.run_id, ended.fencing_token
        hosted = self._known.get(key)
        inflight = self._undelivered.get(key) if hosted is None else hosted.inflight
        if accepted:
            events.run_ended(ended, inflight)
            self._shared.on_end(ended, inflight)
        else:
            events.run_fenced_out(ended.run_id, ended.attempt, ended.fencing_token, inflight)
        self._forget(key)
        remember(self._ended, key, accepted, MOST_ENDS)
        written = self._writing.pop(key)
        if not written.done():
            written.set_result(accepted)
        self.changed.set()

    def _unstorable(self, ended: EndedAttempt, error: Exception) -> None:
        hosted = self._known.get((ended.run_id, ended.fencing_token))
        org = hosted and hosted.inflight.org_code
        kind = type(error).__name__
        emit("result.unstorable", org=org, run=ended.run_id, attempt=ended.attempt, error=kind)


# What an attempt has recorded when its handler may be called.
_SEALED = ("handler", "token_ready_at", "claims", "flags", "jti", "claims_hash")


def _seconds(seconds: float, now: datetime) -> timedelta:
    return timedelta(seconds=min(seconds, now.timestamp()))
