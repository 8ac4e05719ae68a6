"""The spans of an attempt, by the semantic conventions, kept in memory instead of sent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import (
    cicd_attributes,
    error_attributes,
    feature_flag_attributes,
)
from opentelemetry.trace import SpanKind, StatusCode

from tests.fakes.clock import START, ManualClock
from worker.ids import new_id
from worker.store.tables import ATTEMPT_OUTCOMES
from worker.telemetry import otel, tracing
from worker.telemetry.events import emit, listen
from worker.telemetry.otel import OtelTracer
from worker.telemetry.tracing import BAD, RESULTS, Traced, TracedRequest

RUN = new_id()
TRACED = Traced(
    run_id=RUN,
    attempt=2,
    fencing_token=7,
    org="org_acme",
    issuer="main",
    definition="nightly",
    pipeline="acme.digest",
    handler="acme.digest_v2",
    origin="schedule",
    isolation="child",
    outcome="succeeded",
    state="succeeded",
    reason=None,
    error_type=None,
    started_at=START,
    token_ready_at=START + timedelta(seconds=2),
    ended_at=START + timedelta(seconds=9),
    flags=(("beta", True), ("agent-v2", True)),
)


class Collected:
    """A tracer and the spans that it would have sent."""

    def __init__(self, clock: ManualClock, **given: Any) -> None:
        self.clock = clock
        self.exporter = InMemorySpanExporter()
        self.tracer = OtelTracer(self.exporter, clock, version="1.2.3", **given)
        listen(self.tracer.hear)

    def carry(self, traced: Traced = TRACED, *, handed_over: bool = True) -> str | None:
        """The life of an attempt as the worker tells it; the traceparent that its handler got."""
        emit("run.admitted", run=traced.run_id, fencing_token=traced.fencing_token)
        self.clock.advance(3)
        parent = self.tracer.hand_over(traced.run_id, traced.fencing_token) if handed_over else None
        self.tracer.end(traced, self.tracer.marks(traced.run_id, traced.fencing_token))
        return parent

    def spans(self) -> dict[str, ReadableSpan]:
        self.tracer.close()
        return {span.name: span for span in self.exporter.get_finished_spans()}


@pytest.fixture
def collected(clock: ManualClock) -> Iterator[Collected]:
    made = Collected(clock)
    yield made
    made.tracer.close()


def seconds(span: ReadableSpan) -> tuple[float, float]:
    """From when to when, in seconds after the start."""
    start = START.timestamp() * 1e9
    return (span.start_time - start) / 1e9, (span.end_time - start) / 1e9


def test_an_attempt_is_a_span_with_one_for_its_token_and_one_for_its_handler(collected):
    collected.carry()

    spans = collected.spans()
    run, token, handler = spans["RUN acme.digest"], spans["token"], spans["handler"]
    assert (run.kind, token.kind, handler.kind) == (SpanKind.SERVER, SpanKind.INTERNAL, SpanKind.INTERNAL)
    assert run.parent is None
    assert token.parent.span_id == handler.parent.span_id == run.context.span_id
    assert len({span.context.trace_id for span in spans.values()}) == 1
    assert (seconds(run), seconds(token), seconds(handler)) == ((0, 9), (0, 2), (3, 9))


def test_the_spans_of_a_child_are_below_the_handler_that_started_it(collected):
    parent = collected.carry()
    child = replace(TRACED, run_id=new_id(), pipeline="acme.page", origin="child", parent=parent)
    given = collected.tracer.hand_over(child.run_id, child.fencing_token, parent)
    collected.tracer.end(child, collected.tracer.marks(child.run_id, child.fencing_token))

    spans = collected.spans()
    page, started_by = spans["RUN acme.page"], spans["RUN acme.digest"]
    assert page.context.trace_id == started_by.context.trace_id
    assert f"{page.parent.span_id:016x}" == parent.split("-")[2]
    assert given.split("-")[1] == parent.split("-")[1]


def test_spans_are_named_as_the_conventions_have_it(collected):
    collected.carry()

    spans = collected.spans()
    assert dict(spans["RUN acme.digest"].attributes) == {
        "cicd.pipeline.name": "acme.digest",
        "cicd.pipeline.action.name": "RUN",
        "cicd.pipeline.run.id": RUN,
        "cicd.pipeline.result": "success",
        "orgworker.org": "org_acme",
        "orgworker.definition": "nightly",
        "orgworker.handler": "acme.digest_v2",
        "orgworker.origin": "schedule",
        "orgworker.isolation": "child",
        "orgworker.attempt": 2,
        "orgworker.outcome": "succeeded",
        "orgworker.state": "succeeded",
    }
    assert dict(spans["handler"].attributes) == {
        "cicd.pipeline.task.name": "handler",
        "cicd.pipeline.task.run.id": f"{RUN}/2/handler",
        "cicd.pipeline.task.run.result": "success",
    }
    resource = spans["token"].resource.attributes
    assert (resource["service.name"], resource["service.version"]) == ("orgworker", "1.2.3")


def test_every_attribute_is_one_of_the_conventions_or_our_own(clock):
    """As the library that comes with the SDK has them."""
    known = {
        value
        for module in (cicd_attributes, feature_flag_attributes, error_attributes)
        for name, value in vars(module).items()
        if name.isupper()
    }
    collected = Collected(clock, dashboard_url="https://jobs.acme.test")
    collected.carry(replace(TRACED, outcome="failed", state="failed", reason="error", error_type="KeyError"))

    spans = collected.spans().values()
    used = {name for span in spans for name in span.attributes}
    used |= {name for span in spans for event in span.events for name in event.attributes}
    assert {name for name in used if not name.startswith("orgworker.")} <= known
    assert {one.split(".")[0] for one in used} == {"cicd", "feature_flag", "error", "orgworker"}
    assert set(RESULTS.values()) == {one.value for one in cicd_attributes.CicdPipelineResultValues}


def test_each_flag_that_was_evaluated_is_an_event_without_its_value(collected):
    collected.carry(replace(TRACED, flags=(("beta", True), ("agent-v2", False))))

    beta, agent = collected.spans()["RUN acme.digest"].events
    assert beta.name == agent.name == "feature_flag.evaluation"
    assert dict(beta.attributes) == {
        "feature_flag.key": "beta",
        "feature_flag.result.variant": "on",
        "feature_flag.provider.name": "main",
        "feature_flag.context.id": "org_acme",
    }
    assert agent.attributes["feature_flag.result.variant"] == "off"


def test_every_outcome_has_a_result_and_a_bad_one_is_an_error_with_its_type(collected):
    assert set(RESULTS) == set(ATTEMPT_OUTCOMES)

    for outcome in ATTEMPT_OUTCOMES:
        collected.carry(replace(TRACED, run_id=outcome, outcome=outcome, error_type="KeyError"))

    collected.tracer.close()
    runs = [span for span in collected.exporter.get_finished_spans() if span.parent is None]
    assert len(runs) == len(ATTEMPT_OUTCOMES)
    for run in runs:
        result = RESULTS[run.attributes["orgworker.outcome"]]
        assert run.attributes["cicd.pipeline.result"] == result
        assert (run.status.status_code is StatusCode.ERROR) == (result in BAD)
        assert ("error.type" in run.attributes) == (result in BAD)


def test_a_run_without_a_token_has_a_bad_token_span_and_none_of_a_handler(collected):
    lacking = replace(
        TRACED, outcome="no_token", state="waiting", token_ready_at=None, error_type="throttled"
    )
    collected.carry(lacking, handed_over=False)

    spans = collected.spans()
    assert set(spans) == {"RUN acme.digest", "token"}
    assert spans["token"].attributes["error.type"] == "throttled"
    assert seconds(spans["token"]) == (0, 9)


def test_the_handlers_traceparent_is_the_place_of_its_span(collected):
    parent = collected.carry()

    handler = collected.spans()["handler"].context
    assert parent == f"00-{handler.trace_id:032x}-{handler.span_id:016x}-01"


def test_the_attempts_of_a_run_lie_in_one_trace_and_those_of_another_in_another(collected):
    parents = [
        collected.carry(one).split("-")
        for one in (TRACED, replace(TRACED, attempt=3, fencing_token=8), replace(TRACED, run_id=new_id()))
    ]

    assert parents[0][1] == parents[1][1] != parents[2][1]
    assert len({parent[2] for parent in parents}) == 3


@pytest.mark.parametrize(
    ("sampler", "flag"), [("always_off", "00"), ("traceidratio", "00"), ("always_on", "01")]
)
def test_the_standard_variables_decide_what_is_sampled_and_the_handler_is_told(
    clock, monkeypatch, sampler, flag
):
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "night-shift")
    collected = Collected(clock)
    parent = collected.carry()

    spans = collected.spans()
    assert parent.endswith(f"-{flag}")
    assert (len(spans) == 3) == (flag == "01")
    assert all(span.resource.attributes["service.name"] == "night-shift" for span in spans.values())


def test_about_the_share_of_runs_is_sampled_that_is_asked_for(clock, monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.25")
    tracer = Collected(clock).tracer

    told = [tracer.hand_over(new_id(), 1)[-2:] for _ in range(2000)]

    tracer.close()
    assert 400 < told.count("01") < 600


def test_spans_name_the_page_of_their_run_where_the_dashboard_can_be_reached(clock):
    collected = Collected(clock, dashboard_url="https://jobs.acme.test/")
    collected.carry()

    spans = collected.spans()
    page = f"https://jobs.acme.test/runs/{RUN}"
    assert spans["RUN acme.digest"].attributes["cicd.pipeline.run.url.full"] == page
    assert spans["handler"].attributes["cicd.pipeline.task.run.url.full"] == page


def test_what_is_remembered_of_attempts_ends_with_them_and_is_bounded(collected, monkeypatch):
    monkeypatch.setattr(otel, "BOUND", 3)
    for number in range(5):
        emit("run.admitted", run=f"r{number}", fencing_token=1)
    emit("run.fenced_out", run="r4", fencing_token=1)

    marks = {f"r{number}": collected.tracer.marks(f"r{number}", 1) for number in range(5)}
    assert [run for run, each in marks.items() if each.token_began_at] == ["r2", "r3"]


SENT_AT = int(START.timestamp()) * 10**9
GET = TracedRequest("GET", "api.example.com", 443, SENT_AT, SENT_AT + 1_500_000_000, 200)


def request_spans(collected: Collected, *requests: TracedRequest) -> list[ReadableSpan]:
    """The spans of requests of an attempt that has ended."""
    emit("run.admitted", run=RUN, fencing_token=7)
    parent = collected.tracer.hand_over(RUN, 7)
    assert parent is not None
    for request in requests:
        collected.tracer.request(parent, request)
    collected.tracer.end(TRACED, collected.tracer.marks(RUN, 7))
    collected.tracer.close()
    return [span for span in collected.exporter.get_finished_spans() if span.kind is SpanKind.CLIENT]


def test_a_request_is_a_span_below_its_handlers_without_path_and_query(collected):
    (span,) = request_spans(collected, GET)

    by_name = {each.name: each for each in collected.exporter.get_finished_spans()}
    handler = by_name["handler"]
    assert (span.name, span.parent.span_id) == ("GET", handler.context.span_id)
    assert span.context.trace_id == handler.context.trace_id
    assert seconds(span) == (0, 1.5)
    assert dict(span.attributes) == {
        "http.request.method": "GET",
        "server.address": "api.example.com",
        "server.port": 443,
        "http.response.status_code": 200,
    }
    assert span.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize(
    ("changed", "error"),
    [({"status": 404}, "404"), ({"status": 503}, "503"), ({"status": None, "error": "timeout"}, "timeout")],
)
def test_a_request_that_failed_has_an_error_type(collected, changed: dict[str, Any], error: str):
    (span,) = request_spans(collected, replace(GET, **changed))

    assert span.attributes["error.type"] == error
    assert span.status.status_code is StatusCode.ERROR


def test_what_a_run_chooses_makes_no_name_and_no_long_attribute(collected):
    hostile = replace(GET, method="STEAL /token", host="h" * 9_000, status=None, error="e" * 9_000, ended=0)

    (span,) = request_spans(collected, hostile)

    assert (span.name, span.attributes["http.request.method"]) == ("HTTP", "_OTHER")
    assert len(span.attributes["server.address"]) == otel.MAX_HOST
    assert len(span.attributes["error.type"]) == otel.MAX_ERROR
    assert span.end_time == span.start_time


def test_a_run_with_many_requests_leaves_room_for_the_spans_of_others(collected, monkeypatch):
    monkeypatch.setattr(otel, "MAX_REQUESTS", 3)

    assert len(request_spans(collected, *[GET] * 10)) == 3


def test_requests_of_an_attempt_that_is_not_sampled_make_no_span(clock, monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")

    assert request_spans(Collected(clock), GET) == []


@pytest.mark.parametrize("parent", ["", "00-zz-1-01", "01-" + "a" * 32 + "-" + "b" * 16 + "-01"])
def test_a_request_without_a_valid_traceparent_makes_no_span(collected, parent: str):
    collected.tracer.request(parent, GET)

    assert collected.spans() == {}


def test_a_request_span_is_made_by_the_tracer_in_use(collected):
    tracing.request_span("00-" + "a" * 32 + "-" + "b" * 16 + "-01", GET)
    stop = tracing.use(collected.tracer)
    tracing.request_span(None, GET)
    tracing.request_span("00-" + "a" * 32 + "-" + "b" * 16 + "-01", GET)
    stop()

    assert list(collected.spans()) == ["GET"]
    assert len(collected.exporter.get_finished_spans()) == 1
