"""State under random histories, against a model: real attempts on a real store, ended in every way.

FAULTS=full runs 500 histories on each database, else 12.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from random import Random
from typing import Any

import pytest

from tests.conftest import on_either
from tests.fakes.clock import ManualClock
from tests.fakes.site import one_definition
from tests.fakes.stock import Stock
from worker.engine.attempt.attempt import attempt
from worker.engine.attempt.inflight import InflightRun
from worker.engine.attempt.plan import HandlerRegistry, Plans
from worker.engine.attempt.run_log import RunLogWriter
from worker.engine.attempt.tools import Tools
from worker.engine.loops.step_writer import StepWriter
from worker.engine.runners.contract import RunServices, StopSignal, Work
from worker.engine.trial import FakeTokens
from worker.errors import Conflict
from worker.handlers.catalogue import HandlerEntry
from worker.handlers.given import State
from worker.ids import RunId, WorkerId, new_id
from worker.model.runs.outcome import EndedAttempt, Error, Failed, Outcome, Succeeded, TimedOut
from worker.model.runs.run import AdmittedRun
from worker.operations.definitions import clear_state, edit_definition, set_state
from worker.operations.orgs import set_org_state
from worker.operations.runs import retry, run_now
from worker.store import catalogue, tables, workers
from worker.store.database import Database
from worker.store.worker_store import WorkerStore

pytestmark = on_either

HISTORIES = 500 if os.environ.get("FAULTS") == "full" else 6
STEPS = 12
HANDLER = "acme.state"
ENTRY = HandlerEntry(HANDLER, "acme-jobs", "1.0", "acme_jobs:state", state=True)
FILE = one_definition("{org}", "nightly", "acme.state", "@yearly", max_attempts=2, retry_backoff="0s")


@dataclass(eq=False)
class Incarnation:
    """A worker without loops: admits, runs one attempt with a scripted handler, writes its end."""

    database: Database
    clock: ManualClock
    answer: Outcome | None = None
    seen: list[dict[str, Any]] = field(default_factory=list)
    change: Callable[[dict[str, Any]], None] = lambda state: None

    def __post_init__(self) -> None:
        self.id = WorkerId(new_id())
        self.store = WorkerStore(self.database, self.id, timedelta(seconds=30))
        self.store.register(version="1", handlers=[HANDLER], capacity={"child": 9})
        handlers = HandlerRegistry()
        handlers.add(ENTRY)
        clock = self.clock
        self.tools = Tools(
            plans=Plans(self.store, clock, api_origins={}),
            tokens=FakeTokens(clock),
            handlers=handlers,
            runners={"child": self},
            store=self.store,
            steps=StepWriter(self.store, clock),
            run_log=RunLogWriter(self.store, clock),
            clock=clock,
            random=Random(1),
        )

    async def run(self, work: Work, services: RunServices, stop: StopSignal) -> Outcome:
        """The runner: what the run's process does, here."""
        assert work.state is not None
        self.seen.append(dict(work.state))
        state = State(work.state)
        self.change(state.value)
        if self.answer is not None:
            return self.answer
        return Succeeded("1", state.changed())

    async def admit(self) -> AdmittedRun | None:
        runs = await self.store.admit({HANDLER: None}, {"child": 1})
        return runs[0] if runs else None

    async def attempt(self, run: AdmittedRun) -> EndedAttempt:
        return await attempt(InflightRun(run, StopSignal()), self.tools)


class History:
    """One definition's life, and what its state must be after each step."""

    def __init__(self, seed: int, database: Database, clock: ManualClock) -> None:
        self.random = Random(seed)
        self.database = database
        self.clock = clock
        self.org = f"org_{seed}"
        self.worker = Incarnation(database, clock)
        # Runs of backfills, and their retries.
        self.past: set[RunId] = set()
        self.model: dict[str, Any] = {}
        self.ended: list[RunId] = []
        self.told: list[str] = []

    async def live(self) -> None:
        steps = (self.run, self.run, self.run, self.back_again, self.retry, self.put, self.clear, self.edit)
        for _ in range(STEPS):
            step = self.random.choice(steps)
            self.told.append(step.__name__)
            await step()
            assert self.stored() == self.model, self.told

    def stored(self) -> dict[str, Any]:
        which = tables.definition_states.c.definition_id == self.definition()
        rows = Stock(self.database).all(tables.definition_states, which)
        return dict(rows[0]["data"]) if rows else {}

    def definition(self) -> str:
        stock = Stock(self.database)
        (org,) = stock.all(tables.orgs, tables.orgs.c.code == self.org)
        (row,) = stock.all(tables.definitions, tables.definitions.c.org_id == org["id"])
        return str(row["id"])

    async def run(self) -> None:
        run = run_now(self.database, self.org, "nightly", actor="ada")
        await self.carry(run["id"], commits=True)

    async def retry(self) -> None:
        """Of any run that ended, also of a backfill's, whose retry commits nothing either."""
        if self.ended:
            old = self.random.choice(self.ended)
            run = retry(self.database, old, actor="ada", again=True)
            await self.carry(run["id"], commits=old not in self.past)

    async def back_again(self) -> None:
        """A backfill's run: put as the chore of the worker puts it."""
        stock = Stock(self.database)
        (definition,) = stock.all(tables.definitions, tables.definitions.c.id == self.definition())
        run = stock.run(
            definition["org_id"],
            definition["id"],
            handler=HANDLER,
            origin="backfill",
            backfill_id=new_id(),
            revision=definition["revision"],
        )
        stock.put(run)
        await self.carry(run.id, commits=False)

    async def carry(self, run_id: str, *, commits: bool) -> None:
        """Attempt after attempt until the run has ended."""
        if not commits:
            self.past.add(RunId(run_id))
        while (run := await self.worker.admit()) is not None:
            assert run.id == run_id
            key, value = self.random.choice("abc"), self.random.randrange(100)
            after = {**self.model, key: value}
            self.worker.change = lambda state, key=key, value=value: state.update({key: value})  # type: ignore[misc]
            end = self.random.choice(("success", "success", "failure", "timeout", "kill", "lost answer"))
            self.told.append(end)
            error = Error("ValueError", "no")
            self.worker.answer = {"failure": Failed(error), "timeout": TimedOut(error)}.get(end)
            if self.random.random() < 0.3:
                with pytest.raises(Conflict, match="is running"):
                    set_state(self.database, self.org, "nightly", {"by": "hand"}, actor="ada")
            ended = await self.worker.attempt(run)
            assert self.worker.seen[-1] == self.model, self.told
            if end == "kill":
                await self.kill(ended)
                continue
            assert await self.worker.store.finish([ended]) == {run.id}
            if end == "lost answer":
                # The answer to COMMIT was lost: the end is written again.
                assert await self.worker.store.finish([ended]) == {run.id}
            if commits and ended.state == "succeeded":
                self.model = after
            assert self.stored() == self.model, self.told
        self.ended.append(RunId(run_id))

    async def kill(self, ended: EndedAttempt) -> None:
        """The worker dies before its end is written, and comes back too late."""
        dead, self.worker = self.worker, Incarnation(self.database, self.clock)
        with self.database.transaction() as connection:
            workers.unregister(connection, dead.id)
        await self.worker.store.recover(lambda: True)
        assert await dead.store.finish([ended]) == set()

    async def put(self) -> None:
        self.model = {"by": "hand", "n": self.random.randrange(100)}
        set_state(self.database, self.org, "nightly", self.model, actor="ada")

    async def clear(self) -> None:
        self.model = {}
        clear_state(self.database, self.org, "nightly", actor="ada")

    async def edit(self) -> None:
        """A new revision, which keeps the state."""
        changes = {"priority": self.random.randrange(1_000_000)}
        edit_definition(self.database, self.org, "nightly", changes, actor="ada")


async def test_random_histories_are_those_of_the_model(
    database: Database, clock: ManualClock, apply: Any
) -> None:
    with database.transaction() as connection:
        catalogue.put(connection, [ENTRY], at=database.now(connection))
    for seed in range(HISTORIES):
        apply(FILE.format(org=f"org_{seed}"))
        history = History(seed, database, clock)
        await history.live()
        set_org_state(database, history.org, "removed", actor="ada")
        assert history.stored() == {}
