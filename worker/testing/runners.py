"""Where a test's handler runs: in this process, its requests answered by the test, or in a child."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

from worker.clock import Clock
from worker.errors import UsageError
from worker.execution.blocking import Blocking
from worker.execution.children import Children
from worker.execution.inline import Inline
from worker.execution.work import Link, Runner, Stop, Work
from worker.handlers.context import BlockingCancellation, BlockingContext, Cancellation, Context, Given
from worker.handlers.http import blocking_org_client, org_client
from worker.handlers.job import Job
from worker.handlers.line import BlockingLine, BlockingTokenSource, Line, TokenSource
from worker.handlers.models import HandlerMissing, load
from worker.runs.outcome import Outcome
from worker.testing.api import ApiOfTest, BlockingApi, PublicApi


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

    async def run(self, work: Work, link: Link, stop: Stop) -> Outcome:
        runner: Runner = self._inline if self._jobs[work.entry_point].is_async else self._blocking
        return await runner.run(work, link, stop)

    def _context(self, given: Given[Any, Any], line: Line, cancelled: Cancellation) -> Context[Any, Any]:
        context: Context[Any, Any] = Context(given, line, cancelled)
        source, key = TokenSource(given.held, line), given.run.idempotency_key
        origins, insecure = given.api_origins, given.insecure_origins
        for name, transport in self._transports(given).items():
            vars(context)[name] = org_client(
                source, origins, key, insecure_origins=insecure, transport=transport
            )
        return context

    def _blocking_context(
        self, given: Given[Any, Any], line: BlockingLine, cancelled: BlockingCancellation
    ) -> BlockingContext[Any, Any]:
        context: BlockingContext[Any, Any] = BlockingContext(given, line, cancelled)
        source, key = BlockingTokenSource(given.held, line), given.run.idempotency_key
        origins, insecure = given.api_origins, given.insecure_origins
        for name, answering in self._transports(given).items():
            transport = BlockingApi(answering, self._loop)
            vars(context)[name] = blocking_org_client(
                source, origins, key, insecure_origins=insecure, transport=transport
            )
        return context

    def _transports(self, given: Given[Any, Any]) -> dict[str, httpx.AsyncBaseTransport]:
        trusted = (*given.api_origins, *given.private_origins)
        return {"http": self._api, "public_http": PublicApi(self._api, trusted, self._hosts)}


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
    children = Children(clock, freezing=False)
    children.start()
    try:
        yield children
    finally:
        await children.close()
