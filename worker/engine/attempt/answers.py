"""Answers: what becomes of a call of a running handler, wherever it runs; `handlers/calls.py` has the calls.

A call is admitted if its run is open, no name in it contains a secret and it keeps to the limits; its texts
are masked. Then `Acts` does what it asks: in the worker's database, at the workers behind a host, or in the
memory of a trial.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any, Protocol, TypeVar

from worker.clock import Clock
from worker.engine.attempt.inflight import InflightRun, egress_denied
from worker.engine.attempt.run_log import RunLogWriter
from worker.engine.runners.contract import GivenErrors
from worker.errors import LeaseLost, TokenRefused, Unavailable, WorkerError
from worker.handlers.calls import (
    A,
    AskBudgets,
    AskToken,
    Call,
    CountSpend,
    NotACall,
    OneWayCall,
    OpenWait,
    Progress,
    Save,
    StartChildren,
    StepTotals,
    StoreStep,
    TraceStep,
)
from worker.handlers.span_parts import cut
from worker.handlers.steps import NAME_LIMIT, TOTAL_FULL, TOTAL_LIMIT, StepError
from worker.handlers.waits import SLEEP
from worker.model.batches import wait_name
from worker.model.runs.budgets import OrgBudgets, decisive, wait_of
from worker.model.runs.egress import MAX_ORIGINS, MAX_REASON, merge, row_of, shown_origin
from worker.model.runs.outcome import Trail
from worker.model.runs.run import AdmittedRun, NewStep, step_label
from worker.model.runs.waits import BATCH, BUDGET, MAX_WAITS, NewWait, WaitState
from worker.telemetry.mask_in_turn import mask_each
from worker.telemetry.tracing import MAX_REPLAYED, MAX_STEPS, Detail, StepSpan

# Seconds between two tries of a call while the database is away, at first and at most.
RETRY = 0.1
LONGEST_RETRY = 2.0
# Characters of a checkpoint that is parsed to compare it with the last one; that holds the interpreter lock.
COMPARED = 32 * 1024
# Characters of the texts of an attempt's spans, and seconds that one may take to be made.
MAX_SPAN_TEXTS = 1024 * 1024
TRACED_WITHIN = 5.0

C = TypeVar("C", bound=Call[Any])

_log = logging.getLogger(__name__)


class Acts(Protocol):
    """Does what a running handler asks; with `reports_denials` this process emits `egress.denied`."""

    @property
    def reports_denials(self) -> bool: ...

    async def act(self, call: Call[A], of: Running) -> A:
        """Do what an admitted call asks.

        Raises:
            LeaseLost: the run is no longer ours.
            Unavailable: not now; the database or the workers are away.
            TokenRefused, TokenError: there is no token for the run.
        """


@dataclass(eq=False, slots=True)
class StepRoom:
    """What the steps of a run have taken: the places up to `last` and those in `sizes`, and `size` bytes."""

    last: int
    size: int
    sizes: dict[int, int] = field(default_factory=dict)

    def take(self, step: NewStep, size: int, *, resent: bool) -> None:
        """Take the place of a step. Raises StepError.

        One that may be `resent` takes its place again, and may be counted twice.
        """
        if not resent and (step.seq <= self.last or step.seq in self.sizes):
            raise StepError(f"step {step.name}: place {step.seq} is taken by another step")
        total = self.size + size - self.sizes.get(step.seq, 0)
        if total > TOTAL_LIMIT + (size if resent else 0):
            raise StepError(f"step {step.name}: {TOTAL_FULL}")
        self.size = total
        self.sizes[step.seq] = size


@dataclass(eq=False, slots=True)
class SpanRoom:
    """How many spans and events, and characters of texts, an attempt may still report: it may lie."""

    detail: Detail
    steps: int = MAX_STEPS
    replayed: int = MAX_REPLAYED
    texts: int = MAX_SPAN_TEXTS

    @classmethod
    def of(cls, detail: Detail) -> SpanRoom | None:
        """None if nothing is to be reported."""
        return None if detail == "none" else cls(detail)

    def take(self, span: StepSpan) -> StepSpan | None:
        """The span as far as there is room for it."""
        kind = "replayed" if span.replayed else "steps"
        left = getattr(self, kind)
        if not left:
            return None
        setattr(self, kind, left - 1)
        size = sum(map(len, span.texts.values()))
        if self.detail == "steps" or size > self.texts:
            return replace(span, key=None, texts={})
        self.texts -= size
        return span


@dataclass(eq=False, repr=False)
class Running:
    """An attempt whose handler may call, on a worker, on a host or in a trial. It is its `RunServices`.

    `host` is the incarnation of the host that runs it, on the workers' side; it may send a call again.
    `resumed` if another process may have answered calls of this attempt. `refused` is the error of a token
    that was refused.
    """

    inflight: InflightRun
    trail: Trail
    acts: Acts
    run_log: RunLogWriter
    clock: Clock
    checkpoint: Any = None
    host: str | None = None
    resumed: bool = False
    errors: GivenErrors = field(default_factory=GivenErrors, init=False)
    refused: TokenRefused | None = field(default=None, init=False)
    closed: bool = field(default=False, init=False)
    room: StepRoom | None = field(default=None, init=False)
    # The waits in `trail.asks`, with their occurrences.
    asked: set[tuple[str, int]] = field(default_factory=set, init=False)
    # What its handler may report of its steps; None if nothing.
    spans: SpanRoom | None = None
    # Why requests were not sent, by origin.
    denials: dict[str, str] = field(default_factory=dict, init=False)

    @property
    def run(self) -> AdmittedRun:
        return self.inflight.run

    @property
    def org_id(self) -> str:
        return self.run.org_id

    @property
    def hosted(self) -> bool:
        """Whether a host runs it, and this is a worker."""
        return self.host is not None

    async def ask(self, call: Call[A]) -> A:
        """The answer to a call of the handler, as `answer`."""
        return await answer(call, self)

    def tell(self, notice: OneWayCall) -> None:
        """Take what the handler tells. Raises LeaseLost."""
        self.check_open()
        if isinstance(notice, Progress):
            # Masked when it is written: a run may report its progress thousands of times a second.
            self.trail.progress = progress = asdict(notice)
            self.run_log.progress(self.run, progress)
        elif isinstance(notice, TraceStep):
            span = None if self.spans is None else self.spans.take(notice.span)
            if span is not None:
                self.inflight.keep(self._trace(believed_span(span, self.run, self.clock.now())))

    async def _trace(self, span: StepSpan) -> None:
        """Make a span, or have it made; it is dropped if that takes too long."""
        with suppress(TimeoutError, WorkerError, StepError):
            async with asyncio.timeout(TRACED_WITHIN):
                masked = await _masked(TraceStep(span), self)
                await self.acts.act(TraceStep(cut(masked.span)), self)

    def log(self, level: str, source: str, text: str, at: datetime | None = None) -> None:
        self.run_log.line(self.run, level, source, text, at)

    def started(self) -> None:
        self.trail.handler_started_at = self.clock.now()

    def used(self, peak_memory: int) -> None:
        self.trail.peak_memory = peak_memory

    def egress(self, rows: Sequence[Mapping[str, Any]]) -> None:
        try:
            sent = merge(map(row_of, rows))
            self.trail.egress = tuple(replace(row, reason=self.denials.get(row.origin, "")) for row in sent)
        except (ValueError, TypeError, KeyError) as error:
            _log.warning("what run %s sent is not recorded: %s", self.run.id, error)

    def denied(self, origin: str, reason: str) -> None:
        origin = shown_origin(origin)
        if origin not in self.denials and len(self.denials) < MAX_ORIGINS:
            self.denials[origin] = reason = reason[:MAX_REASON]
            if self.acts.reports_denials:
                egress_denied(self.inflight, self.trail.handler, origin, reason)

    def close(self) -> None:
        self.closed = True

    def check_open(self) -> None:
        """Raise LeaseLost once the run has ended or is no longer ours."""
        if self.closed or self.inflight.stop.killed:
            raise LeaseLost("the run has ended")


async def answer(call: Call[A], of: Running) -> A:
    """The answer to a call of a running handler. It is repeated while the database is away, if it waits.

    Raises:
        LeaseLost: the run is no longer ours, or has ended.
        StepError: a name in it contains a secret or is reserved, or the run has reached a limit.
        TokenRefused: the org's token must not be used; the run ends refused.
        TokenError, Unavailable: not now.
        NotACall: it is not one of this attempt.
    """
    try:
        made = await admitted(call, of)
        taken: A = _taken(call, made, await _acted(made, of), of)
        return taken
    except NotACall:
        raise
    except TokenRefused as refused:
        of.refused = refused
        of.inflight.stop.kill()
        # The org can read what its handler logs, so this must not name the other org.
        raise TokenRefused(refused.reason, refused.detail) from None
    except (WorkerError, StepError) as error:
        of.errors.note(error)
        raise
    except Exception as error:
        # Of the store: the handler may only know that its call failed.
        _log.exception("the call %s of run %s failed", call.way.name, of.run.id)
        # Not in a variable of this frame, which its traceback has: a flood of such cycles costs collections.
        raise _not_now(error, of) from None


def _not_now(error: Exception, of: Running) -> Unavailable:
    unavailable = Unavailable(f"not possible now ({type(error).__name__})")
    of.errors.note(unavailable)
    return unavailable


async def admitted(call: C, of: Running) -> C:
    """The call as it may be acted on. Raises LeaseLost, StepError, NotACall."""
    of.check_open()
    made: C = await _believed(await _masked(call, of), of)
    return made


async def _masked(call: C, of: Running) -> C:
    """The call with its texts masked. Raises StepError if a name contains a secret."""
    row, org = call.row, of.run.org_id
    names, texts = list(row.names(call)), list(row.texts(call))
    if not names and not texts:
        return call
    plain = [name for _, name in names] + texts
    masked = await mask_each([(text, org) for text in plain])
    if masked == plain:
        return call
    masks = dict(zip(plain, masked, strict=True))
    for what, name in names:
        if name != masks[name]:
            raise StepError(f"{what} {masks[name]}: it contains a secret; use another")
    made: C = row.masked(call, masks.__getitem__)
    return made


async def _acted(call: Call[A], of: Running) -> A:
    work = _repeated(call, of)
    return await (of.inflight.store(work) if call.way.kept else work)


async def _repeated(call: Call[A], of: Running) -> A:
    pause = RETRY
    while True:
        of.check_open()
        try:
            return await of.acts.act(call, of)
        except LeaseLost:
            of.inflight.stop.kill()
            raise
        except Unavailable:
            # A run that is being cancelled starts no others, however often it asks.
            is_refused = isinstance(call, StartChildren) and of.inflight.stop.reason not in (None, "drain")
            if of.hosted or not call.way.waits or is_refused:
                raise
        await asyncio.sleep(pause)
        pause = min(pause * 2, LONGEST_RETRY)


# What a call may not say, and limits beyond those of its fields.


async def _believed(call: Any, of: Running) -> Any:
    match call:
        case StoreStep(step):
            await _take_room(step, of)
            believed = believed_step(step, of.run, of.clock.now())
            return call if believed is step else StoreStep(believed)
        case OpenWait(wait):
            return OpenWait(await believed_wait(wait, of))
        case CountSpend():
            check_attempt(call, of)
        case StartChildren(children) if of.inflight.plan is not None:
            for child in children:
                if child.handler not in of.inflight.children:
                    raise NotACall(f"handler: {child.handler} is not in children of @job")
            # It is there whatever becomes of the process.
            of.inflight.moved = True
        case AskToken(audience=audience, resource=resource) if audience or resource:
            if (audience or resource) not in of.inflight.audiences or (audience and resource):
                raise NotACall("audience: it is not one of the definition's audiences")
    return call


async def _take_room(step: NewStep, of: Running) -> None:
    """Take the place of a step among those of its run. Raises StepError."""
    if of.room is None:
        last = size = 0
        if of.run.may_have_checkpoint or of.resumed:
            last, size = await _acted(StepTotals(), of)
        of.room = of.room or StepRoom(last, size)
    of.check_open()
    of.room.take(step, len(step.result_json.encode()), resent=of.hosted)
    # Before it is stored: the process may die first.
    of.inflight.moved = True


def check_attempt(spend: CountSpend, of: Running) -> None:
    """Raise NotACall for a spend of an earlier attempt, which has counted already."""
    if spend.key.partition(":")[0] != str(of.run.attempt):
        raise NotACall("key: it is of another attempt")


def believed_span(span: StepSpan, run: AdmittedRun, now: datetime) -> StepSpan:
    """The span with its times within those of its attempt."""
    started_at, ended_at = _within_attempt(span.started_at, span.ended_at, run, now)
    return replace(span, started_at=started_at, ended_at=ended_at)


def believed_step(step: NewStep, run: AdmittedRun, now: datetime) -> NewStep:
    """The step with its times within those of its attempt: what a process or a host says is a claim."""
    started_at, ended_at = _within_attempt(step.started_at, step.ended_at, run, now)
    if (started_at, ended_at) == (step.started_at, step.ended_at):
        return step
    return replace(step, started_at=started_at, ended_at=ended_at)


def _within_attempt(
    started_at: datetime, ended_at: datetime, run: AdmittedRun, now: datetime
) -> tuple[datetime, datetime]:
    earliest = min(run.started_at, now)
    ended_at = max(earliest, min(ended_at, now))
    return max(earliest, min(started_at, ended_at)), ended_at


async def believed_wait(wait: NewWait, of: Running) -> NewWait:
    """The wait as it may be stored: an operator answers the question of a budget, which is the worker's own.

    A wait for a budget that does not stop the run is over at once: the budget may just have been raised.

    Raises:
        StepError: the name is reserved for waits of another kind.
    """
    of_budget = wait.name.startswith(BUDGET)
    if wait.kind == "budget" and of_budget:
        found = _allowed(await _acted(AskBudgets(), of), of)
        state = decisive([state for state in found.states if wait.name == f"{BUDGET}{state.meter}"])
        if state is None or state.at_limit == "fail":
            return replace(wait, seconds=0.0, ask_json=None, alert=False)
        return wait_of(state, wait.occurrence, of.clock.now())
    if wait.request is not None:
        request, plan = wait.request, of.inflight.plan
        if of.hosted or (plan is not None and plan.definition.model_requests != "batch"):
            raise NotACall("request: the model requests of this run go into no batches")
        # There is one wait for a step, whatever its process calls it.
        name = wait_name(request.step, request.key or "")
        return NewWait(name, request.occurrence, "batch", request=request)
    if wait.name.startswith(BATCH):
        raise StepError(f"wait {wait.name}: this name is reserved; use another one")
    if wait.kind == "budget" or (wait.kind == "answer" and (of_budget or wait.name == SLEEP)):
        raise StepError(f"wait {wait.name}: this name is reserved; use another one")
    return wait


# What follows from an answer.


def _taken(call: Any, made: Call[Any], given: Any, of: Running) -> Any:
    """The answer for the handler to a call as it came and as it was made, noted for the attempt."""
    match made:
        case Save() if not of.hosted:
            of.inflight.moved = of.inflight.moved or _differs(call.data, of.checkpoint)
        case StoreStep(step):
            return None if step.result_json == call.step.result_json else step.result_json
        case OpenWait(wait):
            _note_alert(wait, given, of)
        case AskToken():
            of.inflight.hold(given[0])
        case AskBudgets() | CountSpend():
            return _allowed(given, of)
    return given


def _differs(data_json: str, checkpoint: Any) -> bool:
    """Whether a checkpoint is another one than the attempt began with; a large one counts as such."""
    if len(data_json) > COMPARED or checkpoint is None:
        return data_json != "null"
    return bool(json.loads(data_json) != checkpoint)


def _note_alert(wait: NewWait, given: WaitState, of: Running) -> None:
    key = wait.name, wait.occurrence
    # A handler may open a wait as often as it likes; the store limits how many there are.
    if wait.alert and given.state == "pending" and key not in of.asked and len(of.asked) < MAX_WAITS:
        of.asked.add(key)
        # Each question has an alert of its own. With its number, it is still as long as a name may be.
        name = wait.name[: NAME_LIMIT - len(f"#{MAX_WAITS}")]
        of.trail.asks += (step_label(name, None, wait.occurrence),)


def _allowed(found: OrgBudgets, of: Running) -> OrgBudgets:
    """The budgets, if the org's newest token has the limits of all. Raises TokenRefused, not for a host."""
    if found.missing is not None:
        refused = TokenRefused("property_missing", found.missing)
        if not of.hosted:
            raise refused
        # The host ends the run itself.
        of.refused = refused
    return found
