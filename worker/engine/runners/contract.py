"""Runner contract: the work of one attempt, what its handler may ask of the worker, and how it is stopped."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any, Literal, Protocol, TypeVar

from worker.clock import Clock
from worker.errors import LeaseLost, TokenError, Unavailable
from worker.guard.claims import Claims
from worker.handlers.calling import TOKEN_PAUSE
from worker.handlers.calls import Port
from worker.handlers.given import Given, HeldToken, Org, State, ThisRun
from worker.handlers.job import Job
from worker.handlers.models import HandlerMissing, read_checkpoint, read_params, read_settings
from worker.ids import RunId
from worker.model.batches import ModelApi
from worker.model.egress import OPEN_EGRESS, BoundSecret, Egress
from worker.model.runs import outcome as outcomes
from worker.model.runs.budgets import BudgetState
from worker.model.runs.outcome import Error, Failed, Outcome
from worker.secret import AccessToken
from worker.telemetry.tracing import Detail

# Maximum pause of a run without a token, in seconds: a new secret may fix it at any time.
LONGEST_PAUSE = 60.0

StopReason = Literal["drain", "cancel", "timeout", "suspended", "replaced", "closed", "parent"]
LEASE_LOST = outcomes.Lost("the lease on the run is lost")


@dataclass(slots=True)
class Work:
    """Everything a handler needs for one attempt, and nothing of another org. Immutable by convention.

    `entry_point` is `module:attribute`, `memory` a cap in bytes, `checkpoint` from the previous attempt;
    `replays` if earlier attempts may have stored steps. `state` is that of the definition, or None if the
    handler does not declare one. `budgets` are those of the org that may stop it, None without any.
    `secrets` are those of the org that the handler declares, by name: a value, or the placeholder of one of
    the `bound`, which only the broker gets. `egress` is what the run may reach, `traces` what it reports of
    its steps. `model_apis` are those of `[batches]`; with `batched` its model requests go into batches.
    """

    run_id: RunId
    attempt: int
    fencing_token: int
    idempotency_key: str
    scheduled_for: datetime
    org_code: str
    org_name: str
    handler: str
    entry_point: str
    params: Mapping[str, Any]
    claims: Claims = field(repr=False)
    token: AccessToken = field(repr=False)
    api_origins: tuple[str, ...]
    timeout_at: datetime
    checkpoint: Any = field(default=None, repr=False)
    memory: int | None = None
    traceparent: str | None = None
    traces: Detail = "none"
    private_origins: tuple[str, ...] = ()
    insecure_origins: tuple[str, ...] = ()
    replays: bool = False
    state: Mapping[str, Any] | None = field(default=None, repr=False)
    api_base_url: str = ""
    budgets: tuple[BudgetState, ...] | None = None
    meter_usage: bool = False
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    egress: Egress = OPEN_EGRESS
    bound: tuple[BoundSecret, ...] = field(default=(), repr=False)
    model_apis: tuple[ModelApi, ...] = ()
    batched: bool = False

    @property
    def clear_secrets(self) -> Mapping[str, str]:
        """The secrets that the run gets in clear. Placeholders are not masked: a step may store them."""
        placeholders = {each.placeholder for each in self.bound}
        return {name: text for name, text in self.secrets.items() if text not in placeholders}

    def given(self, job: Job, log: logging.Logger, clock: Clock) -> Given[Any, Any]:
        """What the handler's context is made of.

        Raises ParamsInvalid, SettingsInvalid, CheckpointInvalid, and HandlerMissing for another handler than
        the worker knows.
        """
        if job.state and self.state is None:
            raise HandlerMissing(
                f"{job.name} declares state, but did not when this worker read it: restart it"
            )
        if lacking := job.secrets - self.secrets.keys():
            raise HandlerMissing(
                f"{job.name} declares the secret {min(lacking)}, but did not when this worker read it: "
                "restart it"
            )
        return Given(
            org=Org(self.org_code, self.org_name),
            run=ThisRun(
                self.run_id, self.scheduled_for, self.attempt, self.fencing_token, self.idempotency_key
            ),
            params=read_params(job, self.params),
            settings=read_settings(job, self.claims.properties),
            checkpoint=read_checkpoint(job, self.checkpoint),
            deadline=self.timeout_at,
            api_origins=self.api_origins,
            log=log,
            held=HeldToken(self.token, self.claims, clock),
            traceparent=self.traceparent,
            traces=self.traces,
            private_origins=self.private_origins,
            insecure_origins=self.insecure_origins,
            replays=self.replays,
            job=job,
            state=State(self.state) if job.state and self.state is not None else None,
            api_base_url=self.api_base_url,
            budgets=self.budgets,
            meter_usage=self.meter_usage,
            secrets={name: self.secrets[name] for name in job.secrets},
            audiences=self.egress.audiences,
            model_apis=self.model_apis,
            batched=self.batched,
        )


@dataclass(slots=True)
class GivenErrors:
    """The errors that the worker gave to the handler of an attempt, the newest of each kind."""

    no_token: TokenError | Unavailable | None = None
    lost: LeaseLost | None = None

    def note(self, error: BaseException) -> None:
        if isinstance(error, TokenError | Unavailable):
            self.no_token = error
        elif isinstance(error, LeaseLost):
            self.lost = error


class RunServices(Port, Protocol):
    """What a running handler may ask of the worker, for its own run. Used on the worker's loop."""

    @property
    def errors(self) -> GivenErrors:
        """What of it was answered with an error."""

    @property
    def org_id(self) -> str:
        """The id of the run's org."""

    def log(self, level: str, source: str, text: str, at: datetime | None = None) -> None:
        """Add a line to the run's log; `source` is log, stdout or stderr, `at` defaults to now."""

    def started(self) -> None:
        """Params and settings are valid; the handler is about to be called."""

    def used(self, peak_memory: int) -> None:
        """Record the peak memory of the run's process, in bytes."""

    def egress(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record what the attempt has sent so far, by origin; later totals replace earlier ones.

        The rows are JSON with the fields of `EgressRow`, as the broker counted them.
        """

    def denied(self, origin: str, reason: str) -> None:
        """Report a request that was not sent, since the run may not reach its origin."""

    def close(self) -> None:
        """Reject further calls of the handler with LeaseLost: its run has ended."""


class Runner(Protocol):
    """Where handlers run: in child processes, or inline in the worker's loop."""

    async def run(self, work: Work, services: RunServices, stop: StopSignal) -> Outcome:
        """Run the handler to its end. Its processes are gone afterwards."""


class Interrupted(BaseException):
    """Raised in a blocking handler at half the grace, so that it can clean up."""


class StopSignal:
    """Ends one attempt early. The first reason stays; a later request can only shorten the grace.

    Used on the worker's loop, whose clock is that of `interrupt_at` and `kill_at`.
    """

    # Defaults of the class: few runs are ever asked to stop.
    reason: StopReason | None = None
    interrupt_at = kill_at = float("inf")
    asked = killed = False
    _killer: Callable[[], None] | None = None
    _listener: Callable[[], None] | None = None
    _frozen_since: float | None = None
    _frozen = 0.0

    @cached_property
    def requested(self) -> asyncio.Event:
        """Set at the first request or kill. Lazy: most runs never await it."""
        event = asyncio.Event()
        if self.asked:
            event.set()
        return event

    @cached_property
    def _changed(self) -> asyncio.Event:
        return asyncio.Event()

    def request(self, reason: StopReason, grace: float) -> None:
        """Ask the handler to end: notified now, interrupted after half of `grace` seconds, then killed."""
        now = asyncio.get_running_loop().time()
        self.reason = self.reason or reason
        if now + grace < self.kill_at:
            self.kill_at = now + grace
            self.interrupt_at = min(self.interrupt_at, now + grace / 2)
        self._request()

    def kill(self) -> None:
        """End it now, without notice: the lease is lost, and the caller drops the outcome."""
        self.killed = True
        self.kill_at = self.interrupt_at = float("-inf")
        if self._killer is not None:
            self._killer()
        self._request()

    def on_request(self, listener: Callable[[], None] | None) -> None:
        """Set the listener for the first request or kill, or call it now; cheaper than a waiting task."""
        self._listener = listener
        if listener is not None and self.asked:
            listener()

    def on_kill(self, killer: Callable[[], None]) -> None:
        """Call `killer` within `kill`, before anything can thaw the run."""
        self._killer = killer
        if self.killed:
            killer()

    def _request(self) -> None:
        first, self.asked = not self.asked, True
        self.requested.set()
        self._changed.set()
        if first and self._listener is not None:
            self._listener()

    async def escalate(self, notify: Callable[[str], object], interrupt: Callable[[], object]) -> None:
        """After a request: notify the handler, interrupt it at half the grace, return when that is over."""
        loop, interrupted = asyncio.get_running_loop(), False
        if self.reason is not None:
            notify(self.reason)
        while (now := loop.time()) < self.kill_at:
            if now >= self.interrupt_at and not interrupted:
                interrupted = True
                interrupt()
            delay = (self.kill_at if interrupted else self.interrupt_at) - loop.time()
            try:
                async with asyncio.timeout(None if delay == float("inf") else max(delay, 0)):
                    await self._changed.wait()
                self._changed.clear()
            except TimeoutError:
                continue

    def freeze(self, at: float) -> None:
        self._frozen_since = self._frozen_since or at

    def thaw(self, at: float) -> None:
        if self._frozen_since is not None:
            self._frozen += max(at - self._frozen_since, 0.0)
            self._frozen_since = None

    def frozen_seconds(self, now: float) -> float:
        """Seconds that the run was frozen up to `now`; they do not count against its timeout."""
        current = 0.0 if self._frozen_since is None else max(now - self._frozen_since, 0.0)
        return self._frozen + current


def stop_reason_of(cancel_reason: str) -> StopReason:
    """Why a run stops whose cancellation was requested so."""
    match cancel_reason:
        case "suspended" | "replaced" | "closed" | "parent":
            return cancel_reason
        case _:
            return "cancel"


Stopped = outcomes.Cancelled | outcomes.HandedBack | outcomes.Lost | outcomes.TimedOut


def outcome_of_stop(stop: StopSignal) -> Stopped:
    match stop.reason:
        case None:
            return outcomes.Lost("no longer ours")
        case "timeout":
            return outcomes.TimedOut(
                Error("TimeoutError", "the run's timeout passed before its handler returned")
            )
        case "drain":
            return outcomes.HandedBack()
        case "cancel":
            return outcomes.Cancelled("requested")
        case reason:
            return outcomes.Cancelled(reason)


# The reasons of a failure that the process of a run decides.
OWN_FAILURES = frozenset({"error", "result_invalid", "out_of_memory", "budget"})
FORGED = "it reported what only the worker decides"


def after_handler(reported: Outcome, stop: StopSignal, errors: GivenErrors) -> Outcome:
    """The outcome of an attempt whose handler, or the process that it runs in, reported one."""
    return after_stop(believed(reported, stop, errors), stop)


def is_own(reported: Outcome) -> bool:
    """Whether the process of a run alone decides this outcome."""
    match reported:
        case outcomes.Succeeded() | outcomes.Retried() | outcomes.Snoozed() | outcomes.Parked():
            return True
        case outcomes.NoHandler() | outcomes.Refused("settings_invalid") | outcomes.Cancelled("by_handler"):
            return True
        case Failed(reason=reason):
            return reason in OWN_FAILURES
    return False


def believed(reported: Outcome, stop: StopSignal, errors: GivenErrors) -> Outcome:
    """A reported outcome, if the process of a run may report it: what it says is a claim.

    It decides whether it succeeded, when to be called again, and that its settings are wrong. What only the
    worker can know has to be so: that it asked for a stop, or that it gave an error, whose pause is the
    worker's. Otherwise a handler could forge a refused token, be called again at once without being counted,
    or wait for years as a run without a token. Anything else is `handler_exited`.
    """
    if is_own(reported):
        return reported
    match reported:
        case outcomes.Cancelled(reason) if stop.reason is not None:
            asked = outcome_of_stop(stop)
            if isinstance(asked, outcomes.Cancelled) and asked.reason == reason:
                return reported
        case outcomes.HandedBack() if stop.reason == "drain":
            return reported
        case outcomes.HandedBack():
            return handler_exited("it handed back without a drain")
        case outcomes.NoToken() if (error := errors.no_token) is not None:
            seconds = TOKEN_PAUSE.total_seconds() if error.retry_after is None else error.retry_after
            return outcomes.NoToken(timedelta(seconds=min(seconds, LONGEST_PAUSE)), error.code)
        case outcomes.NoToken():
            return handler_exited("it reported that it has no token, without such an error of the worker")
        case outcomes.Lost() if (lost := errors.lost) is not None:
            return outcomes.Lost(lost.message)
    return handler_exited(FORGED)


def after_stop(returned: Outcome, stop: StopSignal) -> Outcome:
    """What a handler returned, unless it was asked to stop and did not really finish.

    An error may come from the interruption. Retry, snooze and a park count only as the answer to a drain.
    """
    if stop.reason is None:
        return returned
    match returned:
        case outcomes.Succeeded() | outcomes.Cancelled() | outcomes.Refused() | Failed(permanent=True):
            return returned
        case outcomes.Retried() | outcomes.Snoozed() | outcomes.Parked() if stop.reason == "drain":
            return returned
        case _:
            return outcome_of_stop(stop)


def handler_exited(detail: str) -> Failed:
    error = Error("HandlerExited", f"the handler ended without a result: {detail}")
    return Failed(error, "handler_exited", detail)


T = TypeVar("T")


def start_task(
    work: Coroutine[Any, Any, T], *, name: str | None = None, context: contextvars.Context | None = None
) -> asyncio.Task[T]:
    """Start a task; eagerly from Python 3.12 on.

    It may then be done on return, which saves a third of an inline run.
    """
    loop = asyncio.get_running_loop()
    if sys.version_info >= (3, 12):
        return asyncio.Task(work, loop=loop, name=name, context=context, eager_start=True)
    return loop.create_task(work, name=name, context=context)
