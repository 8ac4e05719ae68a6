"""Health: whether the loops tick (`/livez`), whether work is taken (`/readyz`), and the metrics."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from worker.errors import AccessDenied, TokenError
from worker.telemetry.metrics import CONTENT_TYPE, Metrics
from worker.telemetry.vitals import Vitals
from worker.web.access import Access

# These need no token, unless the metrics name orgs.
PATHS = frozenset({"/livez", "/readyz", "/metrics"})


class Health:
    """Answers from memory, without the database; `watch` hands in each incarnation's vitals.

    `sandbox` says how far handlers are confined; "" where none runs.
    """

    def __init__(self, metrics: Metrics, *, sandbox: str = "") -> None:
        self.metrics = metrics
        self._sandbox = sandbox
        self._vitals: Vitals | None = None
        self._access: Access | None = None

    def protect(self, access: Access) -> None:
        """Let `access` say who is an operator, for metrics that name orgs; nobody reads those before."""
        self._access = access

    def watch(self, vitals: Vitals) -> None:
        """Answer for this incarnation from now on."""
        self._vitals = vitals
        self.metrics.watch(vitals)

    def starting(self) -> None:
        """An incarnation begins: until it is put together, no loop of the last one is missed."""
        self._vitals = None

    def draining(self) -> bool:
        """Whether the worker was asked to stop."""
        return self._vitals is not None and self._vitals.draining()

    def stalled(self) -> list[str]:
        """The loops that do not tick; none is expected to before the first incarnation or in a drain."""
        vitals = self._vitals
        return [] if vitals is None or self.draining() else vitals.stalled()

    def lacking(self) -> list[str]:
        """What this worker lacks to take work. One org's troubles are never among it.

        The schema was checked before the first incarnation, and a newer one is made to
        fit this version too.
        """
        vitals = self._vitals
        if vitals is None:
            return ["starting"]
        if vitals.draining():
            return ["draining"]
        lacks = {
            "lease": vitals.lease_remaining() <= 0,
            "admission": not vitals.admitting(),
            **{f"loop {name}": True for name in vitals.stalled()},
        }
        return [name for name, lacking in lacks.items() if lacking]

    def routes(self) -> Sequence[Route]:
        return (
            Route("/livez", self._livez),
            Route("/readyz", self._readyz),
            Route("/metrics", self._metrics),
        )

    async def _livez(self, request: Request) -> Response:
        return _answer("stalled", self.stalled())

    async def _readyz(self, request: Request) -> Response:
        return _answer("lacking", self.lacking(), **({"sandbox": self._sandbox} if self._sandbox else {}))

    async def _metrics(self, request: Request) -> Response:
        if self.metrics.name_orgs:
            await self._require_operator(request)
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def _require_operator(self, request: Request) -> None:
        """Let through an operator of any role, on whichever listener it asks.

        Raises:
            TokenError: no token, or a bad one.
            AccessDenied: an org's token.
            TooManyRequests: too many such requests from this address.
        """
        caller = None if self._access is None else await self._access.caller_of(request)
        if caller is None:
            if self._access is not None:
                self._access.count_stranger(request)
            raise TokenError(
                "these metrics name orgs: a bearer token of an operator is needed",
                fix="send the header Authorization: Bearer TOKEN, or set web.metrics_top_orgs to 0",
            )
        if caller.org is not None:
            raise AccessDenied("metrics of all orgs are for operators", fix="ask with an operator's token")


def _answer(word: str, faults: list[str], **details: str) -> Response:
    body = {"status": "failing" if faults else "ok", word: faults, **details}
    return JSONResponse(body, status_code=503 if faults else 200)
