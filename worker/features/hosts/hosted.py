"""Hosted: an attempt on a host, whose worker has prepared it and will decide what becomes of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from random import Random

from worker.clock import Clock
from worker.engine.attempt.attempt import NO_BROKER, Prepared, outcome_of_error, run_handler
from worker.engine.attempt.inflight import Deadlines, InflightRun
from worker.engine.attempt.plan import AUTO, HandlerRegistry, Limits, NetworkPolicy, cannot_be_sealed
from worker.engine.attempt.run_log import RunLogWriter, mask_trail, redacted
from worker.engine.loops.step_writer import StepWriter
from worker.engine.runners.contract import Runner, outcome_of_stop
from worker.features.hosts.control import ControlUnavailable
from worker.features.hosts.remote import HostedEnd, RemoteActs, RemoteStore
from worker.features.hosts.wire import Taken
from worker.ids import RunId
from worker.model.definitions import RetryPolicy
from worker.model.runs.outcome import EndedAttempt, Error, Failed, NoHandler, Outcome, Trail, end_attempt
from worker.model.runs.run import AdmittedRun, Isolation
from worker.telemetry import tracing
from worker.telemetry.tracing import Traced

_FIELDS = [one.name for one in fields(EndedAttempt)]
# The worker behind the host counts attempts; this only gives each end its name.
_POLICY = RetryPolicy()


@dataclass(frozen=True, slots=True)
class RemoteTools:
    """What all attempts of a host share; `taken` are those that have not started.

    `brokered` if it has a broker, which sends bound secrets.
    """

    store: RemoteStore
    handlers: HandlerRegistry
    runners: Mapping[Isolation, Runner]
    steps: StepWriter
    run_log: RunLogWriter
    clock: Clock
    random: Random
    network: NetworkPolicy = AUTO
    deadlines: Deadlines = field(default_factory=Deadlines)
    brokered: bool = True
    taken: dict[tuple[RunId, int], Taken] = field(default_factory=dict)

    @property
    def acts(self) -> RemoteActs:
        return RemoteActs(self.store, self.steps)

    async def prepare(self, runs: Sequence[AdmittedRun]) -> None:
        """Nothing: the worker has prepared them."""

    async def finish(self, ended: Sequence[EndedAttempt]) -> set[RunId]:
        """Report ends, each after its log, since no worker takes a line of an attempt that has ended.

        Raises Unavailable while lines wait for a worker.
        """
        if not self.run_log.has_written({one.run_id for one in ended}):
            raise ControlUnavailable("lines of the log wait for a worker")
        return await self.store.finish(ended)

    def keep(self, attempts: Sequence[Taken]) -> list[AdmittedRun]:
        """Keep attempts until they start; returns their runs."""
        self.taken.update(((taken.run.id, taken.run.fencing_token), taken) for taken in attempts)
        return [taken.run for taken in attempts]


async def hosted_attempt(inflight: InflightRun, tools: RemoteTools) -> HostedEnd:
    """Call the handler of one taken attempt. Errors become outcomes, never exceptions."""
    run = inflight.run
    taken = tools.taken.pop((run.id, run.fencing_token))
    inflight.org_code, inflight.definition = taken.org, taken.definition
    inflight.cancel_grace = taken.cancel_grace
    trail = Trail(taken.work.handler)
    # A worker with tracing on makes the spans of the attempt itself.
    inflight.traced_here = traced_here = taken.work.traceparent is None
    if traced_here:
        taken.work.traceparent = place = tracing.traceparent(run.id, run.fencing_token)
        taken.work.traces = tracing.detail(place)
    try:
        outcome = await _run(inflight, taken, trail, tools)
    except Exception as error:
        outcome = outcome_of_error(error, inflight, tools.random)
    outcome = await redacted(outcome, run.org_id)
    await mask_trail(trail, run.org_id)
    ended = end_attempt(run, outcome, trail, _POLICY, now=tools.clock.now(), random=tools.random)
    if traced_here and (tracer := tracing.in_use()) is not None:
        tracer.end(_traced(taken, ended), tracer.marks(run.id, run.fencing_token))
    return HostedEnd(
        **{name: getattr(ended, name) for name in _FIELDS},
        returned=outcome,
        sealed=taken.sealed,
        moved=inflight.moved,
    )


def _traced(taken: Taken, ended: EndedAttempt) -> Traced:
    run = taken.run
    return Traced(
        run_id=run.id,
        attempt=run.attempt,
        fencing_token=run.fencing_token,
        org=taken.org,
        issuer=taken.work.claims.issuer,
        definition=taken.definition,
        pipeline=run.handler,
        handler=ended.trail.handler,
        origin=run.origin,
        isolation=run.isolation,
        outcome=ended.outcome,
        state=ended.shown_state,
        reason=ended.reason,
        error_type=ended.error["type"] if ended.error else ended.reason,
        started_at=run.started_at,
        token_ready_at=None,
        ended_at=ended.ended_at,
    )


async def _run(inflight: InflightRun, taken: Taken, trail: Trail, tools: RemoteTools) -> Outcome:
    if inflight.stop.asked:
        return outcome_of_stop(inflight.stop)
    work, entry = taken.work, tools.handlers.get(taken.work.handler)
    inflight.hold(work.token)
    inflight.hold_secrets(work.clear_secrets)
    inflight.hold_secrets({each.name: each.value for each in work.bound})
    if work.bound and not tools.brokered:
        error = Error("ConfigurationError", f"the secret {work.bound[0].name} is bound, and {NO_BROKER}")
        return Failed(error, permanent=True)
    if entry is None or (inflight.run.isolation == "inline" and not tools.handlers.allows_inline(entry)):
        return NoHandler(work.handler)
    # What is installed here is what is called, by the clock of this machine.
    work.entry_point = entry.entry_point
    inflight.audiences = work.egress.audiences
    work.timeout_at = tools.clock.now() + taken.timeout
    work.egress = tools.network.of_host(work.egress)
    if inflight.run.isolation == "inline" and (refused := cannot_be_sealed(work.handler, work.egress)):
        return refused
    limits = Limits(timeout=taken.timeout, cancel_grace=taken.cancel_grace)
    return await run_handler(Prepared(work, limits, commits=True), inflight, trail, tools)
