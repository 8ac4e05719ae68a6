"""What answers `ctx.http` in a test: a function, an ASGI app or a transport; never the network."""

from __future__ import annotations

import asyncio
import inspect
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

from worker.clock import Clock
from worker.errors import UsageError
from worker.execution.runners.child.pool import ChildPool
from worker.execution.runners.contract import Runner, RunServices, StopSignal, Work
from worker.execution.runners.inline import Inline
from worker.execution.runners.thread import Blocking
from worker.handlers.context import (
    BlockingCancellation,
    BlockingContext,
    BlockingWorkerPort,
    Cancellation,
    Context,
    Given,
    WorkerPort,
)
from worker.handlers.http import origin_of
from worker.handlers.job import Job
from worker.handlers.models import HandlerMissing, load
from worker.handlers.public_http import check_addresses
from worker.runs.outcome import Outcome

Answer = httpx.Response | Coroutine[Any, Any, httpx.Response]
AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]
Api = Callable[[httpx.Request], Answer] | AsgiApp | httpx.AsyncBaseTransport

# What a request may do before it reaches the API, such as to be turned down.
Before = Callable[[httpx.Request], httpx.Response | None]


class ApiOfTest(httpx.AsyncBaseTransport):
    """Passes each request to the test's API, and keeps those that came so far."""

    def __init__(self, api: Api | None, before: Before) -> None:
        self._inner = _transport(api)
        self._before = before
        self.requests: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        turned_down = self._before(request)
        if turned_down is not None:
            return turned_down
        self.requests.append(request)
        return await self._inner.handle_async_request(request)


class PublicApi(httpx.AsyncBaseTransport):
    """Answers `ctx.public_http` by the test's API, if the host has a public address or its origin is listed.

    Nothing is resolved: a host is an address itself, has the one that the test gives, or else a public one.
    """

    def __init__(self, api: ApiOfTest, trusted: Iterable[str], hosts: Mapping[str, str]) -> None:
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
    """The same for a handler that blocks in a thread: the answer comes from the loop."""

    def __init__(self, api: httpx.AsyncBaseTransport, loop: asyncio.AbstractEventLoop) -> None:
        self._api = api
        self._loop = loop

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()
        return asyncio.run_coroutine_threadsafe(self._answer(request), self._loop).result()

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        response = await self._api.handle_async_request(request)
        content = await response.aread()
        headers = [(name, value) for name, value in response.headers.multi_items() if name not in _ENCODED]
        return httpx.Response(response.status_code, headers=headers, content=content)


# Of a body that is read they say nothing true.
_ENCODED = frozenset({"content-encoding", "content-length", "transfer-encoding"})


def _transport(api: Api | None) -> httpx.AsyncBaseTransport:
    if api is None:
        return httpx.MockTransport(_nobody)
    if isinstance(api, httpx.AsyncBaseTransport):
        return api
    if len(inspect.signature(api).parameters) == 3:
        return httpx.ASGITransport(app=api)  # type: ignore[arg-type]
    return httpx.MockTransport(api)  # type: ignore[arg-type]


def _nobody(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError(
        f"nothing answers {request.method} {request.url} in this test: give orgworker.run an api=",
        request=request,
    )


class InProcess:
    """Async handlers as tasks of the loop, those that block in a thread each."""

    def __init__(
        self, jobs: Mapping[str, Job], api: ApiOfTest, clock: Clock, hosts: Mapping[str, str]
    ) -> None:
        self._jobs = jobs
        self._api = api
        self._hosts = hosts
        self._loop = asyncio.get_running_loop()
        self._inline = Inline(clock, find=jobs.__getitem__, context=self._context, watched=False)
        self._blocking = Blocking(clock, find=jobs.__getitem__, context=self._blocking_context)

    async def run(self, work: Work, link: RunServices, stop: StopSignal) -> Outcome:
        runner: Runner = self._inline if self._jobs[work.entry_point].is_async else self._blocking
        return await runner.run(work, link, stop)

    def _context(
        self, given: Given[Any, Any], port: WorkerPort, cancelled: Cancellation
    ) -> Context[Any, Any]:
        return Context(given, port, cancelled, self._transports(given))

    def _blocking_context(
        self, given: Given[Any, Any], port: BlockingWorkerPort, cancelled: BlockingCancellation
    ) -> BlockingContext[Any, Any]:
        transports = {name: BlockingApi(api, self._loop) for name, api in self._transports(given).items()}
        return BlockingContext(given, port, cancelled, transports)

    def _transports(self, given: Given[Any, Any]) -> dict[str, httpx.AsyncBaseTransport]:
        public = PublicApi(self._api, given.trusted_origins, self._hosts)
        return {"http": self._api, "public_http": public}


@asynccontextmanager
async def in_child(jobs: Mapping[str, Job], clock: Clock) -> AsyncIterator[Runner]:
    """A worker's own runner of child processes, for as long as the block lasts.

    Raises:
        UsageError: a child process could not import the handler.
    """
    for entry_point, job in jobs.items():
        try:
            found: Job | None = load(entry_point)
        except (HandlerMissing, ImportError):
            found = None
        if found is not job:
            raise UsageError(
                f"{job.name} is not {entry_point} to another process",
                fix="install its distribution, or define it at the top of a module on sys.path",
            )
    children = ChildPool(clock, freezing=False)
    children.start()
    try:
        yield children
    finally:
        await children.close()
