"""Orgworker: runs a handler in a test as a worker would, attempt after attempt."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from worker.errors import NotFound, UsageError, WorkerError
from worker.execution.runners.contract import Runner
from worker.execution.trial.fake_tokens import LIFETIME
from worker.execution.trial.trial import Subject, Trial, definition_of
from worker.handlers.catalogue import HandlerEntry
from worker.handlers.describe import offer_of
from worker.handlers.installed import distributions
from worker.handlers.job import Job
from worker.handlers.models import load
from worker.ids import OrgId, new_id
from worker.orgs import OrgRef
from worker.runs.outcome import EndedAttempt
from worker.runs.run import Isolation
from worker.runs.run import LogLine as RunLogLine
from worker.testing.clock import LeapingLoop, SettableClock, in_seconds
from worker.testing.faults import Fault
from worker.testing.finished import Finished, LogLine
from worker.testing.runners import Api, ApiOfTest, InProcess, in_child
from worker.testing.stage import Stage, StagedTokens

ORG = "org_test"
API_ORIGIN = "https://api.example.com"
ATTEMPTS = 10
PLACES: Mapping[str, Isolation] = {"here": "inline", "child": "child"}


class Orgworker:
    """What a test of a handler works with; `clock` is that of all its runs."""

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
        checkpoint: Any = None,
        faults: Iterable[Fault] = (),
        attempts: int = ATTEMPTS,
        token_lifetime: timedelta | float | str = LIFETIME,
        place: Literal["here", "child"] = "here",
    ) -> Finished:
        """Run a handler, or the installed one of that name, until its run has ended.

        The token says `org`, `properties` and `flags`, and has `scopes`, by default
        all that the handler needs. `api` answers `ctx.http`: a function of the request,
        an ASGI app, or an httpx transport; the token goes to `api_origins` only.
        For `ctx.public_http` the address of each host is checked before: the one that
        `hosts` gives it, and a public one for all others; `private_origins` are exempt.
        `definition` has further keys as in a file for `apply`; `variants` are handlers
        that it names and that are not installed. `checkpoint` is what an earlier run
        saved. Where the run waits, the clock is moved on and it is tried again, in all
        at most `attempts` times. In a `child` it has a process of its own, as in a
        worker, and no `api` of the test.

        Raises:
            NotFound: no installed distribution offers a handler of that name.
            DefinitionError: a key of `definition` is unknown or does not fit.
            AssertionError: a fault that was ordered never came about.
        """
        with _fixes_shown():
            _refuse_a_running_loop()
            given = {job.name: job for job in (*variants, *([handler] if isinstance(handler, Job) else ()))}
            name = handler.name if isinstance(handler, Job) else handler
            keys = {**(definition or {}), **({} if params is None else {"params": dict(params)})}
            parsed = definition_of(org, name, keys)
            stage = Stage(faults, self.clock)
            origins = tuple(api_origins) if parsed.api_origins is None else parsed.api_origins
            work = _Work(
                subject=Subject(
                    OrgRef(OrgId(new_id()), org),
                    org,
                    parsed,
                    api_origins=origins,
                    private_origins=tuple(private_origins),
                    insecure_origins=origins,
                ),
                handlers=[_handler(wanted, given.get(wanted)) for wanted in parsed.handlers],
                tokens=StagedTokens(
                    stage,
                    self.clock,
                    properties=properties,
                    flags=flags,
                    scopes=scopes,
                    lifetime=timedelta(seconds=in_seconds(token_lifetime)),
                ),
                api=api,
                hosts=hosts or {},
                place=place,
                checkpoint=checkpoint,
                attempts=attempts,
            )
            with asyncio.Runner(loop_factory=lambda: LeapingLoop(self.clock)) as runner:
                finished = runner.run(work.carry(stage, self.clock))
        stage.check()
        return finished


@dataclass(frozen=True, slots=True)
class _Handler:
    entry: HandlerEntry
    job: Job


@dataclass(frozen=True, slots=True)
class _Work:
    """One call of `run`."""

    subject: Subject
    handlers: Sequence[_Handler]
    tokens: StagedTokens
    api: Api | None
    hosts: Mapping[str, str]
    place: Literal["here", "child"]
    checkpoint: Any
    attempts: int

    async def carry(self, stage: Stage, clock: SettableClock) -> Finished:
        api = ApiOfTest(self.api, stage.before_request)
        logs: list[LogLine] = []

        def hear(line: RunLogLine) -> None:
            logs.append(LogLine(line.attempt, line.level, line.text))

        ends: list[EndedAttempt] = []
        async with self._runner(api, clock) as runner:
            trial = Trial(
                self.subject,
                [handler.entry for handler in self.handlers],
                self.tokens,
                runner,
                clock,
                checkpoint=self.checkpoint,
                isolation=PLACES[self.place],
                on_line=hear,
                on_saved=stage.saved,
            )
            while len(ends) < self.attempts and (not ends or ends[-1].state == "waiting"):
                if ends:
                    clock.advance(ends[-1].available_after or timedelta())
                stage.begin(trial)
                ends.append(await trial.attempt())
                stage.end()
                _show_trace(ends[-1])
        progress = [ended.trail.progress for ended in ends if ended.trail.progress is not None]
        return Finished.of(ends, trial.checkpoint, progress[-1] if progress else None, logs, api.requests)

    @asynccontextmanager
    async def _runner(self, api: ApiOfTest, clock: SettableClock) -> AsyncIterator[Runner]:
        jobs = {handler.entry.entry_point: handler.job for handler in self.handlers}
        if self.place == "here":
            yield InProcess(jobs, api, clock, self.hosts)
            return
        if self.api is not None:
            raise UsageError(
                "a handler in a child process does not reach the api of the test",
                fix='leave out place="child"',
            )
        async with in_child(jobs, clock) as children:
            yield children


def _handler(name: str, job: Job | None) -> _Handler:
    if job is not None:
        where = f"{job.function.__module__}:{job.function.__qualname__}"
        return _Handler(HandlerEntry(name, "(this test)", "0", where, **_offer(job)), job)
    for found in distributions():
        for point in found.points:
            if point.name == name:
                loaded = load(point.value)
                return _Handler(
                    HandlerEntry(name, found.name, found.version, point.value, **_offer(loaded)), loaded
                )
    raise NotFound(
        f"no installed distribution offers a handler {name}",
        fix="install its distribution (`pip install -e .`), or give the handler itself",
    )


def _offer(job: Job) -> dict[str, Any]:
    return {**offer_of(job), "scopes": tuple(sorted(job.scopes))}


def _show_trace(ended: EndedAttempt) -> None:
    """What the handler raised, for whoever reads why a test failed: pytest shows it then only."""
    trace = (ended.error or {}).get("trace")
    if trace:
        sys.stderr.write(f"attempt {ended.attempt} of {ended.trail.handler}:\n{trace}")


@contextmanager
def _fixes_shown() -> Iterator[None]:
    """What is wrong with a test says what to do; pytest prints notes, but knows nothing of a fix."""
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
        "orgworker.run has an event loop of its own, and one is running here",
        fix="call it from a plain `def test_…`, or await asyncio.to_thread(orgworker.run, …)",
    )
