"""A host runs what it takes as a worker runs its own, and reports how it ended."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import timedelta
from random import Random
from typing import Any

import httpx
import pytest

from tests.fakes.clock import ManualClock, settle
from tests.fakes.exchanges import CLAIMS, TAKEN
from tests.unit.engine.runs import admitted
from worker.engine.attempt.answers import Running
from worker.engine.attempt.inflight import InflightRun, InflightRuns
from worker.engine.attempt.plan import HandlerRegistry, NetworkPolicy
from worker.engine.attempt.run_log import RunLogWriter
from worker.engine.loops.finisher import unstorable
from worker.engine.loops.step_writer import StepWriter
from worker.engine.runners.contract import RunServices, StopSignal, Work
from worker.errors import LeaseLost, Unavailable
from worker.features.hosts import remote as remote_module
from worker.features.hosts import wire
from worker.features.hosts.control import (
    AsyncControl,
    BlockingControl,
    ControlDenied,
    Controls,
    ControlUnavailable,
)
from worker.features.hosts.hosted import RemoteTools, hosted_attempt
from worker.features.hosts.remote import HostedEnd, RemoteStore, SentRow
from worker.features.hosts.sent import END, Sent
from worker.features.hosts.taking import WAIT, Taking
from worker.features.hosts.wire import Malformed, Taken
from worker.handlers.calls import CALLS, Call, OneWayCall, OpenWait, Save, StoreStep
from worker.handlers.catalogue import HandlerEntry
from worker.handlers.steps import StepError
from worker.model.egress import BoundSecret, Egress, placeholder_of
from worker.model.runs import outcome as outcomes
from worker.model.runs.children import ChildrenWait, NewChild
from worker.model.runs.egress import EgressRow
from worker.model.runs.outcome import Failed, Outcome, Succeeded, Trail
from worker.model.runs.run import AdmittedRun, LogLine, NewStep, OwnedRun
from worker.model.runs.waits import NewWait
from worker.secret import AccessToken
from worker.telemetry import tracing
from worker.telemetry.events import Emitted
from worker.telemetry.tracing import Marks, Traced

RUN = TAKEN.run
DONE = Succeeded('{"n":1}')
During = Callable[[RunServices, StopSignal], Any]


class Workers(httpx.AsyncBaseTransport, httpx.BaseTransport):
    """Answers calls by name: with a message, a status and a code, or what a function makes of the message."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        name, message = request.url.path.rpartition("/")[2], json.loads(request.content)
        self.calls.append((name, message))
        answer = self.answers.get(name, {})
        if callable(answer):
            answer = answer(message)
        status = 422 if "error" in answer else 200
        if isinstance(answer, tuple):
            status, code = answer
            answer = {"error": {"code": code, "message": "it is so"}}
        return httpx.Response(status, content=json.dumps(answer).encode())

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return self.handle_request(request)

    def sent(self, name: str) -> list[dict[str, Any]]:
        return [message for called, message in self.calls if called == name]


class Runner:
    """Calls `during` in place of a handler."""

    def __init__(self, outcome: Outcome = DONE, during: During | None = None) -> None:
        self.outcome = outcome
        self.during = during
        self.works: list[Work] = []

    async def run(self, work: Work, services: RunServices, stop: StopSignal) -> Outcome:
        self.works.append(work)
        services.started()
        if self.during is not None:
            await self.during(services, stop)
        return self.outcome


class Host:
    """A store over `workers`, and one attempt that was taken."""

    def __init__(self, clock: ManualClock, workers: Workers, runner: Runner | None = None) -> None:
        controls = Controls(["http://w:1"], "token", clock)
        self.inflight_runs = InflightRuns()
        self.store = RemoteStore(
            AsyncControl(controls, transport=workers),
            BlockingControl(controls, 1.0, transport=workers),
            self.inflight_runs,
            clock.now,
        )
        self.runner = runner or Runner()
        handlers = HandlerRegistry(frozenset({"acme"}))
        handlers.add(HandlerEntry("acme.digest", "acme", "1", "here:digest"))
        self.tools = RemoteTools(
            store=self.store,
            handlers=handlers,
            runners={"child": self.runner, "inline": self.runner},
            steps=StepWriter(self.store, clock),
            run_log=RunLogWriter(self.store, clock),
            clock=clock,
            random=Random(1),
        )

    def took(self, taken: Taken = TAKEN) -> InflightRun:
        # As it comes from the wire: no work is shared between tests.
        fresh = wire.taken_of(json.loads(json.dumps(wire.taken_message(taken))))
        (run,) = self.tools.keep([fresh])
        return self.inflight_runs.add(run)

    async def attempt(self, taken: Taken = TAKEN) -> HostedEnd:
        return await hosted_attempt(self.took(taken), self.tools)

    async def ask(self, call: Call[Any]) -> Any:
        """What the workers answer to a handler of the run."""
        tools, inflight = self.tools, InflightRun(RUN, StopSignal())
        of = Running(inflight, Trail("acme.digest"), tools.acts, tools.run_log, tools.clock)
        writing = asyncio.create_task(tools.steps.run())
        try:
            return await tools.acts.act(call, of)
        finally:
            writing.cancel()


def sent_row(run: AdmittedRun, step: NewStep) -> SentRow:
    return SentRow(run, Sent(run.id, run.fencing_token, "h", StoreStep(step)), len(step.result_json))


async def test_the_handler_that_is_installed_here_gets_the_workers_work(clock: ManualClock) -> None:
    host = Host(clock, Workers())

    ended = await host.attempt()

    (work,) = host.runner.works
    assert work.entry_point == "here:digest"
    assert work.timeout_at == clock.now() + TAKEN.timeout
    assert work.token.reveal() == TAKEN.work.token.reveal()
    assert (ended.outcome, ended.returned, ended.sealed) == ("succeeded", Succeeded('{"n":1}'), TAKEN.sealed)
    inflight = host.inflight_runs.get(RUN.id)
    assert inflight is not None
    assert (inflight.org_code, inflight.cancel_grace) == ("org_acme", TAKEN.cancel_grace)


async def test_an_end_says_how_long_ago_the_handler_was_called(clock: ManualClock) -> None:
    """The host's clock may be wrong; the worker counts back from its own."""
    workers = Workers(finish=lambda message: {"accepted": [message["ends"][0]["run"]]})
    host = Host(clock, workers)
    ended = await host.attempt()
    clock.advance(2.5)

    assert await host.store.finish([ended]) == {RUN.id}

    (end,) = wire.rows_of(workers.sent("finish")[0], "ends", END)
    assert (end.handler_seconds, end.sealed, end.moved) == (2.5, TAKEN.sealed, False)
    assert end.outcome == Succeeded('{"n":1}')


async def test_every_text_is_masked_before_it_is_sent(clock: ManualClock) -> None:
    workers, token = Workers(finish={"accepted": []}), "a-long-token-of-this-run"
    taken = replace(TAKEN, work=replace(TAKEN.work, token=AccessToken(token, clock.now())))
    host = Host(clock, workers, Runner(Succeeded(json.dumps({"token": token}))))

    ended = await host.attempt(taken)
    await host.store.finish([ended])

    assert token not in json.dumps(workers.calls)


async def test_the_orgs_secrets_are_masked_on_the_host_too(clock: ManualClock) -> None:
    workers, key = Workers(finish={"accepted": []}), "sk-canary-of-the-org-1"
    taken = replace(TAKEN, work=replace(TAKEN.work, secrets={"openai": key}))
    host = Host(clock, workers, Runner(Succeeded(json.dumps({"key": key}))))

    ended = await host.attempt(taken)
    await host.store.finish([ended])

    assert host.runner.works[0].secrets == {"openai": key}
    assert key not in json.dumps(workers.calls)


async def test_a_bound_secret_is_masked_on_the_host_and_its_placeholder_is_not(clock: ManualClock) -> None:
    workers, key, place = Workers(finish={"accepted": []}), "sk-canary-of-the-org-1", placeholder_of("r", "a")
    bound = BoundSecret("openai", key, "https://api.openai.com", None, place)
    taken = replace(TAKEN, work=replace(TAKEN.work, secrets={"openai": place}, bound=(bound,)))
    host = Host(clock, workers, Runner(Succeeded(json.dumps([key, place]))))

    ended = await host.attempt(taken)
    await host.store.finish([ended])

    assert host.runner.works[0].bound == (bound,)
    assert key not in json.dumps(workers.calls)
    assert place in json.dumps(workers.calls)


@pytest.mark.parametrize("brokered", [True, False])
async def test_a_host_without_a_broker_does_not_call_a_handler_with_a_bound_secret(
    clock: ManualClock, brokered: bool
) -> None:
    """The worker believes a failure; it could not check that the host refuses for that reason."""
    bound = BoundSecret("openai", "sk-canary-of-the-org-1", "https://api.openai.com", None, "placeholder")
    work = replace(TAKEN.work, secrets={"openai": "placeholder"}, bound=(bound,))
    host = Host(clock, Workers())
    host.tools = replace(host.tools, brokered=brokered)

    ended = await host.attempt(replace(TAKEN, work=work))

    assert (ended.state, len(host.runner.works)) == (("succeeded", 1) if brokered else ("failed", 0))
    if ended.error is not None:
        assert ended.error["message"].startswith("the secret openai is bound, and no broker is here")
        assert "canary" not in str(ended)


async def test_a_result_that_the_workers_reject_is_reported_as_that(clock: ManualClock) -> None:
    workers = Workers(finish={"accepted": [RUN.id]})
    host = Host(clock, workers)

    await host.store.finish([unstorable(await host.attempt(), ValueError("no"))])

    (end,) = wire.rows_of(workers.sent("finish")[0], "ends", END)
    assert isinstance(end.outcome, Failed)
    assert (end.outcome.reason, end.outcome.detail) == ("result_unstorable", "ValueError")


async def test_a_handler_that_is_not_installed_any_more_is_not_called(clock: ManualClock) -> None:
    host = Host(clock, Workers())

    ended = await host.attempt(replace(TAKEN, work=replace(TAKEN.work, handler="acme.gone")))

    assert ended.returned == outcomes.NoHandler("acme.gone")
    assert host.runner.works == []


async def test_inline_code_needs_the_hosts_own_permission(clock: ManualClock) -> None:
    host = Host(clock, Workers())
    host.tools.handlers._inline = frozenset()

    ended = await host.attempt(replace(TAKEN, run=replace(RUN, isolation="inline")))

    assert isinstance(ended.returned, outcomes.NoHandler)


@pytest.mark.parametrize(
    ("network", "decided", "lists"),
    [
        ("auto", (("api",),), (("api",),)),
        ("auto", (), ()),
        ("require", (), (("api",),)),
        ("open", (("api",),), ()),
    ],
)
async def test_what_a_run_reaches_is_the_workers_to_decide_and_the_hosts_to_narrow(
    clock: ManualClock, network: Any, decided: tuple[tuple[str, ...], ...], lists: tuple[tuple[str, ...], ...]
) -> None:
    host = Host(clock, Workers())
    host.tools = replace(host.tools, network=NetworkPolicy(network))
    taken = replace(TAKEN, work=replace(TAKEN.work, egress=Egress(decided, audiences=("mcp",))))

    await host.attempt(taken)

    reached = host.runner.works[0].egress
    assert (reached.lists, reached.audiences) == (lists, ("mcp",))
    # Inline it is in the host's own process, which cannot be sealed.
    ended = await host.attempt(replace(taken, run=replace(RUN, isolation="inline")))
    assert (len(host.runner.works), ended.outcome) == ((1, "failed") if lists else (2, "succeeded"))


async def test_a_run_that_is_cancelled_before_it_starts_is_not_started(clock: ManualClock) -> None:
    host = Host(clock, Workers())
    inflight = host.took()
    inflight.stop.request("cancel", 1)

    ended = await hosted_attempt(inflight, host.tools)

    assert ended.returned == outcomes.Cancelled("requested")
    assert host.runner.works == []


async def test_a_large_batch_is_sent_in_parts(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "PART", 2_000 / wire.BODY_BYTES["store"])
    workers = Workers(store=lambda message: {"stored": [[row["run"], 1] for row in message["steps"]]})
    host = Host(clock, workers)
    step = replace(STEP, result_json=f'"{"x" * 900}"')
    rows = [sent_row(admitted(f"r{n}"), step) for n in range(5)]

    assert await host.store.store_steps(rows) == {(f"r{n}", 1) for n in range(5)}
    assert [len(message["steps"]) for message in workers.sent("store")] == [1, 1, 1, 1, 1]


async def test_handlers_are_sent_in_parts_and_again_to_a_worker_that_asks_for_them_later(
    clock: ManualClock,
) -> None:
    answers: list[Any] = [{}, (503, "busy"), (503, "busy"), {}]
    workers = Workers(handlers=lambda message: answers.pop(0))
    host = Host(clock, workers)
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    host.store.sleep = sleep
    schema = {"x": "y" * 200_000}
    entries = [HandlerEntry(f"acme.h{n}", "acme", "1", "a:b", params_schema=schema) for n in range(5)]

    await host.store.put(entries)

    sent = [[entry["name"] for entry in message["entries"]] for message in workers.sent("handlers")]
    assert sent == [["acme.h0", "acme.h1", "acme.h2"], *[["acme.h3", "acme.h4"]] * 3]
    assert slept == [5.0, 5.0]


async def test_a_host_that_may_not_register_yet_tries_later(clock: ManualClock) -> None:
    """As one of the previous release does: it does not end, as it would without its token."""
    host = Host(clock, Workers(register=(429, "too_many_requests")))

    with pytest.raises(ControlUnavailable) as raised:
        await host.store.register(wire.Registration("h", 1, "1", {"child": 1}))
    assert not isinstance(raised.value, ControlDenied)


async def test_a_batch_that_is_too_large_for_the_workers_is_dropped(clock: ManualClock) -> None:
    """An older host's: it would send it again and again, and never the lines after it."""
    workers = Workers(logs=(409, "lease_lost"), progress=(409, "lease_lost"))
    host = Host(clock, workers)
    host.took()

    await host.store.append_logs([LogLine(RUN.id, 2, 1, RUN.org_id, clock.now(), "info", "log", "x")])
    await host.store.write_progress([(RUN.id, RUN.fencing_token, {"done": 1, "total": 2, "note": None})])

    assert [name for name, _ in workers.calls] == ["logs", "progress"]


async def test_an_end_waits_for_the_lines_of_its_run(clock: ManualClock) -> None:
    """While no worker answers, both wait; the one that answers first must not get the end first."""
    host = Host(clock, workers := Workers(logs=(503, "unavailable"), finish={"accepted": [RUN.id]}))
    ended, run_log = await host.attempt(), host.tools.run_log
    run_log.line(RUN, "error", "log", "the last words")
    await run_log.flush_run(RUN)

    with pytest.raises(Unavailable):
        await host.tools.finish([ended])
    workers.answers["logs"] = {}
    await run_log.flush()

    assert await host.tools.finish([ended]) == {RUN.id}
    assert [name for name, _ in workers.calls] == ["logs", "logs", "finish"]
    assert [line["text"] for line in workers.sent("logs")[1]["lines"]] == ["the last words"]


async def test_lines_of_a_run_that_is_not_held_are_dropped(clock: ManualClock) -> None:
    host = Host(clock, workers := Workers())

    await host.store.append_logs([LogLine(RUN.id, 1, 1, RUN.org_id, clock.now(), "info", "log", "late")])

    assert workers.calls == []


async def test_an_attempt_that_comes_after_it_was_handed_back_is_not_started(clock: ManualClock) -> None:
    """Its worker was stopped while it answered; the run may already have another attempt, even here."""
    answer = {"attempts": [wire.taken_message(TAKEN)]}
    host = Host(clock, Workers(take=answer, hand_back={"runs": [RUN.id]}))
    assert [taken.run for taken in await host.store.take({"child": 1}, 0)] == [RUN]

    host.inflight_runs.hand_back([OwnedRun(RUN.id, RUN.fencing_token, None)])

    assert await host.store.take({"child": 1}, 0) == []


async def test_an_attempt_that_is_older_than_the_one_held_is_not_started(clock: ManualClock) -> None:
    host = Host(clock, Workers(take={"attempts": [wire.taken_message(TAKEN)]}))
    host.inflight_runs.add(replace(RUN, fencing_token=RUN.fencing_token + 1))

    assert await host.store.take({"child": 1}, 0) == []


async def test_a_host_that_was_removed_has_lost_its_lease(clock: ManualClock) -> None:
    assert Host(clock, Workers(renew=(403, "denied"))).store.renew() == (False, [])


async def test_what_a_removed_host_still_sends_counts_for_nothing(clock: ManualClock) -> None:
    """It is not repeated: the host would not end before its drain is over."""
    denied = (403, "denied")
    host = Host(clock, Workers(finish=denied, save=denied, store=denied, logs=denied, progress=denied))
    ended = await host.attempt()

    assert await host.store.finish([ended]) == set()
    assert await host.store.store_steps([sent_row(RUN, STEP)]) == set()
    with pytest.raises(LeaseLost):
        await host.ask(Save("1"))
    await host.store.append_logs([LogLine(RUN.id, 1, 1, RUN.org_id, clock.now(), "info", "log", "late")])
    await host.store.write_progress([(RUN.id, RUN.fencing_token, {"done": 1, "total": 2, "note": None})])


async def test_runs_whose_admission_was_not_answered_wait_again_after_a_drain(clock: ManualClock) -> None:
    other = OwnedRun(admitted("r2").id, 4, None)
    owned = wire.renewed_message(True, [OwnedRun(RUN.id, RUN.fencing_token, None), other])
    host = Host(clock, workers := Workers(renew=owned, hand_back={"runs": ["r2"]}))
    host.took()

    await host.store.hand_back_rest()

    assert wire.rows_of(workers.sent("hand_back")[0], "runs", wire.FENCE) == [
        wire.Fence(other.id, other.fencing_token)
    ]


class Tracer:
    """Keeps the attempts whose spans it makes."""

    records_texts = False

    def __init__(self) -> None:
        self.traced: list[Traced] = []

    def hand_over(self, run_id: str, fencing_token: int, parent: str | None = None) -> str | None:
        return f"00-{run_id}-{fencing_token}"

    def marks(self, run_id: str, fencing_token: int) -> Marks:
        return Marks()

    def end(self, traced: Traced, marks: Marks) -> None:
        self.traced.append(traced)


@pytest.mark.parametrize("of_worker", [None, "00-of-the-worker"])
async def test_a_host_traces_attempts_that_its_workers_do_not(
    clock: ManualClock, of_worker: str | None
) -> None:
    stop, host = tracing.use(tracer := Tracer()), Host(clock, Workers())
    try:
        await host.attempt(replace(TAKEN, work=replace(TAKEN.work, traceparent=of_worker)))
    finally:
        stop()

    assert host.runner.works[0].traceparent == (of_worker or f"00-{RUN.id}-{RUN.fencing_token}")
    assert [(one.org, one.definition, one.outcome) for one in tracer.traced] == (
        [] if of_worker else [("org_acme", "nightly", "succeeded")]
    )


# ---- taking


class Requests:
    """Requests that wait until they are answered."""

    def __init__(self) -> None:
        self.open: list[tuple[Mapping[str, int], asyncio.Future[list[Taken]]]] = []
        self.waits: list[float] = []

    async def take(self, free: Mapping[Any, int], wait: float) -> list[Taken]:
        self.waits.append(wait)
        answer: asyncio.Future[list[Taken]] = asyncio.get_running_loop().create_future()
        self.open.append((dict(free), answer))
        return await answer

    @property
    def free(self) -> list[Mapping[str, int]]:
        return [free for free, answer in self.open if not answer.done()]


class Slots:
    def __init__(self, clock: ManualClock) -> None:
        self.requests, self.inflight_runs = Requests(), InflightRuns()
        self.offers, self.readies = True, 0
        self.taking = Taking(
            self.requests,
            self.inflight_runs,
            clock,
            slots={"child": 2, "inline": 1},
            poll=0.01,
            offers=lambda: self.offers,
            start=self.start,
            on_taking=self.ready,
        )

    def start(self, attempts: Any) -> None:
        for taken in attempts:
            self.inflight_runs.add(taken.run)

    def ready(self) -> None:
        self.readies += 1

    async def turn(self) -> None:
        self.taking.wake.set()
        await settle()


@pytest.fixture
async def slots(clock: ManualClock) -> Any:
    slots = Slots(clock)
    running = asyncio.create_task(slots.taking.run())
    await settle()
    yield slots
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_one_request_is_open_while_each_kind_of_free_slot_has_one(slots: Slots) -> None:
    assert slots.requests.free == [{"child": 2, "inline": 1}]
    assert slots.requests.waits == [WAIT]

    await slots.turn()
    assert len(slots.requests.open) == 1


async def test_a_kind_that_becomes_free_is_asked_for_at_once(slots: Slots) -> None:
    runs = [replace(TAKEN, run=admitted(f"r{n}")) for n in range(2)]
    slots.requests.open[0][1].set_result(runs)
    await slots.turn()
    assert slots.requests.free == [{"child": 0, "inline": 1}]

    held = slots.inflight_runs.get(runs[0].run.id)
    assert held is not None
    slots.inflight_runs.release(held)
    await slots.turn()

    assert slots.requests.free == [{"child": 0, "inline": 1}, {"child": 1, "inline": 0}]
    assert slots.readies == 1


async def test_nothing_is_taken_before_there_is_a_handler(clock: ManualClock) -> None:
    slots = Slots(clock)
    slots.offers = False
    running = asyncio.create_task(slots.taking.run())
    await settle()
    assert slots.requests.open == []

    slots.offers = True
    await slots.turn()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)

    assert len(slots.requests.open) == 1
    assert slots.requests.open[0][1].cancelled()  # by the drain


STEP = NewStep("fetch", None, 1, 1, '{"n":1}', CLAIMS.issued_at, CLAIMS.issued_at + timedelta(seconds=1))


OF_EACH: Mapping[str, Any] = {
    "save": ("1",),
    "store": (STEP,),
    "wait": (NewWait("nap", 1, "sleep", 1.0),),
    "choose": (NewWait("approval", 1, "answer", options=("yes", "no")),),
    "wait_children": (NewWait("children:gather", 1, "children", children=ChildrenWait(((1, 2),))),),
    "start_children": ((NewChild("acme.page", None, 1, "{}"),),),
    "children": ((1, 2),),
    "ended_children": (((1, 2),),),
    "spend": ("llm", 1, "1:1"),
    "token_for": (False, "https://billing.example.com"),
    "limits": ("https://api.example.com",),
    "share": ("0190",),
    "pause": ("https://api.example.com", 5.0),
}


# A notice without an answer, such as a span, fails nothing.
@pytest.mark.parametrize("name", [name for name, kind in CALLS.items() if not issubclass(kind, OneWayCall)])
async def test_a_call_that_the_workers_do_not_know_is_an_error_of_the_handler(
    clock: ManualClock, name: str
) -> None:
    """The control is a call that they know and refuse."""
    call = CALLS[name](*OF_EACH.get(name, ()))
    error = {"code": "invalid", "message": f"there is no call {name}"}
    workers = Workers(**{name: lambda message: {"error": error}})
    host = Host(clock, workers)
    host.took()

    with pytest.raises(StepError, match=f"does not know the call {name}; upgrade the workers before"):
        await host.ask(call)

    assert [name for name, _ in workers.calls] == [name]
    error["message"] = f"not a valid {name}: it is so"
    with pytest.raises(StepError if call.way.batch else Malformed, match=r"it is so|\(Malformed\)"):
        await host.ask(call)


async def test_a_wait_with_options_is_not_sent_to_a_worker_that_would_ignore_them(clock: ManualClock) -> None:
    """The control: as a key of `wait` such a worker ignores them, and takes any answer."""
    state = {"state": {"kind": "answer", "state": "pending", "answer_json": None, "until": None}}
    workers = Workers(wait=state, choose=state)
    host = Host(clock, workers)
    host.took()

    assert (await host.ask(OpenWait(*OF_EACH["choose"]))).state == "pending"

    assert workers.sent("wait") == []
    assert [call["wait"]["options"] for call in workers.sent("choose")] == [["yes", "no"]]
    assert (await host.store.control.call("wait", workers.sent("choose")[0])) == state


async def test_what_is_denied_on_a_host_is_left_to_its_worker_to_report(
    clock: ManualClock, emitted: list[Emitted]
) -> None:
    """The worker has the alerts: it reports what comes with the end, with the reason."""

    async def during(services: RunServices, stop: StopSignal) -> None:
        services.denied("https://evil.test", "not listed in egress of its @job(...)")
        services.egress([asdict(EgressRow("https://evil.test", denied=1))])

    host = Host(clock, Workers(), Runner(during=during))
    ended = await host.attempt()

    assert [one for one in emitted if one.event.name == "egress.denied"] == []
    [row] = ended.trail.egress
    assert (row.denied, row.reason) == (1, "not listed in egress of its @job(...)")
