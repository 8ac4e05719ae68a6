"""In flight: the runs of this process, how to stop each of them, and when its timeout passes.

Also what an attempt leaves behind: events, trace spans, and a record of the claims it acted under.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, TypeVar

from worker.bounded import remember
from worker.engine.attempt.plan import AttemptPlan
from worker.engine.runners.contract import StopSignal
from worker.handlers.json_text import clean
from worker.ids import RunId
from worker.model.claims import ClaimsRecord
from worker.model.definitions import CANCEL_GRACE
from worker.model.definitions.definition import Definition
from worker.model.egress import Gate
from worker.model.runs.children import FamilyCap
from worker.model.runs.egress import busiest
from worker.model.runs.outcome import EndedAttempt, Trail, summary
from worker.model.runs.run import AdmittedRun, OwnedRun
from worker.secret import AccessToken
from worker.telemetry import tracing
from worker.telemetry.events import emit
from worker.telemetry.masking import masker
from worker.telemetry.secret_forms import parts_of
from worker.telemetry.tracing import StepSpan, Traced, TracedStep, Tracer

T = TypeVar("T")

# Attempts that are remembered as handed back.
MAX_HANDED_BACK = 10_000
# Origins of an attempt that events name when it has ended: metrics tell few apart, and each event takes time.
REPORTED = 20
# Characters of why a request was not sent.
REASON_LIMIT = 200


@dataclass(slots=True, eq=False)
class InflightRun:
    """An admitted run, until its end is written.

    `moved` once the attempt has stored a new checkpoint or step; `storing` are steps that are being
    stored, which a process may leave behind that dies. `scopes` are those that its tokens must have,
    `audiences` those for which it may ask for others, `gate` says what it may reach. `children` are the
    handlers that it may start, `cap` is what those may have. A host knows neither that nor a `plan`, but the
    name of the `definition`. `parent_trace` is the traceparent of the handler that started the run,
    `traced_here` whether this process makes its spans. `masked` are its tokens, and its secrets, which are
    private to the org.
    """

    run: AdmittedRun
    stop: StopSignal
    plan: AttemptPlan | None = None
    org_code: str | None = None
    cancel_grace: timedelta = CANCEL_GRACE
    scopes: frozenset[str] = frozenset()
    audiences: tuple[str, ...] = ()
    gate: Gate | None = None
    children: frozenset[str] = frozenset()
    cap: FamilyCap | None = None
    definition: str | None = None
    parent_trace: str | None = None
    traced_here: bool = True
    moved: bool = False
    storing: set[asyncio.Future[Any]] | None = None
    masked: tuple[tuple[str, bool], ...] = field(default=(), repr=False)

    def begin(self, plan: AttemptPlan) -> None:
        """Keep what the attempt needs to know."""
        self.plan = plan
        self.org_code = plan.org.code
        self.definition = plan.definition.name
        self.cancel_grace = plan.definition.cancel_grace

    def hold(self, token: AccessToken) -> None:
        """Mask a token of this run in all that the worker writes, until `drop_tokens`."""
        if (key := (token.reveal(), False)) not in self.masked:
            masker.hold(token.reveal(), self.run.org_id, is_token=True)
            self.masked += (key,)

    def hold_secrets(self, secrets: Mapping[str, str]) -> None:
        """Mask secrets that the run gets in texts of its org; also the long texts in one that is JSON."""
        for value in secrets.values():
            for text in parts_of(value):
                if (key := (text, True)) not in self.masked:
                    masker.hold(text, self.run.org_id, private=True)
                    self.masked += (key,)

    def drop_tokens(self) -> None:
        """The attempt has ended: all of its output is masked."""
        for text, private in self.masked:
            masker.release(text, self.run.org_id, private=private)
        self.masked = ()

    async def store(self, storing: Coroutine[Any, Any, T]) -> T:
        """The result of storing a step. It goes on if the caller is cancelled: the call was made and paid."""
        return await asyncio.shield(self.keep(storing))

    def keep(self, storing: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin to store something; the end of the attempt waits for it."""
        task = asyncio.ensure_future(storing)
        self.storing = self.storing or set()
        self.storing.add(task)
        task.add_done_callback(self.storing.discard)
        return task

    async def stored(self) -> None:
        """Wait for what is being stored: the attempt's end fences it out, and nothing is masked after it."""
        if self.storing:
            await asyncio.wait(self.storing)

    async def unless_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of `work`, or None as soon as this run is asked to stop."""
        if self.stop.asked:
            work.close()
            return None
        task, interrupted = asyncio.current_task(), False

        def interrupt() -> None:
            nonlocal interrupted
            interrupted = task is not None and task.cancel()

        self.stop.on_request(interrupt)
        try:
            return await work
        except asyncio.CancelledError:
            if interrupted and task is not None and task.uncancel() == 0:
                return None
            raise
        finally:
            self.stop.on_request(None)


class InflightRuns:
    """The runs that this process holds; a later admission of a run replaces the earlier one, and kills it."""

    def __init__(self) -> None:
        self._runs: dict[RunId, InflightRun] = {}
        self._slots: Counter[str] = Counter()
        self._handed_back: OrderedDict[tuple[RunId, int], None] = OrderedDict()

    def hand_back(self, runs: Iterable[OwnedRun]) -> None:
        """These runs wait again: the answer that admits one, if it is still under way, comes too late."""
        for run in runs:
            remember(self._handed_back, (run.id, run.fencing_token), None, MAX_HANDED_BACK)

    def is_late(self, run: AdmittedRun) -> bool:
        """Whether this attempt was handed back before its admission was answered, or is not the newest."""
        held = self._runs.get(run.id)
        is_newer = held is None or held.run.fencing_token < run.fencing_token
        return not is_newer or (run.id, run.fencing_token) in self._handed_back

    def add(self, run: AdmittedRun) -> InflightRun:
        inflight = InflightRun(run, StopSignal())
        if (replaced := self._runs.get(run.id)) is not None:
            replaced.stop.kill()
            self.release(replaced)
        self._runs[run.id] = inflight
        self._slots[run.isolation] += 1
        return inflight

    def release(self, inflight: InflightRun) -> None:
        """Drop a run whose end is written, or that is no longer ours."""
        if self._runs.get(inflight.run.id) is inflight:
            del self._runs[inflight.run.id]
            self._slots[inflight.run.isolation] -= 1

    def get(self, run_id: RunId) -> InflightRun | None:
        return self._runs.get(run_id)

    def used(self, isolation: str) -> int:
        return self._slots[isolation]

    def fencing_tokens(self) -> dict[RunId, int]:
        """The fencing token of each run; thread-safe."""
        return {run_id: inflight.run.fencing_token for run_id, inflight in self._runs.copy().items()}

    def __iter__(self) -> Iterator[InflightRun]:
        return iter(list(self._runs.values()))


class Deadlines:
    """The timeouts of all handlers, over one timer: a timer each would cost more than calling a handler."""

    def __init__(self) -> None:
        self._open: dict[StopSignal, tuple[float, float]] = {}  # due at, and the grace then
        self._timer: asyncio.TimerHandle | None = None

    def add(self, stop: StopSignal, timeout: timedelta, grace: timedelta) -> None:
        """Request a stop after `timeout`, unless discarded before."""
        due_at = asyncio.get_running_loop().time() + timeout.total_seconds()
        self._open[stop] = (due_at, grace.total_seconds())
        if self._timer is None or due_at < self._timer.when():
            self._wake_at(due_at)

    def discard(self, stop: StopSignal) -> None:
        self._open.pop(stop, None)

    def _wake_at(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(at, self._stop_overdue)

    def _stop_overdue(self) -> None:
        self._timer = None
        now, first = asyncio.get_running_loop().time(), float("inf")
        for stop, (due_at, grace) in list(self._open.items()):
            if (due_at := due_at + stop.frozen_seconds(now)) <= now:
                del self._open[stop]
                stop.request("timeout", grace)
            else:
                first = min(first, due_at)
        if self._open:
            self._wake_at(first)


def record_claims(trail: Trail, record: ClaimsRecord, at: datetime) -> None:
    """Record a token's claims."""
    trail.token_ready_at = at
    trail.jti = record.jti
    trail.flags = record.flags
    trail.claims = record.claims
    trail.claims_hash = record.fingerprint


def run_admitted(run: AdmittedRun, plan: AttemptPlan) -> None:
    """Emit `run.admitted`, with the lateness in seconds."""
    emit(
        "run.admitted",
        org=plan.org.code,
        run=run.id,
        definition=plan.definition.name,
        handler=run.handler,
        attempt=run.attempt,
        fencing_token=run.fencing_token,
        lateness=round((run.started_at - run.available_at).total_seconds(), 3),
    )


def run_ended(ended: EndedAttempt, inflight: InflightRun | None) -> None:
    """Emit `run.ended` for an end that is written, and its trace spans if tracing is on."""
    plan = None if inflight is None else inflight.plan
    emit(
        "run.ended",
        org=plan and plan.org.code,
        run=ended.run_id,
        definition=plan and plan.definition.name,
        handler=ended.trail.handler,
        attempt=ended.attempt,
        outcome=ended.outcome,
        state=ended.shown_state,
        reason=ended.reason,
        detail=ended.detail,
        seconds=ended.seconds,
        error_cause=ended.error_cause,
        # `lost` and the like are causes without an error of a handler.
        error_summary=summary(ended.error) if ended.error and ended.state == "failed" else None,
        child=ended.is_child or None,
    )
    for wait in ended.trail.asks if ended.state == "parked" else ():
        emit(
            "run.asks",
            org=plan and plan.org.code,
            run=ended.run_id,
            definition=plan and plan.definition.name,
            attempt=ended.attempt,
            wait=wait,
        )
    for row in busiest(ended.trail.egress, REPORTED):
        emit(
            "egress.counted",
            org=plan and plan.org.code,
            run=ended.run_id,
            attempt=ended.attempt,
            handler=ended.trail.handler,
            origin=row.origin,
            denied=row.denied,
            seconds=row.waited_seconds,
        )
        for status, count in row.by_class().items():
            emit("egress.sent", origin=row.origin, status=status, count=count)
    tracer = tracing.in_use()
    if tracer is not None:
        trace(tracer, ended, inflight)


def egress_denied(inflight: InflightRun, handler: str, origin: str, reason: str) -> None:
    """Emit `egress.denied` for a request that was not sent; `origin` is one of `shown_origin`."""
    run = inflight.run
    emit(
        "egress.denied",
        org=inflight.org_code,
        run=run.id,
        attempt=run.attempt,
        handler=handler,
        origin=masker.mask(origin, run.org_id),
        # More than is shown: what is cut from a secret would not be masked.
        reason=clean(masker.mask(reason[: 2 * REASON_LIMIT], run.org_id), REASON_LIMIT),
    )


def attempt_ended(ended: EndedAttempt, inflight: InflightRun | None) -> None:
    """Emit `attempt.ended`: a host's worker knows what becomes of the run, and emits `run.ended`."""
    emit(
        "attempt.ended",
        org=inflight and inflight.org_code,
        run=ended.run_id,
        handler=ended.trail.handler,
        attempt=ended.attempt,
        outcome=ended.outcome,
        seconds=ended.seconds,
    )


def run_fenced_out(run_id: RunId, attempt: int, fencing_token: int, inflight: InflightRun | None) -> None:
    """Emit `run.fenced_out` for a run that this process held and that another worker owns."""
    org = inflight and inflight.org_code
    emit("run.fenced_out", org=org, run=run_id, attempt=attempt, fencing_token=fencing_token)


def trace(tracer: Tracer, ended: EndedAttempt, inflight: InflightRun | None) -> None:
    marks = tracer.marks(ended.run_id, ended.fencing_token)
    if inflight is None or inflight.plan is None:
        return
    run, plan, trail = inflight.run, inflight.plan, ended.trail
    traced = Traced(
        run_id=run.id,
        attempt=run.attempt,
        fencing_token=run.fencing_token,
        org=plan.org.code,
        issuer=plan.issuer,
        definition=plan.definition.name,
        pipeline=run.handler,
        handler=trail.handler,
        origin=run.origin,
        isolation=run.isolation,
        outcome=ended.outcome,
        state=ended.shown_state,
        reason=ended.reason,
        error_type=_error_type(ended),
        started_at=ended.started_at,
        token_ready_at=trail.token_ready_at,
        ended_at=ended.ended_at,
        flags=_evaluated_flags(
            plan.definition, run, ended, handler_called=marks.handler_began_at is not None
        ),
        parent=inflight.parent_trace,
    )
    tracer.end(traced, marks)


def trace_step(span: StepSpan, inflight: InflightRun) -> None:
    """Make the span of a step of a running attempt; its texts are masked."""
    tracer, run = tracing.in_use(), inflight.run
    if tracer is None or inflight.definition is None:
        return
    org, definition, parent = inflight.org_code or "", inflight.definition, inflight.parent_trace
    tracer.step(TracedStep(run.id, run.attempt, run.fencing_token, org, definition, span, parent))


def _error_type(ended: EndedAttempt) -> str | None:
    """A word of a small set, or the exception's class; never its message, which may contain anything."""
    if ended.outcome == "no_token" and ended.detail:
        return ended.detail.partition(":")[0]
    if ended.outcome == "failed" and ended.reason in ("error", "retry") and ended.error:
        return ended.error["type"]
    return ended.reason if ended.outcome != "timed_out" else "timeout"


def _evaluated_flags(
    definition: Definition, run: AdmittedRun, ended: EndedAttempt, *, handler_called: bool
) -> list[tuple[str, bool]]:
    """The flags that were evaluated, in order, and whether each had the required value."""
    required = definition.requires_flag
    if ended.reason == "flag_off" and required is not None:
        return [(required.name, False)]
    if not handler_called:
        return []
    evaluated = [] if required is None else [(required.name, True)]
    for variant in definition.variants_of(run.origin):
        chosen = variant.handler == ended.trail.handler
        evaluated.append((variant.flag.name, chosen))
        if chosen:
            break
    return evaluated
