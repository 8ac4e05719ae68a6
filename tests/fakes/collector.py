"""An OTLP collector on loopback, and the spans that it receives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.fakes.site import wait_until
from worker.demo.serving import ServerThread, bind_loopback


@dataclass(frozen=True)
class ReceivedSpan:
    """A span; ids are in lower-case hex, `parent` is "" for a root."""

    name: str
    trace: str
    id: str
    parent: str
    attributes: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]]
    resource: dict[str, Any]
    failed: bool
    kind: int
    start: int
    end: int


class Collector:
    """An OTLP collector on loopback; `bodies` and `headers` are those of the requests."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        routes = [Route("/v1/traces", self._take, methods=["POST"])]
        self.server = ServerThread(Starlette(routes=routes), bind_loopback()).start()
        self.endpoint = f"{self.server.url}/v1/traces"

    def spans(self) -> list[ReceivedSpan]:
        """All spans so far."""
        return [span for body in list(self.bodies) for span in _spans(body)]

    async def _take(self, request: Request) -> Response:
        self.headers.append(dict(request.headers))
        self.bodies.append(await request.body())
        return Response(media_type="application/x-protobuf")


def _spans(body: bytes) -> list[ReceivedSpan]:
    return [
        ReceivedSpan(
            name=span.name,
            trace=span.trace_id.hex(),
            id=span.span_id.hex(),
            parent=span.parent_span_id.hex(),
            attributes=_values(span.attributes),
            events=[(event.name, _values(event.attributes)) for event in span.events],
            resource=_values(resource.resource.attributes),
            failed=span.status.code == span.status.STATUS_CODE_ERROR,
            kind=span.kind,
            start=span.start_time_unix_nano,
            end=span.end_time_unix_nano,
        )
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _values(attributes: Any) -> dict[str, Any]:
    """Attributes as plain values; integers are text, as in Protobuf's JSON."""
    return {each.key: next(iter(MessageToDict(each.value).values())) for each in attributes}


def trace_of(collector: Collector, run_id: object) -> dict[str, ReceivedSpan]:
    """The spans of a run's one attempt, by name, once its root has arrived."""

    def arrived() -> str | None:
        roots = (span for span in collector.spans() if "cicd.pipeline.run.id" in span.attributes)
        return next(
            (root.trace for root in roots if root.attributes["cicd.pipeline.run.id"] == str(run_id)), None
        )

    trace = wait_until(arrived, f"the trace of {run_id}")
    return {span.name: span for span in collector.spans() if span.trace == trace}
