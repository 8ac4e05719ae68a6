"""Runs handlers in a test, and serves `ctx.http` from a function, an ASGI app or a transport."""

from __future__ import annotations

import asyncio
import inspect
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

from worker.clock import Clock
from worker.engine.runners.child.pool import ChildPool
from worker.engine.runners.contract import Runner, RunServices, StopSignal, Work
from worker.engine.runners.inline import Blocking, Inline
from worker.errors import UsageError
from worker.guard import urls
from worker.handlers.given import Given
from worker.handlers.http import origin_of
from worker.handlers.job import Job
from worker.handlers.models import HandlerMissing, load
from worker.handlers.public_http import check_addresses
from worker.handlers.results import EgressDenied
from worker.model.egress import Gate, not_listed
from worker.model.runs.outcome import Outcome

Answer = httpx.Response | Coroutine[Any, Any, httpx.Response]
AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]
Api = Callable[[httpx.Request], Answer] | AsgiApp | httpx.AsyncBaseTransport

# Returns a response in place of the API's, or None.
Before = Callable[[httpx.Request], httpx.Response | None]


class RecordingApi(httpx.AsyncBaseTransport):
    """Passes each request to the test's API and records those that reach it."""

    def __init__(self, api: Api | None, before: Before) -> None:
        self._inner = _transport(api)
        self._before = before
        self.requests: list[httpx.Request] = []
        # What the handler lists as egress.
        self.gate = Gate((), ())

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        if not self.gate.allows(urls.origin_of(str(url))):
            origin = urls.origin_of(str(url))
            raise EgressDenied(not_listed(f"{url.scheme}://{url.netloc.decode()}", self.gate.deniers(origin)))
        await request.aread()
        if (rejected := self._before(request)) is not None:
            return rejected
        self.requests.append(request)
        return await self._inner.handle_async_request(request)


class PublicApi(httpx.AsyncBaseTransport):
    """The test's API for `ctx.public_http`, if the host has a public address or its origin is trusted.

    No name is resolved: the address of a host is the one that the test gives, or else public.
    """

    def __init__(self, api: RecordingApi, trusted: Iterable[str], hosts: Mapping[str, str]) -> None:
        self._api = api
        self._trusted = frozenset(origin_of(origin) for origin in trusted)
        self._hosts = {"localhost": "127.0.0.1", **hosts}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if origin_of(request.url) not in self._trusted:
            check_addresses(request.url, self._addresses(request.url.host))
        return await self._api.handle_async_request(request)

    def _addresses(self, host: str) -> list[str]:
        if host in self._hosts:
            return [self._hosts[host]]
        try:
            return [str(entry[4][0]) for entry in socket.getaddrinfo(host, 0, flags=socket.AI_NUMERICHOST)]
        except OSError:
            return []


class BlockingApi(httpx.BaseTransport):
    """The same for a handler in a thread; the response comes from the loop."""

    def __init__(self, api: httpx.AsyncBaseTransport, loop: asyncio.AbstractEventLoop) -> None:
        self._api = api
        self._loop = loop

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()
        return asyncio.run_coroutine_threadsafe(self._respond(request), self._loop).result()

    async def _respond(self, request: httpx.Request) -> httpx.Response:
        response = await self._api.handle_async_request(request)
        content = await response.aread()
        headers = [(name, value) for name, value in response.headers.multi_items() if name not in _ENCODED]
        return httpx.Response(response.status_code, headers=headers, content=content)


# Headers that no longer apply to a body that was read.
_ENCODED = frozenset({"content-encoding", "content-length", "transfer-encoding"})


def _transport(api: Api | None) -> httpx.AsyncBaseTransport:
    if api is None:
        return httpx.MockTransport(_unanswered)
    if isinstance(api, httpx.AsyncBaseTransport):
        return api
    if len(inspect.signature(api).parameters) == 3:
        return httpx.ASGITransport(app=api)  # type: ignore[arg-type]
    return httpx.MockTransport(api)  # type: ignore[arg-type]


def _unanswered(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError(
        f"no API responds to {request.method} {request.url} in this test: pass api= to orgworker.run",
        request=request,
    )


class InProcess:
    """Runs async handlers as tasks of the loop, and those that block in threads."""

    def __init__(
        self, jobs: Mapping[str, Job], api: RecordingApi, clock: Clock, hosts: Mapping[str, str]
    ) -> None:
        self._jobs = jobs
        self._api = api
        loop = asyncio.get_running_loop()

        def transports(given: Given[Any, Any]) -> dict[str, httpx.AsyncBaseTransport]:
            return {"http": api, "public_http": PublicApi(api, given.trusted_origins, hosts)}

        def blocking_transports(given: Given[Any, Any]) -> dict[str, httpx.BaseTransport]:
            return {name: BlockingApi(transport, loop) for name, transport in transports(given).items()}

        find = jobs.__getitem__
        self._inline = Inline(clock, find=find, transports=transports, watched=False)
        self._blocking = Blocking(clock, find=find, transports=blocking_transports)

    async def run(self, work: Work, services: RunServices, stop: StopSignal) -> Outcome:
        self._api.gate = Gate(work.egress.lists, work.api_origins, work.private_origins, work.egress.owners)
        runner: Runner = self._inline if self._jobs[work.entry_point].is_async else self._blocking
        return await runner.run(work, services, stop)


@asynccontextmanager
async def in_child(jobs: Mapping[str, Job], clock: Clock) -> AsyncIterator[Runner]:
    """The worker's runner of child processes; raises UsageError if they could not import a handler."""
    for entry_point, job in jobs.items():
        try:
            found: Job | None = load(entry_point)
        except (HandlerMissing, ImportError):
            found = None
        if found is not job:
            raise UsageError(
                f"{job.name} cannot be imported as {entry_point} in another process",
                fix="install its distribution, or define it at the top level of a module on sys.path",
            )
    children = ChildPool(clock, freezing=False)
    children.start()
    try:
        yield children
    finally:
        await children.close()
