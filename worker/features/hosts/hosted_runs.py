"""Hosted runs: what a worker knows of one incarnation's running attempts, until their ends are written.

The database has all that counts, so any worker can go on where this one stops: a run that is not known here
is read from there. What another worker had admitted but not delivered is handed back by the host.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from worker.bounded import remember
from worker.engine.attempt.answers import Running, SpanRoom
from worker.engine.attempt.attempt import (
    PAUSE,
    conclude,
    limits_of,
    may_start,
    outcome_of_error,
    outdate_token,
    without_state,
)
from worker.engine.attempt.inflight import (
    REPORTED,
    InflightRun,
    egress_denied,
    run_ended,
    run_fenced_out,
)
from worker.engine.attempt.tools import StoreActs, Tools
from worker.engine.loops.finisher import Finisher
from worker.engine.runners.contract import (
    FORGED,
    LONGEST_PAUSE,
    StopSignal,
    handler_exited,
    is_own,
    stop_reason_of,
)
from worker.errors import (
    ConfigurationError,
    DefinitionError,
    LeaseLost,
    NotFound,
    StoreUnavailable,
    Unavailable,
    WorkerError,
)
from worker.features.hosts import wire
from worker.features.hosts.delivery import RECORDED, Delivery, HostTools, Key, place_of
from worker.features.hosts.sent import AttemptLog, End
from worker.features.hosts.wire import Malformed
from worker.ids import RunId, WorkerId
from worker.model.runs import outcome as outcomes
from worker.model.runs.hosts import HostCaller
from worker.model.runs.outcome import EndedAttempt, Failed, Outcome, Trail
from worker.model.runs.run import AdmittedRun, OwnedRun
from worker.store.host_store import HostStore
from worker.telemetry import tracing
from worker.telemetry.events import emit

# Seconds that a call waits until its ends are written, and that a run unknown here waits for its token.
WRITTEN_WITHIN = 5.0
TOKEN_WITHIN = 2.0
# Seconds between two renewals whose runs are compared with those that are known here.
COMPARED_EVERY = 60.0
# Why a run may be refused whose renewed token another worker has checked.
OF_TOKENS = frozenset(
    {
        *("org_mismatch", "client_mismatch", "scope_missing", "property_missing"),
        *("pool_mismatch", "token_invalid"),
    }
)
TOO_OFTEN = "its hosts handed it back too often in a row without a new checkpoint or step"
NOT_SEALED = "its host did not return what its worker sealed, or the key ring no longer has the key"
# Why a request was not sent, if its host is of an older release.
BY_HOST = "by its host"
# Ends that are remembered: a host repeats those whose answer was lost.
MAX_ENDS = 10_000


@dataclass(slots=True, eq=False)
class HostedRun:
    """A run that a host holds, as this worker knows it; `handler` is None if another worker prepared it."""

    running: Running
    handler: str | None = None
    log: AttemptLog = field(default_factory=AttemptLog)

    @property
    def inflight(self) -> InflightRun:
        return self.running.inflight

    @property
    def run(self) -> AdmittedRun:
        return self.running.inflight.run


@dataclass(frozen=True, slots=True)
class _Ends:
    """The `FinishStore` of one incarnation."""

    store: HostStore
    worker: WorkerId

    async def finish(self, ended: Sequence[EndedAttempt]) -> set[RunId]:
        return await self.store.finish(self.worker, ended)


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
        self.delivery = Delivery(
            caller.pool, worker, shared, on_prepared=self._prepared, on_ended=self._write
        )
        self._writing: dict[Key, asyncio.Future[bool]] = {}
        self._ended: OrderedDict[Key, bool] = OrderedDict()
        # Held while lines are counted and appended.
        self.logging = asyncio.Lock()
        self._compared_until = float("-inf")
        ends = _Ends(self._store, worker)
        self._finisher = Finisher(ends, self._clock, self._written, self._unstorable)
        self._writer = asyncio.create_task(self._finisher.run(), name="hosted ends")

    async def close(self) -> None:
        """Write what has ended, and drop all others: the host hands back what it never got."""
        await self.delivery.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(WRITTEN_WITHIN):
                await self._finisher.flushed()
        self._writer.cancel()
        await asyncio.gather(self._writer, return_exceptions=True)
        for hosted in self._known.values():
            hosted.inflight.drop_tokens()
        self._store.forget(self.worker)

    def _prepared(self, key: Key, inflight: InflightRun, trail: Trail) -> None:
        self._known[key] = HostedRun(self._running(inflight, trail.handler), trail.handler)

    def _running(self, inflight: InflightRun, handler: str, *, resumed: bool = False) -> Running:
        tools, trail = self._shared.tools, Trail(handler)
        acts = StoreActs(tools)
        given = inflight, trail, acts, tools.run_log, tools.clock
        spans = SpanRoom.of(tracing.detail())
        return Running(*given, host=self.worker, resumed=resumed, spans=spans)

    # running

    async def known(self, keys: Iterable[Key]) -> dict[Key, HostedRun]:
        """Of these runs those that the incarnation owns under these fencing tokens."""
        keys = {key for key in keys if wire.ID.fullmatch(key[0])}
        found = {key: self._known[key] for key in keys if key in self._known}
        if missing := keys - found.keys():
            runs = await self._store.owned(self.worker, dict(missing))
            tools = await self.delivery.tools()
            if runs:
                await tools.plans.load(runs)
            for run in runs:
                inflight = InflightRun(run, StopSignal())
                hosted = HostedRun(self._running(inflight, run.handler, resumed=True))
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
        """Read the plan of a run that another worker has prepared; mask its token and secrets here too."""
        inflight = hosted.inflight
        try:
            inflight.begin(plan := await tools.plans.of(inflight.run))
        except (DefinitionError, ConfigurationError, NotFound):
            return  # the attempt ends as one whose definition cannot be read
        limits = limits_of(inflight, tools)
        inflight.scopes = limits.scopes
        if (entry := tools.handlers.get(inflight.run.handler)) is not None:
            inflight.audiences = plan.network.egress(plan.definition, entry).audiences
            may_start(inflight, plan, entry, limits)
        with suppress(WorkerError, TimeoutError):
            async with asyncio.timeout(TOKEN_WITHIN):
                # Its age does not matter: it is only masked.
                want = plan.want(limits, tools.handlers)._replace(max_age=None)
                enforced = await tools.tokens.ensure(want)
                inflight.hold(enforced.token)
                others = plan.others(inflight.run.origin)
                if names := tools.handlers.secrets([inflight.run.handler, *others]):
                    secrets = await tools.secrets.of(plan.org, names)
                    inflight.hold_secrets({name: each.value for name, each in secrets.items()})

    async def check_handler(self, hosted: HostedRun, named: str) -> None:
        """Raise Malformed unless the attempt may be one of the handler that its host names."""
        if hosted.handler is None:
            run = hosted.run
            possible = await self._possible_handlers(hosted)
            if named not in possible:
                possible.add((await self._shared.tools.store.load_progress(run.id)).handler or "")
            if named not in possible:
                raise Malformed(f"handler: run {run.id} is not one of {named}")
            hosted.handler = hosted.running.trail.handler = named
            tools = await self.delivery.tools()
            entry = tools.handlers.get(named)
            if named != run.handler and entry is not None:
                hosted.inflight.scopes |= frozenset(entry.scopes)
                if (plan := hosted.inflight.plan) is not None:
                    may_start(hosted.inflight, plan, entry, limits_of(hosted.inflight, tools))
        if named != hosted.handler:
            raise Malformed(f"handler: the attempt of run {hosted.run.id} is one of {hosted.handler}")

    async def _possible_handlers(self, hosted: HostedRun) -> set[str]:
        """The handlers that another worker may have prepared a run for: the one that a rollout gave it."""
        plan, run, versions = hosted.inflight.plan, hosted.run, self._shared.tools.versions
        if plan is None:
            return {run.handler}
        version = None
        if plan.rollout_of(run) is not None and versions is not None:
            version = await versions.kept_version(run.id)
        return {run.handler, *plan.variants(run.origin)} if version is None else {version}

    async def renew_as_json(self) -> tuple[bool, bytes]:
        """The answer to a renewal. Mostly it is passed on as the database gives it."""
        now = self._clock.monotonic()
        if self.delivery.undelivered or now >= self._compared_until:
            registered, owned = await self.renew()
            self._compared_until = now + COMPARED_EVERY
            return registered, json.dumps(wire.renewed_message(registered, owned)).encode()
        registered, text = await self._store.renew_as_json(self.worker)
        return registered, f'{{"registered":{json.dumps(registered)},"owned":{text}}}'.encode()

    async def renew(self) -> tuple[bool, list[OwnedRun]]:
        """Extend the lease; the runs that the host should hold, without those that were not delivered."""
        if unasked := self.delivery.unasked():
            # Before the database knows it: the host may ask for them just now.
            for key in unasked:
                self.delivery.forget(key)
            with suppress(Unavailable):  # the host hands them back
                await self._return([OwnedRun(*key, None) for key in unasked])
        undelivered = self.delivery.undelivered
        before = set(self._known)
        registered, owned = await self._store.renew(self.worker)
        if before:
            for key in before.difference([(run.id, run.fencing_token) for run in owned]):
                if key not in self._writing and key not in undelivered:
                    self._forget(key)
        if not undelivered:
            return registered, owned
        delivered: list[OwnedRun] = []
        for run in owned:
            inflight = undelivered.get((run.id, run.fencing_token))
            if inflight is None:
                delivered.append(run)
            elif run.cancel_reason is not None:
                inflight.stop.request(stop_reason_of(run.cancel_reason), 0.0)
        return registered, delivered

    async def hand_back_undelivered(self) -> None:
        """Let the runs wait again that the host never got."""
        if rest := [OwnedRun(*key, None) for key in self.delivery.undelivered]:
            await self._return(rest)

    async def hand_back(self, owned: Sequence[OwnedRun]) -> set[RunId]:
        """Let runs of this incarnation wait again that the host does not hold; returns those that it loses.

        One that was handed back too often in a row has failed instead.
        """
        owned = [run for run in owned if wire.ID.fullmatch(run.id)]
        often = await self._store.often_handed_back([run.id for run in owned]) if owned else set()
        handed = await self._return([run for run in owned if run.id not in often])
        keys = [(run.id, run.fencing_token) for run in owned if run.id in often]
        tools, waiting = await self.delivery.tools(), {}
        for key, hosted in (await self.known(keys)).items():
            trail = Trail(hosted.handler or hosted.run.handler)
            ended = await conclude(hosted.inflight, handler_exited(TOO_OFTEN), trail, tools)
            waiting[key] = self._write_once(key, ended)
        return handed | {run_id for run_id, _ in await _written(waiting)}

    async def _return(self, owned: Sequence[OwnedRun]) -> set[RunId]:
        """Let runs of this incarnation wait again; returns those that do."""
        handed = await self._store.hand_back(self.worker, owned) if owned else set()
        for run in owned:
            if run.id in handed:
                self._forget((run.id, run.fencing_token))
        return handed

    def _forget(self, key: Key) -> None:
        self.delivery.forget(key)
        if (hosted := self._known.pop(key, None)) is not None:
            hosted.inflight.drop_tokens()

    # ends

    async def finish(self, ends: Sequence[End]) -> list[RunId]:
        """Write how attempts ended; returns the runs whose end is stored.

        Raises:
            StoreUnavailable: not all are written yet. The host sends them again.
        """
        keys = {end.key for end in ends if wire.ID.fullmatch(end.run)}
        waiting = {key: self._writing[key] for key in keys if key in self._writing}
        done = {key for key in keys if self._ended.get(key)}
        hosted = await self.known(keys - waiting.keys() - self._ended.keys())
        tools = await self.delivery.tools()
        for end in ends:
            key = end.key
            if key in hosted and key not in waiting:
                ended = await self._conclude(end, hosted[key], tools)
                waiting[key] = self._write_once(key, ended)
        if unknown := keys - waiting.keys() - self._ended.keys():
            done |= await self._store.ended(self.worker, dict(unknown))
        done |= await _written(waiting)
        return [run_id for run_id, _ in done]

    async def _conclude(self, end: End, hosted: HostedRun, tools: Tools) -> EndedAttempt:
        inflight, key = hosted.inflight, end.key
        text = self._shared.sealer.open(end.sealed, place_of(key, self.worker))
        if text is None:
            # To refuse it would keep all ends of the host, which repeats it.
            trail = Trail(hosted.handler or hosted.run.handler)
            return await conclude(inflight, handler_exited(NOT_SEALED), trail, tools)
        kept = json.loads(text)
        commits = kept.pop("commits")
        trail = RECORDED.read(kept)
        now = self._clock.now()
        if end.handler_seconds is not None:
            # By the host's clock, within what this one allows.
            earliest = trail.token_ready_at or inflight.run.started_at
            trail.handler_started_at = max(earliest, now - _seconds(end.handler_seconds, now))
        trail.peak_memory = end.peak_memory
        trail.progress = end.progress
        trail.asks = end.asks
        trail.egress = end.egress
        inflight.moved = inflight.moved or end.moved
        if (refused := hosted.running.refused) is not None:
            outcome = outcome_of_error(refused, inflight, tools.random)
        else:
            outcome = await self._believed(end.outcome, hosted, tools)
        return await conclude(inflight, outcome if commits else without_state(outcome), trail, tools)

    async def _believed(self, reported: Outcome, hosted: HostedRun, tools: Tools) -> Outcome:
        """A reported outcome, as far as a host may decide it: what it says is a claim.

        It may also time a run out, which is counted, and lose it, as it can by not renewing its lease. It
        drains on its own, so no worker can check that: its hand-backs are limited in a row instead. What it
        says of tokens no single worker can check either, since any of them may have answered: the run waits,
        by the workers' pause, and its next attempt asks the issuer. Anything else is `handler_exited`.
        """
        run = hosted.run
        match reported:
            case outcomes.TimedOut() | outcomes.Lost():
                return reported
            case Failed(reason="handler_exited" | "result_unstorable"):
                return reported
            case _ if is_own(reported):
                return reported
            case outcomes.NoToken(retry_after, detail):
                seconds = min(max(retry_after.total_seconds(), PAUSE), LONGEST_PAUSE)
                return outcomes.NoToken(timedelta(seconds=seconds), detail)
            case outcomes.Refused(reason) if reason in OF_TOKENS:
                await outdate_token(hosted.inflight, tools)
                return outcomes.NoToken(timedelta(seconds=PAUSE), "its host says that its token was refused")
            case outcomes.Cancelled():
                asked = await self._store.stops(self.worker, {run.id: run.fencing_token})
                if run.id not in asked:
                    return await self._handed_back(run, None)
                reason = stop_reason_of(asked[run.id])
                return outcomes.Cancelled("requested" if reason == "cancel" else reason)
            case outcomes.HandedBack(detail):
                return await self._handed_back(run, detail)
        return handler_exited(FORGED)

    async def _handed_back(self, run: AdmittedRun, detail: str | None) -> Outcome:
        """A hand-back, unless the run was handed back too often in a row without storing anything."""
        if await self._store.often_handed_back([run.id]):
            return handler_exited(TOO_OFTEN)
        return outcomes.HandedBack(detail)

    def _write_once(self, key: Key, ended: EndedAttempt) -> asyncio.Future[bool]:
        """Write an end unless another call has meanwhile: to mask its texts may take a while."""
        if (writing := self._writing.get(key)) is not None:
            return writing
        if (accepted := self._ended.get(key)) is None:
            return self._write(key, ended)
        written = asyncio.get_running_loop().create_future()
        written.set_result(accepted)
        return written

    def _write(self, key: Key, ended: EndedAttempt) -> asyncio.Future[bool]:
        written = self._writing[key] = asyncio.get_running_loop().create_future()
        self._finisher.put(ended)
        return written

    def _written(self, ended: EndedAttempt, accepted: bool) -> None:
        key = ended.run_id, ended.fencing_token
        hosted = self._known.get(key)
        inflight = self.delivery.undelivered.get(key) if hosted is None else hosted.inflight
        if accepted:
            run_ended(ended, inflight)
            if inflight is not None:
                denied = [row for row in ended.trail.egress if row.denied]
                for row in denied[:REPORTED]:
                    egress_denied(inflight, ended.trail.handler, row.origin, row.reason or BY_HOST)
            self._shared.on_end(ended, inflight)
        else:
            run_fenced_out(ended.run_id, ended.attempt, ended.fencing_token, inflight)
        self._forget(key)
        remember(self._ended, key, accepted, MAX_ENDS)
        written = self._writing.pop(key)
        if not written.done():
            written.set_result(accepted)
        self.delivery.changed.set()

    def _unstorable(self, ended: EndedAttempt, error: Exception) -> None:
        hosted = self._known.get((ended.run_id, ended.fencing_token))
        org = hosted and hosted.inflight.org_code
        kind = type(error).__name__
        emit("result.unstorable", org=org, run=ended.run_id, attempt=ended.attempt, error=kind)


async def _written(waiting: Mapping[Key, asyncio.Future[bool]]) -> set[Key]:
    """Wait until ends are written; returns those that are stored. Raises StoreUnavailable."""
    if waiting:
        _, pending = await asyncio.wait(waiting.values(), timeout=WRITTEN_WITHIN)
        if pending:
            raise StoreUnavailable("the database did not take the ends in time")
    return {key for key, written in waiting.items() if written.result()}


def _seconds(seconds: float, now: datetime) -> timedelta:
    return timedelta(seconds=max(0.0, min(seconds, now.timestamp())))
