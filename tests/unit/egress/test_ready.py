"""A request's connection while it waits for leave to send."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import httpcore
import pytest

from worker.connections import Sockets
from worker.features.egress.attempts import Totals
from worker.features.egress.network import Pools
from worker.features.egress.pacing import Slot
from worker.features.egress.requests import RequestRefused
from worker.features.egress.streams import _Exchange
from worker.guard.urls import Origin

SERVICE = Origin("http", "192.0.2.1", 80)


class Opened(httpcore.AsyncMockStream):
    """A connection that notes that it is closed; `is_over` once the service has closed it."""

    is_closed = is_over = False

    async def aclose(self) -> None:
        self.is_closed = True

    def get_extra_info(self, info: str) -> Any:
        return self.is_over if info == "is_readable" else None


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Opened]:
    streams: list[Opened] = []

    async def connect(self: Sockets, *args: Any, **kwargs: Any) -> Opened:
        streams.append(Opened([]))
        return streams[-1]

    monkeypatch.setattr(Sockets, "connect_tcp", connect)
    return streams


async def ready(admit: Callable[[], Awaitable[Slot]]) -> Any:
    """What `_ready` returns for a request whose leave comes from `admit`."""

    async def resolve(host: str, port: int) -> list[str]:
        return [host]

    pools = Pools(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), lambda: True, resolve)
    broker: Any = SimpleNamespace(pools=pools, admit=lambda attempt, origin: admit())
    exchange = _Exchange(broker, SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]
    sent = httpcore.Request("GET", "http://192.0.2.1/", extensions={"timeout": {}})
    return await exchange._ready(pools.of("acme", checked=False), sent, SERVICE, Totals())


def slot(*, may_send: bool) -> Slot:
    return Slot(0.0, lambda: may_send, lambda: None)


@pytest.mark.parametrize(
    "end", [RequestRefused("limited", "paused", retry_after=60.0), asyncio.CancelledError()]
)
async def test_a_request_that_gets_no_other_leave_keeps_no_connection(
    opened: list[Opened], end: BaseException
) -> None:
    """Its service asks for a pause as it connects, which is too long; or its run ends in the pause."""
    answers = iter([slot(may_send=False), end])

    async def admit() -> Slot:
        answer = next(answers)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    with pytest.raises(type(end)):
        await ready(admit)

    assert [stream.is_closed for stream in opened] == [True]


async def test_a_connection_that_its_service_closes_while_it_waits_for_leave_is_not_used(
    opened: list[Opened],
) -> None:
    answers = iter([slot(may_send=False), slot(may_send=True)])

    async def admit() -> Slot:
        for stream in opened:
            stream.is_over = True
        return next(answers)

    await ready(admit)

    assert [stream.is_closed for stream in opened] == [True, False]
