"""What a running handler may ask of its worker means the same on a host, over a real connection."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import pytest

from tests.conftest import on_either
from tests.integration.hosts.conftest import ENTRIES, Fleet
from worker.clock import SystemClock
from worker.engine.attempt import answers as answering
from worker.engine.attempt.answers import Running
from worker.engine.attempt.attempt import Prepared, prepare
from worker.engine.attempt.inflight import InflightRun, InflightRuns
from worker.engine.attempt.plan import HandlerRegistry
from worker.engine.attempt.run_log import RunLogWriter, redacted
from worker.engine.attempt.tools import HandlerTools
from worker.engine.loops.step_writer import StepWriter
from worker.engine.runners.contract import StopSignal, Work
from worker.errors import LeaseLost, StoreUnavailable, TokenRefused
from worker.features.hosts.control import AsyncControl, Controls
from worker.features.hosts.hosted import RemoteTools
from worker.features.hosts.remote import RemoteStore
from worker.handlers.calls import (
    AskToken,
    CountSpend,
    OpenWait,
    Progress,
    Save,
    StoreStep,
)
from worker.handlers.steps import StepError
from worker.ids import RunId
from worker.model.definitions.file import parse_file
from worker.model.runs import outcome as outcomes
from worker.model.runs.outcome import Trail
from worker.model.runs.run import NewStep
from worker.model.runs.waits import NewWait
from worker.operations.apply import apply
from worker.store import spending, tables
from worker.telemetry.masking import MASK, Masker

BUDGET = """
[[budget]]
org = "org_a"
meter = "llm"
limit = 10
per = "day"
"""
NOW = datetime(2030, 1, 1, tzinfo=UTC)


def step(seq: int, result: str = "[1]", name: str = "fetch", **values: Any) -> NewStep:
    return NewStep(name, None, seq, seq, result, NOW, NOW, **values)


def running(inflight: InflightRun, trail: Trail, work: Work, tools: HandlerTools) -> Running:
    return Running(inflight, trail, tools.acts, tools.run_log, tools.clock, work.checkpoint)


@dataclass
class Attempt:
    """One running attempt, and the writers that its process shares with others."""

    services: Running
    inflight: InflightRun
    run_log: RunLogWriter
    fleet: Fleet

    async def store(self, step: NewStep) -> str:
        """The result as it is stored."""
        stored = await self.services.ask(StoreStep(step))
        return step.result_json if stored is None else stored

    @property
    def run(self) -> RunId:
        return self.inflight.run.id

    def rows(self, table: Any) -> list[dict[str, Any]]:
        return self.fleet.rows.all(table, table.c.run_id == self.run)


@dataclass
class Local:
    """Attempts of a worker's own."""

    fleet: Fleet
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def begin(self, run: RunId) -> Attempt:
        worker = self.fleet.one
        handlers = worker.tools.handlers
        if not self._tasks:
            for entry in ENTRIES:
                handlers.add(entry)
            worker.store.register(version="1", handlers=handlers.names(), capacity={"children": 9})
            steps = worker.tools.steps
            assert isinstance(steps, StepWriter)
            self._tasks.append(asyncio.create_task(steps.run()))
        await worker.store.look_at_budgets()
        [admitted] = await worker.store.admit(handlers.limits(), {"child": 1})
        assert admitted.id == run
        inflight, trail = InflightRun(admitted, StopSignal()), Trail(admitted.handler)
        prepared = await prepare(inflight, trail, worker.tools)
        assert isinstance(prepared, Prepared)
        services = running(inflight, trail, prepared.work, worker.tools)
        return Attempt(services, inflight, worker.tools.run_log, self.fleet)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()


@dataclass
class Remote:
    """Attempts of a host, whose calls go to two workers."""

    fleet: Fleet
    _host: Any = None
    _tools: RemoteTools | None = None
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def begin(self, run: RunId) -> Attempt:
        for worker in self.fleet.workers:
            await worker.store.look_at_budgets()
        if self._tools is None:
            await self._connect()
        tools = self._tools
        assert tools is not None
        [taken] = await self._host.take(self.fleet.one)
        assert taken.run.id == run
        inflight = tools.store.inflight_runs.add(taken.run)
        inflight.hold(taken.work.token)
        services = running(inflight, Trail(taken.work.handler), taken.work, tools)
        return Attempt(services, inflight, tools.run_log, self.fleet)

    async def _connect(self) -> None:
        clock = SystemClock()
        self._host = await self.fleet.host()
        urls = [worker.url for worker in self.fleet.workers]
        controls = Controls(urls, self._host.token, clock)
        controls.incarnation = self._host.id
        store = RemoteStore(AsyncControl(controls), None, InflightRuns(), clock.now)  # type: ignore[arg-type]
        steps = StepWriter(store, clock)
        self._tools = RemoteTools(
            store=store,
            handlers=HandlerRegistry(),
            runners={},
            steps=steps,
            run_log=RunLogWriter(store, clock),
            clock=clock,
            random=Random(1),
        )
        self._tasks.append(asyncio.create_task(steps.run()))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tools is not None:
            await self._tools.store.control.aclose()


@asynccontextmanager
async def opened(kind: type[Local | Remote], fleet: Fleet) -> AsyncIterator[Local | Remote]:
    apply(fleet.database, parse_file(BUDGET), actor="test")
    made = kind(fleet)
    yield made
    await made.close()


@pytest.fixture(params=[Local, Remote])
async def place(request: pytest.FixtureRequest, fleet: Fleet) -> AsyncIterator[Local | Remote]:
    """Where attempts run."""
    async with opened(request.param, fleet) as made:
        yield made


LIMITS = """
[[budget]]
org = "org_a"
meter = "tickets"
limit = 5
per = "day"
at_limit = "ask"

[[budget]]
org = "org_a"
meter = "dear"
limit = 5
per = "day"
at_limit = "ask"
"""


@on_either
@pytest.mark.parametrize("checked", [True, False], ids=["", "control"])
async def test_the_question_of_a_budget_is_the_workers_own(
    place: Local | Remote, checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run opens the wait for one budget with a question about another, for a hundred years.

    The control believes it: the operator who answers about tickets would be shown, and raise, `dear`.
    """
    if not checked:

        async def believe(wait: NewWait, *_: Any) -> NewWait:
            return wait

        monkeypatch.setattr(answering, "believed_wait", believe)
        # The store would end the wait for a budget that does not stop the run.
        monkeypatch.setattr(spending, "end_raised", lambda *_: False)
    apply(place.fleet.database, parse_file(LIMITS), actor="test")
    attempt = await place.begin(place.fleet.start())
    services = attempt.services
    await services.ask(CountSpend("tickets", 6, "1:1"))
    claimed = {"meter": "dear", "per": "month", "limit": 1, "used": 1, "resets_at": None}
    lie = NewWait("budget:tickets", 1, "budget", 3e9, json.dumps(claimed), alert=True)

    state = await services.ask(OpenWait(lie))
    unreached = await services.ask(OpenWait(replace(lie, name="budget:dear")))
    unknown = await services.ask(OpenWait(replace(lie, name="budget:none")))

    [row] = [row for row in attempt.rows(tables.waits) if row["name"] == "budget:tickets"]
    found = row["ask"]["meter"], row["ask"]["per"], row["ask"]["limit"], row["ask"]["used"]
    assert state.until is not None
    if not checked:
        assert (found, unreached.state) == (("dear", "month", 1, 1), "pending")
        return
    assert found == ("tickets", "day", 5, 6)
    assert state.until - datetime.now(UTC) < timedelta(days=1, seconds=10)
    assert (state.state, unreached.state, unknown.state) == ("pending", "over", "over")
    assert services.trail.asks == ()
    for name, kind in (("tickets", "budget"), ("sleep", "answer"), ("budget:tickets", "answer")):
        with pytest.raises(StepError, match="reserved"):
            await services.ask(OpenWait(NewWait(name, 1, kind)))  # type: ignore[arg-type]


async def test_a_token_of_another_org_ends_the_run(place: Local | Remote) -> None:
    attempt = await place.begin(place.fleet.start())
    place.fleet.tokens.of_org = "org_b"

    with pytest.raises(TokenRefused) as refused:
        await attempt.services.ask(AskToken(fresh=True))

    assert (refused.value.reason, refused.value.detail) == ("org_mismatch", "other_org")
    assert "org_b" not in refused.value.message
    assert attempt.services.refused is not None
    assert attempt.inflight.stop.killed


@pytest.mark.parametrize("scoped", [True, False])
async def test_guesses_tell_nothing_of_another_orgs_secret(
    place: Local | Remote, scoped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run writes 60,000 guesses while a run of another org holds the secret.

    The control is one mask for all orgs: in each text it tells which guess is right.
    """
    if not scoped:
        monkeypatch.setattr(Masker, "_indexes", lambda self, org: [self._all])
    fleet, secret = place.fleet, "sk-041234"
    attempt = await place.begin(fleet.start())
    services, run = attempt.services, attempt.inflight.run
    other = InflightRun(replace(run, org_id=fleet.org("org_b")), StopSignal())
    other.hold_secrets({"openai": secret})
    guesses = [f"sk-{number:06}" for number in range(60_000)]
    answers: dict[str, list[str]] = {}

    await services.ask(Save(json.dumps(guesses)))
    answers["checkpoint"] = attempt.rows(tables.checkpoints)[0]["data"]
    answers["step"] = json.loads(await attempt.store(step(1, json.dumps(guesses[40_000:60_000]))))
    await services.ask(OpenWait(NewWait("ok", 1, "answer", ask_json=json.dumps(guesses[41_000:41_500]))))
    answers["wait"] = attempt.rows(tables.waits)[0]["ask"]
    services.log("info", "log", " ".join(guesses[41_000:42_000]))
    services.tell(Progress(1, 2, " ".join(guesses[41_210:41_250])))
    await attempt.run_log.flush()
    await place.fleet.flush()
    answers["log"] = attempt.rows(tables.run_logs)[0]["text"].split(" ")
    live = fleet.rows.live(attempt.run)
    assert live is not None
    answers["progress"] = live["progress"]["note"].split(" ")
    failed = outcomes.Failed(outcomes.Error("E", " ".join(guesses[41_200:41_300])))
    masked = await redacted(failed, run.org_id)
    assert isinstance(masked, outcomes.Failed)
    answers["error"] = masked.error.message.split(" ")
    refused = []
    for name in (secret, "sk-041235"):
        for call in (
            services.ask(StoreStep(step(2 if name == secret else 3, name=name))),
            services.ask(OpenWait(NewWait(name, 1, "sleep", seconds=1.0))),
            services.ask(CountSpend(name, 1, "1:1")),
        ):
            try:
                await call
            except StepError:
                refused.append(name)

    told = {what: sum(MASK in answer for answer in told) for what, told in answers.items()}
    assert told == dict.fromkeys(told, 0 if scoped else 1)
    assert refused == ([] if scoped else [secret] * 3)
    other.drop_tokens()


async def test_a_secret_of_the_org_is_masked_in_all_that_its_runs_write(
    place: Local | Remote,
) -> None:
    """As guesses of it, so that the test above would see one that is masked."""
    secret = "sk-041234"
    attempt = await place.begin(place.fleet.start())
    attempt.inflight.hold_secrets({"openai": secret})

    await attempt.services.ask(Save(json.dumps([secret])))
    stored = await attempt.store(step(1, json.dumps([secret])))

    assert attempt.rows(tables.checkpoints)[0]["data"] == [MASK]
    assert json.loads(stored) == [MASK]


@on_either
@pytest.mark.parametrize("call", ["save", "store_step", "open_wait", "spend"])
async def test_what_is_no_longer_ours_is_not_written(place: Local | Remote, call: str) -> None:
    attempt = await place.begin(place.fleet.start())
    services = attempt.services
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "save": lambda: services.ask(Save("1")),
        "store_step": lambda: services.ask(StoreStep(step(1))),
        "open_wait": lambda: services.ask(OpenWait(NewWait("ok", 1, "answer"))),
        "spend": lambda: services.ask(CountSpend("llm", 1, "1:1")),
    }
    with place.fleet.database.transaction() as connection:
        connection.execute(tables.live_runs.update().values(fencing_token=99))

    with pytest.raises(LeaseLost):
        await calls[call]()

    assert attempt.inflight.stop.killed
    for table in (tables.checkpoints, tables.steps, tables.waits, tables.spends):
        assert attempt.rows(table) == []


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("save", "save_checkpoint"),
        ("store_step", "store_steps"),
        ("open_wait", "open_wait"),
        ("spend", "spend"),
    ],
)
async def test_a_call_outlasts_an_outage_of_the_database(
    place: Local | Remote, monkeypatch: pytest.MonkeyPatch, call: str, name: str
) -> None:
    attempt = await place.begin(place.fleet.start())
    services, faults = attempt.services, 0
    for worker in place.fleet.workers:
        healthy = getattr(worker.store, name)

        async def faulty(*args: Any, healthy: Any = healthy, **kwargs: Any) -> Any:
            nonlocal faults
            if (faults := faults + 1) <= 3:
                raise StoreUnavailable("the database does not respond")
            return await healthy(*args, **kwargs)

        monkeypatch.setattr(worker.store, name, faulty)

    match call:
        case "save":
            await services.ask(Save("1"))
        case "store_step":
            await services.ask(StoreStep(step(1)))
        case "open_wait":
            await services.ask(OpenWait(NewWait("ok", 1, "answer")))
        case _:
            await services.ask(CountSpend("llm", 1, "1:1"))

    assert faults > 3
    stored = {
        "save": tables.checkpoints,
        "store_step": tables.steps,
        "open_wait": tables.waits,
        "spend": tables.spends,
    }
    assert len(attempt.rows(stored[call])) == 1
