"""What a running handler reports of its steps: within limits, masked, and never longer than its attempt."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import pytest

from tests.fakes.clock import START, ManualClock
from tests.unit.engine.runs import admitted
from worker.engine.attempt import answers
from worker.engine.attempt.answers import Running, SpanRoom
from worker.engine.attempt.inflight import InflightRun, trace_step
from worker.engine.runners.contract import StopSignal
from worker.errors import LeaseLost
from worker.handlers.calls import Call, TraceStep
from worker.handlers.span_parts import TEXT_LIMIT
from worker.model.runs.outcome import Trail
from worker.telemetry import genai, tracing
from worker.telemetry.masking import MASK
from worker.telemetry.tracing import MAX_REPLAYED, MAX_STEPS, Detail, StepSpan, TracedStep

SECRET = "canary-secret-of-the-org-0123456789"
SPAN = StepSpan("fetch", "key", 1, START, START)


class Attempt:
    """A running handler, and the spans that are made of its steps."""

    def __init__(self, clock: ManualClock, detail: Detail = "texts") -> None:
        self.made: list[StepSpan] = []
        self.inflight = InflightRun(admitted(started_at=START), StopSignal())
        given: Any = self.inflight, Trail("h"), self, None, clock
        self.running = Running(*given, spans=SpanRoom.of(detail))

    async def act(self, call: Call[Any], of: Running) -> Any:
        self.made.append(cast(TraceStep, call).span)

    def tell(self, *spans: StepSpan) -> None:
        for span in spans:
            self.running.tell(TraceStep(span))

    async def trace(self, *spans: StepSpan) -> list[StepSpan]:
        self.tell(*spans)
        await self.inflight.stored()
        return self.made


async def test_a_secret_of_the_run_is_in_no_text_of_a_span(clock: ManualClock) -> None:
    about = {genai.TOOL: SECRET, genai.FINISH_REASONS: (SECRET,)}
    texts = {genai.RESULT: "x" * (TEXT_LIMIT - 10) + SECRET, genai.INPUT: f"say {SECRET}" * 1500}
    span = replace(SPAN, name=SECRET, key=SECRET, error=SECRET, about=about, texts=texts)

    [without] = await Attempt(clock).trace(span)  # the control
    attempt = Attempt(clock)
    attempt.inflight.hold_secrets({"openai": SECRET})
    [made] = await attempt.trace(span)
    attempt.inflight.drop_tokens()

    assert SECRET in str(without)
    assert SECRET[:12] not in str(made)
    assert (made.name, made.error, made.about[genai.FINISH_REASONS]) == (MASK, MASK, (MASK,))
    assert all(TEXT_LIMIT - 10 < len(text) <= TEXT_LIMIT for text in made.texts.values())


async def test_an_attempt_ends_only_once_its_spans_are_masked(clock: ManualClock) -> None:
    """Long texts are masked in a thread, and with the end the masks of the run's secrets go."""
    attempt = Attempt(clock)
    attempt.inflight.hold_secrets({"openai": SECRET})

    made = await attempt.trace(*[replace(SPAN, texts={genai.RESULT: SECRET + "y" * 20_000})] * 5)
    attempt.inflight.drop_tokens()

    assert (len(made), SECRET in str(made)) == (5, False)


@pytest.mark.parametrize(
    ("detail", "made"),
    [("none", []), ("steps", [(None, {})]), ("texts", [("key", {genai.RESULT: "said"})])],
)
async def test_a_process_reports_no_more_than_it_was_asked_for(
    clock: ManualClock, detail: Detail, made: list[Any]
) -> None:
    attempt = Attempt(clock, detail)

    spans = await attempt.trace(replace(SPAN, texts={genai.RESULT: "said"}))

    assert [(span.key, span.texts) for span in spans] == made


async def test_a_flood_is_cut_before_it_costs_anything(clock: ManualClock) -> None:
    attempt = Attempt(clock)
    replayed = replace(SPAN, replayed=True)

    attempt.tell(*[SPAN, replayed] * 5000)
    waiting = len(attempt.inflight.storing or ())
    await attempt.inflight.stored()

    assert waiting == len(attempt.made) == MAX_STEPS + MAX_REPLAYED


async def test_texts_have_a_limit_for_all_spans_of_an_attempt(clock: ManualClock) -> None:
    attempt = Attempt(clock)
    attempt.running.spans = SpanRoom("texts", texts=25)

    made = await attempt.trace(*[replace(SPAN, texts={genai.RESULT: "x" * 10})] * 3)

    assert [len(span.texts) for span in made] == [1, 1, 0]


async def test_times_are_those_of_the_attempt(clock: ManualClock) -> None:
    clock.advance(10)
    day = timedelta(days=1)

    [made] = await Attempt(clock).trace(replace(SPAN, started_at=START - day, ended_at=START + day))

    assert (made.started_at, made.ended_at) == (START, START + timedelta(seconds=10))


async def test_a_worker_that_does_not_answer_delays_no_end(
    clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "TRACED_WITHIN", 0.01)
    attempt = Attempt(clock)

    async def hang(call: Any, of: Any) -> None:
        await asyncio.Event().wait()

    async def lost(call: Any, of: Any) -> None:
        raise LeaseLost("the run has ended")

    for act in (hang, lost):
        monkeypatch.setattr(attempt, "act", act)
        assert await attempt.trace(SPAN) == []


async def test_a_run_that_is_lost_reports_nothing(clock: ManualClock) -> None:
    attempt = Attempt(clock)
    attempt.inflight.stop.kill()

    with pytest.raises(LeaseLost):
        attempt.tell(SPAN)

    assert attempt.made == []


@pytest.fixture
def tracer() -> Iterator[list[TracedStep]]:
    made: list[TracedStep] = []
    stop = tracing.use(cast(Any, type("Tracer", (), {"step": staticmethod(made.append)})))
    yield made
    stop()


def test_a_span_says_whose_it_is_by_what_the_worker_knows(tracer: list[TracedStep]) -> None:
    run = admitted(attempt=3)
    inflight = InflightRun(run, StopSignal())
    trace_step(SPAN, inflight)  # of an attempt whose plan is not known
    inflight.org_code, inflight.definition, inflight.parent_trace = "org_acme", "nightly", "00-a-b-01"

    trace_step(SPAN, inflight)

    assert tracer == [TracedStep(run.id, 3, run.fencing_token, "org_acme", "nightly", SPAN, "00-a-b-01")]
