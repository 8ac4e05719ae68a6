"""The spans of steps: as the GenAI conventions name them, within limits, without texts unless asked for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.trace import SpanKind, StatusCode

from tests.fakes.clock import START, ManualClock
from tests.unit.telemetry.test_otel import TRACED, Collected
from worker.ids import new_id
from worker.telemetry import genai, otel, tracing
from worker.telemetry.tracing import StepSpan, TracedStep, detail

ASKED = StepSpan(
    "model:support",
    "1/1",
    1,
    START + timedelta(seconds=3),
    START + timedelta(seconds=5),
    about={
        genai.OPERATION: genai.CHAT,
        genai.PROVIDER: "openai",
        genai.REQUEST_MODEL: "gpt-5-mini",
        genai.INPUT_TOKENS: 100,
        genai.FINISH_REASONS: ("stop",),
    },
    texts={genai.INPUT: '[{"role":"user"}]'},
)
PLAIN = StepSpan("fetch", None, 2, START, START + timedelta(seconds=1))


@pytest.fixture
def collected(clock: ManualClock) -> Iterator[Collected]:
    made = Collected(clock)
    yield made
    made.tracer.close()


def traced(span: StepSpan, parent: str | None = None) -> TracedStep:
    return TracedStep(TRACED.run_id, 2, TRACED.fencing_token, "org_acme", "nightly", span, parent)


def carry(collected: Collected, *spans: StepSpan) -> dict[str, ReadableSpan]:
    """The spans of an attempt that has these steps."""
    collected.tracer.hand_over(TRACED.run_id, TRACED.fencing_token)
    for span in spans:
        collected.tracer.step(traced(span))
    collected.tracer.end(TRACED, collected.tracer.marks(TRACED.run_id, TRACED.fencing_token))
    return collected.spans()


def test_all_names_are_those_of_the_pinned_conventions() -> None:
    pinned = {
        value
        for name, value in inspect.getmembers(gen_ai_attributes)
        if name.startswith("GEN_AI_") and isinstance(value, str)
    }
    operations = {each.value for each in gen_ai_attributes.GenAiOperationNameValues}
    providers = {each.value for each in gen_ai_attributes.GenAiProviderNameValues}

    assert genai.ATTRIBUTES.keys() | genai.TEXTS <= pinned
    assert "gen_ai.system" not in genai.ATTRIBUTES
    assert genai.NAMED_BY.keys() <= operations
    assert set(genai.PROVIDERS.values()) <= providers


def test_a_model_request_is_a_client_span_below_the_handlers(collected: Collected) -> None:
    spans = carry(collected, ASKED)

    asked, handler = spans["chat gpt-5-mini"], spans["handler"]
    assert (asked.kind, asked.parent.span_id) == (SpanKind.CLIENT, handler.context.span_id)
    assert asked.context.trace_id == handler.context.trace_id
    assert dict(asked.attributes) == {
        **ASKED.about,
        "cicd.pipeline.run.id": TRACED.run_id,
        "orgworker.org": "org_acme",
        "orgworker.definition": "nightly",
        "orgworker.attempt": 2,
        "orgworker.step": "model:support",
        "orgworker.step.occurrence": 1,
    }


def test_a_tool_call_and_a_plain_step_are_internal_and_named_by_tool_and_step(collected: Collected) -> None:
    about = {genai.OPERATION: genai.EXECUTE_TOOL, genai.TOOL: "look_up"}
    unknown = {genai.OPERATION: "invented", genai.TOOL: "look_up"}
    spans = carry(
        collected,
        replace(ASKED, about=about),
        PLAIN,
        replace(PLAIN, name="failed", error="E" * 200),
        replace(PLAIN, name="odd", about=unknown),
        replace(PLAIN, name="nameless", about={genai.OPERATION: genai.CHAT}),
    )

    assert spans["execute_tool look_up"].kind is spans["fetch"].kind is SpanKind.INTERNAL
    assert {"odd", "nameless"} <= spans.keys()
    failed = spans["failed"]
    assert (failed.status.status_code, failed.attributes["error.type"]) == (
        StatusCode.ERROR,
        "E" * otel.MAX_ERROR,
    )


@pytest.mark.parametrize("records_texts", [False, True])
def test_texts_and_keys_need_the_operators_word(clock: ManualClock, records_texts: bool) -> None:
    """Whatever a run's process sends."""
    collected = Collected(clock, records_texts=records_texts)

    asked = carry(collected, ASKED)["chat gpt-5-mini"]

    found = {genai.INPUT, "orgworker.step.key"} & asked.attributes.keys()
    assert found == ({genai.INPUT, "orgworker.step.key"} if records_texts else set())


def test_a_stored_result_is_an_event_of_the_attempts_span(
    collected: Collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(otel, "MAX_REPLAYED", 2)
    replayed = [replace(PLAIN, replayed=True, name=name) for name in "abc"]

    spans = carry(collected, *replayed)

    assert spans.keys() == {"RUN acme.digest", "token", "handler"}
    events = [each for each in spans["RUN acme.digest"].events if each.name == "orgworker.step.replayed"]
    assert [dict(each.attributes) for each in events] == [
        {"orgworker.step": name, "orgworker.step.occurrence": 2} for name in "ab"
    ]


def test_a_step_of_a_child_run_is_in_the_trace_of_its_parent(collected: Collected) -> None:
    parent = collected.tracer.hand_over(TRACED.run_id, TRACED.fencing_token)
    given = collected.tracer.hand_over("child", 1, parent)
    collected.tracer.step(replace(traced(PLAIN, parent), run_id="child", fencing_token=1))

    fetch = collected.spans()["fetch"]
    assert given == f"00-{fetch.context.trace_id:032x}-{fetch.parent.span_id:016x}-01"


def test_one_attempt_has_a_thousand_spans_of_steps_and_keeps_out_no_other(
    collected: Collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(otel, "MAX_STEPS", 3)
    for number in range(5):
        collected.tracer.step(traced(replace(PLAIN, name=f"mine-{number}")))
    collected.tracer.step(replace(traced(replace(PLAIN, name="of-another")), run_id=new_id()))

    assert sorted(collected.spans()) == ["mine-0", "mine-1", "mine-2", "of-another"]


def test_an_attempt_that_is_not_sampled_reports_nothing(
    clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    collected = Collected(clock)
    stop = tracing.use(collected.tracer)

    place = tracing.traceparent(TRACED.run_id, TRACED.fencing_token)
    reported = detail(place)
    stop()

    assert (place is not None and place[-3:], reported) == ("-00", "none")
    assert carry(collected, PLAIN) == {}


@pytest.mark.parametrize(("records_texts", "wanted"), [(False, "steps"), (True, "texts")])
def test_what_is_reported_follows_from_the_tracer(
    clock: ManualClock, records_texts: bool, wanted: str
) -> None:
    tracer: Any = Collected(clock, records_texts=records_texts).tracer
    assert (detail("00-a-b-01"), detail()) == ("none", "none")

    stop = tracing.use(tracer)
    reported = detail("00-a-b-01"), detail(), detail(None)
    stop()

    assert reported == (wanted, wanted, "none")
