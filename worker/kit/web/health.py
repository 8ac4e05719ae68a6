"""Health: whether the loops tick (`/livez`), whether runs are admitted (`/readyz`), and the metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from worker.errors import AccessDenied, TokenError
from worker.kit.web.responses import CallerOf
from worker.settings import Settings
from worker.telemetry import events
from worker.telemetry.metrics import CONTENT_TYPE, Metrics
from worker.telemetry.vitals import Vitals

# These need no token, unless the metrics name orgs.
PATHS = frozenset({"/livez", "/readyz", "/metrics"})


def metrics_of(settings: Settings, *, version: str) -> Metrics:
    """The metrics of this process; they count events from now on."""
    metrics = Metrics(version=version, top_orgs=settings.web.metrics_top_orgs)
    events.listen(metrics.take)
    return metrics


class MetricsAccess(Protocol):
    """Authenticates who reads metrics that name orgs."""

    async def caller_of(self, connection: HTTPConnection) -> CallerOf | None:
        """The caller, None without a token. Raises TokenError, AccessDenied or TooManyRequests."""

    def count_stranger(self, connection: HTTPConnection) -> None:
        """Count a request without a token. Raises TooManyRequests."""


class Health:
    """Health from memory, without the database; `sandbox` is the level of the handlers' sandbox."""

    def __init__(self, metrics: Metrics, *, sandbox: str = "") -> None:
        self.metrics = metrics
        self._sandbox = sandbox
        self._vitals: Vitals | None = None
        self._access: MetricsAccess | None = None

    def protect(self, access: MetricsAccess) -> None:
        """Set who authenticates operators, for metrics that name orgs; until then they are denied."""
        self._access = access

    def watch(self, vitals: Vitals) -> None:
        """Report the health of this incarnation from now on."""
        self._vitals = vitals
        self.metrics.watch(vitals)

    def starting(self) -> None:
        """Forget the last incarnation's loops while the next one is put together."""
        self._vitals = None

    def draining(self) -> bool:
        """Whether the worker is stopping."""
        return self._vitals is not None and self._vitals.draining()

    def stalled(self) -> list[str]:
        """The loops that do not tick; none before the first incarnation or during a drain."""
        vitals = self._vitals
        return [] if vitals is None or self.draining() else vitals.stalled()

    def lacking(self) -> list[str]:
        """What keeps this worker from admitting runs; a single org's trouble never does."""
        vitals = self._vitals
        if vitals is None:
            return ["starting"]
        if vitals.draining():
            return ["draining"]
        lacks = {
            "lease": vitals.lease_remaining() <= 0,
            "admission": not vitals.admitting(),
            "broker": vitals.broker_fault() is not None,
            **{f"loop {name}": True for name in vitals.stalled()},
        }
        return [name for name, lacking in lacks.items() if lacking]

    def details(self) -> Mapping[str, Any]:
        """What /readyz tells besides."""
        fault = None if self._vitals is None else self._vitals.broker_fault()
        return {name: value for name, value in (("sandbox", self._sandbox), ("broker", fault)) if value}

    def routes(self) -> Sequence[Route]:
        return (
            Route("/livez", self._livez),
            Route("/readyz", self._readyz),
            Route("/metrics", self._metrics),
        )

    async def _livez(self, request: Request) -> Response:
        return _response("stalled", self.stalled())

    async def _readyz(self, request: Request) -> Response:
        return _response("lacking", self.lacking(), **self.details())

    async def _metrics(self, request: Request) -> Response:
        if self.metrics.name_orgs:
            await self._require_operator(request)
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def _require_operator(self, request: Request) -> None:
        """Raise TokenError, AccessDenied or TooManyRequests unless an operator calls."""
        caller = None if self._access is None else await self._access.caller_of(request)
        if caller is None:
            if self._access is not None:
                self._access.count_stranger(request)
            raise TokenError(
                "these metrics name orgs and need an operator's bearer token",
                fix="send the header Authorization: Bearer TOKEN, or set web.metrics_top_orgs to 0",
            )
        if caller.org is not None:
            raise AccessDenied("metrics of all orgs are for operators", fix="send an operator's token")


def _response(word: str, faults: list[str], **details: Any) -> Response:
    body = {"status": "failing" if faults else "ok", word: faults, **details}
    return JSONResponse(body, status_code=503 if faults else 200)
