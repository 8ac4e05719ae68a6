"""Traces of a real worker, as a collector on loopback receives them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.fakes.collector import Collector, trace_of
from tests.fakes.site import Site, application, definition
from worker.demo.serving import ServerThread, bind_loopback

SECRET = "canary-secret-of-acme"
KEY = "canary-key-of-the-collector"


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.server.stop()


@pytest.fixture
def api() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A customer's API: its URL, and the headers of each request to it."""
    headers: list[dict[str, str]] = []

    async def answer(request: Request) -> Response:
        headers.append(dict(request.headers))
        return JSONResponse({})

    with ServerThread(Starlette(routes=[Route("/", answer)]), bind_loopback()) as server:
        yield f"{server.url}/", headers


@pytest.fixture
def traced_site(site: Site, collector: Collector) -> Site:
    """An installation whose worker sends its spans to the collector."""
    site.environment["OTEL_BSP_SCHEDULE_DELAY"] = "200"
    wanted = f'enabled = true\nendpoint = "{collector.endpoint}"\nheaders = "authorization=Bearer {KEY}"'
    site.configure(execution='inline = ["acme-jobs"]', extra=f"[tracing]\n{wanted}")
    return site


@pytest.mark.feature("egress")
def test_a_run_arrives_as_a_trace_that_its_handlers_own_calls_join(traced_site, collector, api, journal):
    site, (url, headers) = traced_site, api
    site.add_orgs(application("org_acme", flags={"beta": True, "agent-v2": True}))
    site.apply(
        definition(
            "org_acme",
            "chosen",
            "acme.note",
            params={"url": url, "journal": str(journal)},
            requires_flag="beta",
            variants=[{"flag": "agent-v2", "handler": "acme.traced"}],
            api_origins=[url.rstrip("/")],
        )
        + definition(
            "org_acme", "inline", "acme.traced_inline", params={"url": url}, api_origins=[url.rstrip("/")]
        )
    )
    site.start_worker()
    site.cli("definitions", "run", "org_acme", "chosen")
    chosen = site.wait_for_end(definition="chosen")
    site.cli("definitions", "run", "org_acme", "inline")
    inline = site.wait_for_end(definition="inline")

    spans = trace_of(collector, chosen["id"])
    root, token, handler = spans["RUN acme.note"], spans["token"], spans["handler"]
    sent = spans["GET"]
    assert len(spans) == 4
    assert (sent.parent, sent.attributes["http.response.status_code"]) == (handler.id, "200")
    assert not {"url.full", "url.path"} & sent.attributes.keys()
    assert (root.parent, token.parent, handler.parent) == ("", root.id, root.id)
    assert not any(span.failed for span in spans.values())
    assert root.resource["service.name"] == "orgworker"
    assert root.attributes["cicd.pipeline.name"] == "acme.note"
    assert root.attributes["cicd.pipeline.result"] == "success"
    assert root.attributes["orgworker.handler"] == "acme.traced"
    assert [(name, told["feature_flag.key"]) for name, told in root.events] == [
        ("feature_flag.evaluation", "beta"),
        ("feature_flag.evaluation", "agent-v2"),
    ]
    assert handler.attributes["cicd.pipeline.task.name"] == "handler"
    place = f"00-{handler.trace}-{handler.id}-01"
    assert (chosen["state"], chosen["result"]) == ("succeeded", place)
    of_inline = trace_of(collector, inline["id"])["handler"]
    assert of_inline.trace != handler.trace
    assert [each["traceparent"] for each in headers] == [place, f"00-{of_inline.trace}-{of_inline.id}-01"]


def test_no_secret_and_no_token_travels_in_a_span(traced_site, collector, provider, journal):
    provider.issued.clear()
    site = traced_site
    site.add_orgs(application("org_acme", client_secret=SECRET))
    site.add_orgs(application("org_dead"), secret=SECRET)
    site.apply(
        definition("org_acme", "leak", "acme.leak", params={"journal": str(journal)})
        + definition("org_acme", "leak-result", "acme.leak_result")
        + definition("org_dead", "note", "acme.note", params={"journal": str(journal)})
    )
    worker = site.start_worker()
    for org, name in (("org_acme", "leak"), ("org_acme", "leak-result"), ("org_dead", "note")):
        site.cli("definitions", "run", org, name)
    failed, succeeded = site.wait_for_end(definition="leak"), site.wait_for_end(definition="leak-result")
    waiting = site.wait_for_state("note", "waiting")

    leaking = trace_of(collector, failed["id"])
    without_token = trace_of(collector, waiting["id"])
    assert trace_of(collector, succeeded["id"])
    assert site.stop_worker(worker) == 0
    assert leaking["RUN acme.leak"].failed
    assert leaking["handler"].attributes["error.type"] == "RuntimeError"
    assert set(without_token) == {"RUN acme.note", "token"}
    assert without_token["token"].failed
    assert provider.issued
    tokens = [form for token in provider.issued for form in (token, token.rpartition(".")[2])]
    sent = b"".join(collector.bodies)
    assert [canary for canary in (SECRET, KEY, *tokens) if canary.encode() in sent] == []
    assert {each["authorization"] for each in collector.headers} == {f"Bearer {KEY}"}
    assert KEY not in site.log_text() + site.cli("config", "show").out


def test_traces_without_the_extra_are_a_fault_of_the_settings_that_names_it(site):
    absent = site.plugins / "opentelemetry"
    absent.mkdir()
    (absent / "__init__.py").write_text("raise ModuleNotFoundError(name=__name__)\n")
    site.configure(extra="[tracing]\nenabled = true")
    site.may_fork = False  # a fork has imported the real one

    worker = site.start_worker()

    assert worker.wait(timeout=20) == 78
    assert "its extra otel" in site.log_text()
    assert "tracing.enabled" in site.log_text()
