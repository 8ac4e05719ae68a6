"""A collector of OpenTelemetry on loopback: it takes what is posted by OTLP, and tells the spans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from worker.demo.serving import ServerThread, bind_loopback


@dataclass(frozen=True)
class Told:
    """One span as it arrived; ids are in lower-case hex, `parent` is "" for a root."""

    name: str
    trace: str
    id: str
    parent: str
    attributes: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]]
    resource: dict[str, Any]
    failed: bool


class Collector:
    """`bodies` are the posts as they came, `headers` those of each."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        routes = [Route("/v1/traces", self._take, methods=["POST"])]
        self.server = ServerThread(Starlette(routes=routes), bind_loopback()).start()
        self.endpoint = f"{self.server.url}/v1/traces"

    def spans(self) -> list[Told]:
        """All that has arrived."""
        return [span for body in list(self.bodies) for span in _spans(body)]

    async def _take(self, request: Request) -> Response:
        self.headers.append(dict(request.headers))
        self.bodies.append(await request.body())
        return Response(media_type="application/x-protobuf")


def _spans(body: bytes) -> list[Told]:
    return [
        Told(
            name=span.name,
            trace=span.trace_id.hex(),
            id=span.span_id.hex(),
            parent=span.parent_span_id.hex(),
            attributes=_values(span.attributes),
            events=[(event.name, _values(event.attributes)) for event in span.events],
            resource=_values(resource.resource.attributes),
            failed=span.status.code == span.status.STATUS_CODE_ERROR,
        )
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _values(attributes: Any) -> dict[str, Any]:
    """Attributes as plain values; whole numbers are text, as in Protobuf's JSON."""
    return {each.key: next(iter(MessageToDict(each.value).values())) for each in attributes}
