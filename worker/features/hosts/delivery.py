"""Delivery: admits runs for one incarnation of a host, and prepares their attempts until the host takes them.

What is not delivered is left out of the host's renewals, so that it does not hand it back. If this worker
stops, another one cannot know that, and the host does. Only handlers that the host may run are granted.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from worker.engine.attempt.attempt import Prepared, conclude, outcome_of_error, prepare
from worker.engine.attempt.inflight import InflightRun
from worker.engine.attempt.plan import HandlerRegistry
from worker.engine.attempt.tools import Tools
from worker.engine.runners.contract import StopSignal
from worker.errors import Busy, LeaseLost, Unavailable
from worker.features.hosts import wire
from worker.features.hosts.sharing import Sharing
from worker.features.hosts.wire import Taken
from worker.handlers.ceiling import Offered
from worker.handlers.parts import trusted
from worker.ids import RunId, WorkerId
from worker.model.definitions.definition import Definition
from worker.model.runs.hosts import Ticket
from worker.model.runs.outcome import EndedAttempt, Outcome, Trail
from worker.model.runs.run import AdmittedRun, Isolation
from worker.store.host_store import HostStore
from worker.wiring.secrets import RingSealer

# Seconds for which the handlers of an incarnation are remembered.
HANDLERS_AGE = 5.0
# Maximum attempts that one take returns, and roughly their maximum bytes.
MAX_TAKEN = 500
TAKEN_BYTES = 8 * 1024 * 1024
# Seconds between two looks whether a host still waits for the run of a ticket, and after which it does not.
TICKET_LOOK = 1.0
TICKET_AGE = 15.0
# What an attempt has recorded when its handler may be called.
RECORDED = trusted(Trail, without=("handler_started_at", "progress", "peak_memory", "asks", "egress"))

Key = tuple[RunId, int]


@dataclass(frozen=True, slots=True)
class HostTools:
    """What all incarnations share. `on_end` is called with each accepted end."""

    tools: Tools
    store: HostStore
    sealer: RingSealer
    sharing: Sharing
    on_end: Callable[[EndedAttempt, InflightRun | None], None]


@dataclass(slots=True)
class _Ticket:
    """The ticket of a run that is not delivered yet, and when the host last asked for it."""

    sha256: str
    asked_at: float


@dataclass(frozen=True, slots=True)
class Ready:
    """A prepared attempt, as JSON for the host."""

    key: Key
    inflight: InflightRun
    encoded: bytes


class Delivery:
    """The attempts of one incarnation that its host has not got yet.

    `on_prepared` is called with each that may start, `on_ended` with each that ends without its handler.
    """

    def __init__(
        self,
        pool: str,
        worker: WorkerId,
        shared: HostTools,
        *,
        on_prepared: Callable[[Key, InflightRun, Trail], None],
        on_ended: Callable[[Key, EndedAttempt], object],
    ) -> None:
        self._pool = pool
        self._worker = worker
        self._shared = shared
        self._store = shared.store
        self._clock = shared.tools.clock
        self._on_prepared = on_prepared
        self._on_ended = on_ended
        # Admitted and not delivered; those of them that are ready.
        self.undelivered: dict[Key, InflightRun] = {}
        self._ready: dict[Key, Ready] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._admitting = asyncio.Lock()
        self._tools: Tools = shared.tools
        self._handlers_until = float("-inf")
        # Set when a take should look again.
        self.changed = asyncio.Event()
        # The runs that each open take has admitted, and the tickets of those that came with one.
        self._takes: list[set[Key]] = []
        self._tickets: dict[Key, _Ticket] = {}

    async def close(self) -> None:
        """Stop preparing."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for inflight in self.undelivered.values():
            inflight.drop_tokens()

    def forget(self, key: Key) -> None:
        """Drop an attempt that has ended, or is no longer the host's."""
        self._ready.pop(key, None)
        self._tickets.pop(key, None)
        if (inflight := self.undelivered.pop(key, None)) is not None:
            inflight.drop_tokens()

    def unasked(self) -> list[Key]:
        """The runs that came with a ticket, and that the host no longer asks for."""
        before = self._clock.monotonic() - TICKET_AGE
        return [key for key, ticket in self._tickets.items() if ticket.asked_at < before]

    async def take(
        self, free: Mapping[Isolation, int], wait: float, *, gone: Callable[[], bool]
    ) -> list[Ready]:
        """Attempts for these slots as JSON, as soon as one is ready, at most after `wait` seconds.

        `gone` says that the host no longer waits. Several takes may be open, each for slots of its own.
        """
        mine: set[Key] = set()
        self._takes.append(mine)
        opened = self._shared.sharing.takes(self._pool)
        opened.append(self.changed)
        deadline = self._clock.monotonic() + wait
        try:
            while not gone():
                self.changed.clear()
                if not self._deliverable(mine):
                    mine |= await self._admit(free, mine, gone)
                if (taken := self._deliverable(mine)) and not gone():
                    return self._deliver(taken)
                left = deadline - self._clock.monotonic()
                if left <= 0:
                    break
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(left, self._shared.sharing.pause(self._pool))):
                        await self.changed.wait()
            return []
        finally:
            # What it has admitted goes to the next take.
            self._takes.remove(mine)
            opened.remove(self.changed)

    async def take_by(
        self, ticket: Ticket, wait: float, *, gone: Callable[[], bool]
    ) -> tuple[list[Ready], bool]:
        """The attempt of a ticket as JSON, if it is valid, and whether to ask again because it is not ready.

        Empty also if the attempt has ended without its handler.
        """
        key = ticket.run_id, ticket.fencing_token
        known = self._tickets.get(key)
        if known is None:
            tools = await self.tools()
            if not tools.pool_rules.usable([self._pool]):
                raise Busy(f"this worker has other rules of pool {self._pool} than the stored ones")
            if gone():  # its call waited while the worker was busy: another host has the run sooner
                return [], True
            run = await self._store.take_ticket(self._worker, ticket)
            if run is None:
                return [], False
            known = self._tickets[key] = _Ticket(ticket.sha256, self._clock.monotonic())
            await self._start([run], tools)
        elif known.sha256 != ticket.sha256:
            return [], False
        known.asked_at = self._clock.monotonic()
        deadline = known.asked_at + wait
        while key in self.undelivered and key not in self._ready:
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

    def _deliverable(self, mine: set[Key]) -> list[Key]:
        """What is ready and was admitted for this take, or for one that has ended."""
        others = set[Key]().union(*(take for take in self._takes if take is not mine))
        return [key for key in self._ready if key not in others and key not in self._tickets]

    def _deliver(self, keys: Sequence[Key]) -> list[Ready]:
        taken: list[Ready] = []
        size = 0
        for key in keys:
            ready = self._ready[key]
            if taken and (size + len(ready.encoded) > TAKEN_BYTES or len(taken) >= MAX_TAKEN):
                break
            del self._ready[key]
            del self.undelivered[key]
            taken.append(ready)
            size += len(ready.encoded)
        return taken

    def put_back(self, taken: Sequence[Ready]) -> None:
        """Deliver these with the next take: the host has not got them."""
        for ready in taken:
            self.undelivered[ready.key] = ready.inflight
            self._ready[ready.key] = ready
        self.changed.set()

    async def _admit(
        self, free: Mapping[Isolation, int], mine: set[Key], gone: Callable[[], bool]
    ) -> set[Key]:
        async with self._admitting:
            others = set[Key]().union(*(take for take in self._takes if take is not mine), self._tickets)
            coming = Counter(
                inflight.run.isolation for key, inflight in self.undelivered.items() if key not in others
            )
            left = {isolation: max(0, slots - coming[isolation]) for isolation, slots in free.items()}
            if not any(left.values()):
                return set()
            admit = partial(self._admit_due, gone)
            runs = await self._shared.sharing.share(self._pool, self._worker, left, admit)
            if not runs:
                return set()
            tools = await self.tools()
            await self._start(runs, tools)
        # Mostly their tokens are in the cache, and all are ready after one turn.
        await asyncio.sleep(0)
        return {(run.id, run.fencing_token) for run in runs}

    async def _admit_due(
        self, gone: Callable[[], bool], free: Mapping[Isolation, int]
    ) -> Sequence[AdmittedRun]:
        if gone():  # while it waited for its turn
            return ()
        tools = await self.tools()
        # While the rules of its pool differ from the stored ones, this worker takes no run of it.
        if not tools.pool_rules.usable([self._pool]) or not (offered := tools.handlers.limits()):
            return ()
        return await self._store.admit(self._worker, self._pool, offered, free)

    async def _start(self, runs: Sequence[AdmittedRun], tools: Tools) -> None:
        keys = [(run.id, run.fencing_token) for run in runs]
        self.undelivered |= {key: InflightRun(run, StopSignal()) for key, run in zip(keys, runs, strict=True)}
        with suppress(Unavailable):  # each attempt reads for itself what is missing
            await tools.prepare(runs)
        for key in keys:
            task = asyncio.create_task(self._prepare(key, self.undelivered[key], tools))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _prepare(self, key: Key, inflight: InflightRun, tools: Tools) -> None:
        trail = Trail(inflight.run.handler)
        found: Ready | Outcome
        try:
            prepared = await prepare(inflight, trail, tools)
            if isinstance(prepared, Prepared):
                taken = wire.taken_message(self._taken(inflight, prepared, trail))
                found = Ready(key, inflight, json.dumps(taken, separators=(",", ":")).encode())
            else:
                found = prepared
        except Exception as error:
            found = outcome_of_error(error, inflight, tools.random)
        if key not in self.undelivered:
            inflight.drop_tokens()
        elif isinstance(found, Ready):
            self._on_prepared(key, inflight, trail)
            self._ready[key] = found
        else:
            self._on_ended(key, await conclude(inflight, found, trail, tools))
        self.changed.set()

    def _taken(self, inflight: InflightRun, prepared: Prepared, trail: Trail) -> Taken:
        run, plan = inflight.run, inflight.plan
        if plan is None:
            raise LeaseLost(f"run {run.id} was not prepared")
        text = json.dumps(RECORDED.write(trail) | {"commits": prepared.commits}, separators=(",", ":"))
        return Taken(
            run=run,
            org=plan.org.code,
            definition=plan.definition.name,
            cancel_grace=prepared.limits.cancel_grace,
            timeout=prepared.limits.timeout,
            work=prepared.work,
            sealed=self._shared.sealer.seal(text, place_of((run.id, run.fencing_token), self._worker)),
        )

    async def tools(self) -> Tools:
        """What attempts of this incarnation use: its handlers are what it declares, as far as it may."""
        now = self._clock.monotonic()
        if now >= self._handlers_until:
            handlers = GrantedHandlers(await self._store.offered(self._worker))
            self._tools = replace(self._shared.tools, handlers=handlers)
            self._handlers_until = now + HANDLERS_AGE
        return self._tools

    def handlers_changed(self) -> None:
        """Read the handlers again before the next admission."""
        self._handlers_until = float("-inf")
        self.changed.set()


def place_of(key: Key, worker: WorkerId) -> list[object]:
    """What the record of an attempt is sealed for."""
    return [*key, worker]


class GrantedHandlers(HandlerRegistry):
    """The registry for its attempts: no entry goes beyond the ceiling, whatever the host declares."""

    def __init__(self, offered: Offered) -> None:
        # The host has already left out what its operator does not allow inline.
        super().__init__(frozenset(grant.entry.distribution for grant in offered.grants.values()))
        self._grants = offered.grants
        self._admitted = offered.admitted.union(offered.free)
        for grant in offered.grants.values():
            self.add(grant.entry)

    def unapproved(self, name: str, definition: Definition, *, is_variant: bool = False) -> str | None:
        grant = self._grants.get(name)
        if grant is None or not grant.beyond:
            return None
        own = {
            "scopes": definition.scopes,
            "timeout": definition.timeout,
            "max_attempts": definition.max_attempts,
        }
        return None if grant.may_run(own, is_variant=is_variant) else grant.command

    def limits(self) -> Mapping[str, int | None]:
        """The limit of each handler that may be admitted now: it bounds only what this incarnation takes."""
        return {name: most for name, most in super().limits().items() if name in self._admitted}
