"""Trial: one run of one handler through the real attempt, with nothing stored anywhere."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from random import SystemRandom
from typing import Any

from worker.clock import Clock
from worker.definitions.definition import Definition, parse_definition, to_spec
from worker.execution.attempts.attempt import Tools, attempt
from worker.execution.attempts.handler_registry import HandlerRegistry
from worker.execution.attempts.inflight import InflightRun
from worker.execution.attempts.plan import Plans
from worker.execution.attempts.run_services import TokenSource
from worker.execution.loops.run_log_writer import Progress, RunLogWriter
from worker.execution.runners.contract import Runner, StopSignal
from worker.handlers.catalogue import HandlerEntry
from worker.ids import DefinitionId, RunId, new_id
from worker.orgs import OrgRef
from worker.runs.outcome import EndedAttempt
from worker.runs.run import AdmittedRun, Isolation, LogLine, RunContext

NAME = "trial"
# Its schedule is not looked at: the run is there already.
SCHEDULE = "@hourly"


def definition_of(org: str, handler: str, keys: Mapping[str, Any]) -> Definition:
    """The definition that a trial's run is of; `keys` are further ones, as in a file for `apply`.

    Raises:
        DefinitionError: names the key that is unknown or does not fit.
    """
    values = {"org": org, "name": NAME, "handler": handler, "schedule": SCHEDULE, **keys}
    return parse_definition(values, entry="definition")


@dataclass(frozen=True, slots=True)
class Subject:
    """Whose run it is: the org as the token is to name it, and what its definition says."""

    org: OrgRef
    org_name: str
    definition: Definition
    issuer: str = "made-up"
    api_origins: tuple[str, ...] = ()
    private_origins: tuple[str, ...] = ()
    insecure_origins: tuple[str, ...] = ()


class Trial:
    """A run from its first attempt on; `attempt` carries it through the next.

    `on_line` and `on_progress` get what the run logs and shows, masked: within half a
    second where it is `live`, else at the end of an attempt. `on_saved` is awaited
    with each checkpoint, once that is durable.
    """

    def __init__(
        self,
        subject: Subject,
        entries: Iterable[HandlerEntry],
        tokens: TokenSource,
        runner: Runner,
        clock: Clock,
        *,
        checkpoint: Any = None,
        isolation: Isolation = "child",
        live: bool = False,
        on_line: Callable[[LogLine], None] = lambda line: None,
        on_progress: Callable[[Mapping[str, Any]], None] = lambda progress: None,
        on_saved: Callable[[Trial], Awaitable[None]] | None = None,
    ) -> None:
        self._subject = subject
        self._clock = clock
        self._live = live
        self._on_line = on_line
        self._on_progress = on_progress
        self._on_saved = on_saved
        self._checkpoint = None if checkpoint is None else json.dumps(checkpoint)
        self._run = self._first(isolation)
        self.held = InflightRun(self._run, StopSignal())
        offered = list(entries)
        offers = HandlerRegistry(frozenset(entry.distribution for entry in offered))
        for entry in offered:
            offers.add(entry)
        self._tools = Tools(
            plans=Plans(
                self,
                clock,
                api_origins={subject.issuer: subject.api_origins},
                private_origins=subject.private_origins,
                insecure_origins=subject.insecure_origins,
            ),
            tokens=tokens,
            offers=offers,
            runners={isolation: runner},
            checkpoints=self,
            journal=RunLogWriter(self, clock),
            clock=clock,
            random=SystemRandom(),
        )

    @property
    def checkpoint(self) -> Any:
        """What was saved last, or None."""
        return None if self._checkpoint is None else json.loads(self._checkpoint)

    async def attempt(self) -> EndedAttempt:
        """Carry the run through one attempt; where it waits after that, the next call makes the next."""
        self.held = held = InflightRun(self._run, StopSignal())
        writing = asyncio.create_task(self._tools.journal.run()) if self._live else None
        try:
            ended = await attempt(held, self._tools)
        finally:
            if writing is not None:
                writing.cancel()
            await self._tools.journal.flush()
        self._run = replace(
            self._run,
            attempt=self._run.attempt + 1,
            fencing_token=self._run.fencing_token + 1,
            failures=ended.failures,
            recoveries=ended.recoveries,
            available_at=ended.ended_at + (ended.available_after or timedelta()),
            started_at=ended.ended_at + (ended.available_after or timedelta()),
        )
        return ended

    def _first(self, isolation: Isolation) -> AdmittedRun:
        now, run_id = self._clock.now(), RunId(new_id())
        return AdmittedRun(
            id=run_id,
            org_id=self._subject.org.id,
            definition_id=DefinitionId(new_id()),
            revision=1,
            handler=self._subject.definition.handler,
            isolation=isolation,
            # A first attempt by hand has no checkpoint to look for.
            origin="manual" if self._checkpoint is None else "retry",
            scheduled_for=now,
            available_at=now,
            start_by=None,
            started_at=now,
            attempt=1,
            failures=0,
            recoveries=0,
            fencing_token=1,
            idempotency_key=run_id,
            params=None,
        )

    # What an attempt asks of a store.

    async def org_and_definition(self, run: AdmittedRun) -> RunContext:
        subject = self._subject
        return RunContext(
            org_id=subject.org.id,
            org_code=subject.org.code,
            org_name=subject.org_name,
            org_timezone=None,
            issuer=subject.issuer,
            definition_name=subject.definition.name,
            spec=to_spec(subject.definition),
        )

    async def save_checkpoint(self, run: AdmittedRun, data_json: str) -> bool:
        if self.held.stop.killed:
            return False
        self._checkpoint = data_json
        if self._on_saved is not None:
            await self._on_saved(self)
        return True

    async def load_checkpoint(self, run_id: RunId) -> Any:
        return self.checkpoint

    async def write_progress(self, rows: Sequence[Progress]) -> None:
        for _, _, progress in rows:
            self._on_progress(progress)

    async def append_logs(self, rows: Sequence[LogLine]) -> None:
        for line in rows:
            self._on_line(line)
