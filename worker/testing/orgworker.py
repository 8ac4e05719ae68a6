"""Orgworker: runs a handler in a test as a worker would, attempt after attempt."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Literal, TypeVar

import httpx

from worker.engine.attempt.plan import NetworkPolicy
from worker.engine.attempt.tools import GivenSecrets
from worker.engine.runners.contract import Runner
from worker.engine.trial import LIFETIME, Subject, Trial, definition_of
from worker.engine.trial_children import Family
from worker.errors import NotFound, UsageError, WorkerError
from worker.handlers.catalogue import HandlerEntry
from worker.handlers.describe import offer_of
from worker.handlers.installed import distributions
from worker.handlers.job import Job
from worker.handlers.models import load
from worker.handlers.results import Duration, as_timedelta
from worker.ids import OrgId, new_id
from worker.model.bindings import in_clear
from worker.model.orgs import OrgRef
from worker.model.runs.children import FamilyCap, NewChild
from worker.model.runs.outcome import EndedAttempt
from worker.model.runs.run import Isolation
from worker.testing.clock import LeapingLoop, SettableClock
from worker.testing.faults import Fault, FaultInjector, FaultyTokens
from worker.testing.runners import Api, InProcess, RecordingApi, in_child

T = TypeVar("T")

ORG = "org_test"
API_ORIGIN = "https://api.example.com"
ATTEMPTS = 10
ISOLATION: Mapping[str, Isolation] = {"here": "inline", "child": "child"}


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of the run's log, with secrets masked."""

    attempt: int
    """The attempt that wrote it, from 1."""
    level: str
    """`debug`, `info`, `warning`, `error` or `critical`; what is printed is `info`."""
    text: str
    """The line itself."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt of the run."""

    number: int
    """From 1."""
    handler: str
    """The handler that was selected: the definition's, or a variant's."""
    outcome: str
    """How it ended, as in `runs show`: `succeeded`, `failed`, `lost`, `handed_back`, …"""
    state: str
    """The run's state after it: `waiting`, or the final one."""
    reason: str | None
    """The reason for that state."""
    detail: str | None
    """What the reason refers to, such as the name of a property."""
    error: Mapping[str, str] | None
    """What went wrong: `type`, `message` and `trace`."""
    started_at: datetime
    """Start time, by the test's clock."""
    ended_at: datetime
    """End time, by the test's clock."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step whose result is stored."""

    name: str
    """As passed to `ctx.step` or `ctx.map`."""
    key: str | None
    """The key passed with it; of an item without a key, a digest of the item."""
    occurrence: int
    """Which use of that name and key it is, from 1."""
    attempt: int
    """The attempt that called the function."""
    result: Any
    """What the function returned, after a round trip through JSON, with secrets masked."""


@dataclass(frozen=True, slots=True)
class Wait:
    """A sleep, or a wait for an answer."""

    name: str
    """As passed to `ctx.wait_for`; `sleep` for a sleep without a name."""
    occurrence: int
    """Which wait of that name it is, from 1."""
    kind: str
    """`sleep` or `answer`."""
    ask: Any
    """What the handler asked."""
    options: tuple[str | int | float | bool | None, ...] | None
    """The only answers that it takes; None for any."""
    until: datetime | None
    """Its deadline by the test's clock; None without one."""
    answered: bool
    """Whether it was answered."""
    answer: Any
    """The answer, as the handler got it."""
    timed_out: bool
    """Whether its deadline passed without an answer; of a sleep, whether it is over."""


@dataclass(frozen=True, slots=True)
class FinishedChild:
    """A child of the run, after its last attempt."""

    handler: str
    """As passed to `ctx.start`."""
    key: str | None
    """The key passed with it."""
    occurrence: int
    """Which use of that handler and key it is, from 1."""
    params: Mapping[str, Any]
    """Its params."""
    state: str | None
    """The final state; None if it was not run, since its parent waited for nothing."""
    reason: str | None
    """The reason for it."""
    result: Any
    """What its handler returned."""
    error: Mapping[str, str] | None
    """What went wrong: `type`, `message` and `trace`."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The run after its last attempt, with the values of `runs show`."""

    state: str
    """The final state; `waiting` if the test allowed too few attempts."""
    reason: str | None
    """The reason for it; None for `succeeded`."""
    detail: str | None
    """What the reason refers to, such as the missing scope."""
    result: Any
    """What the handler returned, after a round trip through JSON."""
    error: Mapping[str, str] | None
    """What went wrong: `type`, `message` and `trace`."""
    checkpoint: Any
    """The last checkpoint."""
    definition_state: Mapping[str, Any]
    """The state of the definition afterwards; `{}` if its handler has none."""
    steps: tuple[Step, ...]
    """The stored steps, in the order in which they were stored."""
    children: tuple[FinishedChild, ...]
    """The runs that it started, in order."""
    waits: tuple[Wait, ...]
    """What the run slept and waited for, in the order in which it did."""
    spends: Mapping[str, int]
    """What the run spent, by meter."""
    progress: Mapping[str, Any] | None
    """The last progress: `done`, `total` and `note`."""
    attempts: tuple[Attempt, ...]
    """All attempts, in order."""
    logs: tuple[LogLine, ...]
    """Lines written to `ctx.log`; in a child process also other logging and output."""
    requests: tuple[httpx.Request, ...] = field(repr=False)
    """The requests that reached the test's `api`."""


class Orgworker:
    """Runs handlers in a test; all runs share `clock`."""

    def __init__(self) -> None:
        self.clock = SettableClock()

    def run(
        self,
        handler: Job | str,
        *,
        org: str = ORG,
        params: Mapping[str, Any] | None = None,
        properties: Mapping[str, Any] | None = None,
        flags: Mapping[str, Any] | None = None,
        scopes: Sequence[str] | None = None,
        api: Api | None = None,
        api_origins: Sequence[str] = (API_ORIGIN,),
        private_origins: Sequence[str] = (),
        hosts: Mapping[str, str] | None = None,
        definition: Mapping[str, Any] | None = None,
        variants: Iterable[Job] = (),
        children: Iterable[Job] = (),
        checkpoint: Any = None,
        state: Mapping[str, Any] | None = None,
        answers: Mapping[str, Any] | None = None,
        budgets: Mapping[str, Any] | None = None,
        secrets: Mapping[str, str] | None = None,
        faults: Iterable[Fault] = (),
        attempts: int = ATTEMPTS,
        token_lifetime: Duration = LIFETIME,
        place: Literal["here", "child"] = "here",
    ) -> Finished:
        """Run a handler, or the installed one of that name, until its run has ended.

        The token has `org`, `properties`, `flags` and `scopes`, by default all that the handler
        requires. `api` responds to `ctx.http`: a function of the request, an ASGI app, or an
        httpx transport; only `api_origins` get the token. `ctx.public_http` checks addresses:
        `hosts` sets those that are not public, and `private_origins` are exempt. A request to what
        the handler does not list as `egress` is denied, as by the broker. `definition`
        has more keys, as in a file for `apply`; `variants` are handlers that it names and that
        are not installed, `children` those that the run starts. Those run while it waits for them.
        `checkpoint` is that of an earlier run, `state` that of the definition.
        `budgets` has a limit by meter, at which the run fails, or keys as in a file for `apply`.
        `secrets` has the org's secrets by name.
        While the run waits or sleeps, the clock advances and another attempt starts, at most
        `attempts` in all. `answers` are given by the name of the wait, or as `name#2`, once the run
        waits for them; a wait without one times out, or the run stays `waiting`. With
        `place="child"` the run has its own process, as in a worker, and cannot reach `api`.

        Raises:
            NotFound: no installed distribution has a handler of that name.
            UsageError: an answer is not among the options of its wait, or its name is misspelt.
            DefinitionError: a key of `definition` is unknown or invalid.
            AssertionError: one of the faults never happened.
        """
        with _fixes_shown():
            _refuse_a_running_loop()
            started = {job.name: job for job in children}
            named = (*variants, *([handler] if isinstance(handler, Job) else ()))
            given = started | {job.name: job for job in named}
            name = handler.name if isinstance(handler, Job) else handler
            keys = {**(definition or {}), **({} if params is None else {"params": dict(params)})}
            parsed = definition_of(org, name, keys)
            wanted = dict.fromkeys((*parsed.handlers, *started))
            handlers = [_handler(one, given.get(one)) for one in wanted]
            jobs = {entry.entry_point: job for entry, job in handlers}
            origins = tuple(api_origins) if parsed.api_origins is None else parsed.api_origins
            injector = FaultInjector(faults, self.clock)
            recording = RecordingApi(api, injector.before_request)
            logs: list[LogLine] = []

            async def carry() -> tuple[Trial, list[EndedAttempt]]:
                async with AsyncExitStack() as stack:
                    runner: Runner = InProcess(jobs, recording, self.clock, hosts or {})
                    if place == "child":
                        runner = await stack.enter_async_context(in_child(jobs, self.clock))
                    subject = Subject(
                        OrgRef(OrgId(new_id()), org),
                        org,
                        parsed,
                        api_origins=origins,
                        private_origins=tuple(private_origins),
                        insecure_origins=origins,
                        network=NetworkPolicy(seals_inline=True),
                    )
                    tokens = FaultyTokens(
                        injector,
                        self.clock,
                        properties=properties,
                        flags=flags,
                        scopes=scopes,
                        lifetime=as_timedelta(token_lifetime),
                    )
                    shared: dict[str, Any] = {
                        "secrets": GivenSecrets(in_clear(secrets or {})),
                        "isolation": ISOLATION[place],
                        "on_line": lambda line: logs.append(LogLine(line.attempt, line.level, line.text)),
                    }
                    entries = [entry for entry, _ in handlers]

                    async def run_child(new: NewChild, cap: FamilyCap, depth: int) -> EndedAttempt:
                        of = replace(parsed, handler=new.handler, variants=())
                        child = Trial(
                            replace(subject, definition=of),
                            entries,
                            tokens,
                            runner,
                            self.clock,
                            family=Family(run_child, cap, depth),
                            params=json.loads(new.params_json),
                            **shared,
                        )
                        return (await self._attempts(child, None, attempts))[-1]

                    trial = Trial(
                        subject,
                        entries,
                        tokens,
                        runner,
                        self.clock,
                        checkpoint=checkpoint,
                        state=state,
                        answers=answers,
                        budgets=budgets,
                        on_saved=injector.saved,
                        on_step=injector.stepped,
                        family=Family(run_child if started else None),
                        **shared,
                    )
                    return trial, await self._attempts(trial, injector, attempts)

            if api is not None and place == "child":
                raise UsageError(
                    "a handler in a child process cannot reach the api of the test",
                    fix='leave out place="child"',
                )
            with asyncio.Runner(loop_factory=lambda: LeapingLoop(self.clock)) as loop:
                trial, ended = loop.run(carry())
        injector.check()
        return _finished(ended, trial, logs, recording.requests)

    async def _attempts(self, trial: Trial, injector: FaultInjector | None, most: int) -> list[EndedAttempt]:
        ended: list[EndedAttempt] = []
        while len(ended) < most and (not ended or not ended[-1].final):
            if ended:
                last = ended[-1]
                await trial.run_children()
                delay = trial.resume() if last.state == "parked" else last.available_after or timedelta()
                if delay is None:  # it waits for an answer that the test does not give
                    break
                self.clock.advance(delay)
            if injector is not None:
                injector.begin(trial)
            ended.append(await trial.attempt())
            if injector is not None:
                injector.end()
            if trace := (ended[-1].error or {}).get("trace"):
                # pytest shows it if the test fails.
                sys.stderr.write(f"attempt {ended[-1].attempt} of {ended[-1].trail.handler}:\n{trace}")
        return ended


def _finished(
    ended: Sequence[EndedAttempt], trial: Trial, logs: Sequence[LogLine], requests: Sequence[httpx.Request]
) -> Finished:
    last = ended[-1]
    progress = [each.trail.progress for each in ended if each.trail.progress is not None]
    return _like(
        Finished,
        last,
        state=last.shown_state,
        result=_parsed(last.result),
        checkpoint=trial.checkpoint,
        definition_state=trial.state,
        spends=trial.spent,
        steps=tuple(
            _like(Step, row.step, attempt=row.run.attempt, result=json.loads(row.step.result_json))
            for row in trial.steps
        ),
        children=tuple(
            _like(
                FinishedChild,
                child.new,
                params=json.loads(child.new.params_json),
                state=child.ended and child.ended.state,
                reason=child.ended and child.ended.reason,
                result=None if child.ended is None else _parsed(child.ended.result),
                error=child.ended and child.ended.error,
            )
            for child in trial.children.values()
        ),
        waits=tuple(
            _like(
                Wait,
                each.wait,
                ask=_parsed(each.wait.ask_json),
                options=each.wait.options or None,
                until=each.until,
                answered=each.is_answered,
                answer=_parsed(each.answer_json),
                timed_out=each.is_over,
            )
            for each in trial.waits.values()
        ),
        progress=progress[-1] if progress else None,
        attempts=tuple(
            _like(Attempt, each, number=each.attempt, handler=each.trail.handler, state=each.shown_state)
            for each in ended
        ),
        logs=tuple(logs),
        requests=tuple(requests),
    )


def _like(kind: type[T], source: object, **given: Any) -> T:
    """A dataclass whose fields are given, or those of the same name of the source."""
    others = (name for name in kind.__annotations__ if name not in given)
    return kind(**given, **{name: getattr(source, name) for name in others})


def _parsed(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def _handler(name: str, job: Job | None) -> tuple[HandlerEntry, Job]:
    if job is not None:
        where = f"{job.function.__module__}:{job.function.__qualname__}"
        return HandlerEntry(name, "(this test)", "0", where, **_declared(job)), job
    for found in distributions():
        for point in found.points:
            if point.name == name:
                job = load(point.value)
                return HandlerEntry(name, found.name, found.version, point.value, **_declared(job)), job
    raise NotFound(
        f"no installed distribution has a handler {name}",
        fix="install its distribution (`pip install -e .`), or pass the handler itself",
    )


def _declared(job: Job) -> dict[str, Any]:
    lists = {name: tuple(sorted(getattr(job, name))) for name in ("scopes", "secrets", "children")}
    return {**offer_of(job), **lists, "egress": job.egress, "audiences": job.audiences}


@contextmanager
def _fixes_shown() -> Iterator[None]:
    """Add the fix of an error as a note, which pytest prints."""
    try:
        yield
    except WorkerError as error:
        if error.fix:
            error.add_note(f"fix: {error.fix}")
        raise


def _refuse_a_running_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise UsageError(
        "orgworker.run needs its own event loop, but one is running",
        fix="call it from a plain `def test_…`, or await asyncio.to_thread(orgworker.run, …)",
    )
