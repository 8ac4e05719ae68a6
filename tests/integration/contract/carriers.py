"""The four carriers of a run's calls: inline, a thread, a process over its socket, and a host over HTTP.

They share a database, two workers and a zygote. A host's requests reach the workers' applications without a
socket.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import httpx
from sqlalchemy import update

from tests.integration.hosts.conftest import Fleet, Host
from worker.clock import SystemClock
from worker.engine.attempt.attempt import attempt
from worker.engine.attempt.inflight import InflightRun, InflightRuns
from worker.engine.attempt.plan import HandlerRegistry
from worker.engine.attempt.run_log import RunLogWriter
from worker.engine.loops.step_writer import StepWriter
from worker.engine.runners.child.pool import ChildPool
from worker.engine.runners.contract import Runner, StopSignal
from worker.engine.runners.inline import Blocking, Inline
from worker.features.hosts.control import AsyncControl, Controls
from worker.features.hosts.hosted import RemoteTools, hosted_attempt
from worker.features.hosts.remote import RemoteStore
from worker.handlers.catalogue import HandlerEntry
from worker.ids import RunId
from worker.operations.runs import cancel
from worker.store import tables
from worker.store.database import Database
from worker.store.dialect import database_now
from worker.tokens.sealing import KeyRing

CARRIERS = ("inline", "thread", "child", "blocking child", "host")
# Nothing here renews a lease.
LEASE = timedelta(hours=1)
BLOCKING = ("thread", "blocking child")
ENTRY = HandlerEntry(
    "acme.script", "acme", "1", "contract_jobs:script", scopes=("read:kb",), children=("acme.script",)
)
FILE = """
[[org]]
code = "org_a"
issuer = "main"
[[definition]]
org = "org_a"
name = "script"
handler = "acme.script"
schedule = "@yearly"
overlap = "allow"
max_attempts = 3
[[budget]]
org = "org_a"
meter = "tickets"
limit = 5
per = "run"
at_limit = "fail"
"""


class Applications(httpx.AsyncBaseTransport):
    """The attempt APIs of workers, by their address."""

    def __init__(self) -> None:
        self.by_port: dict[int | None, httpx.ASGITransport] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await self.by_port[request.url.port].handle_async_request(request)


@dataclass
class Site:
    """What the carriers of one database share."""

    fleet: Fleet
    applications: Applications
    children: ChildPool
    host: Host
    tools: RemoteTools


@asynccontextmanager
async def opened(database: Database, folder: Path, children: ChildPool) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        ring, applications, clock = KeyRing.generate(folder / "keyring"), Applications(), SystemClock()
        client = await stack.enter_async_context(httpx.AsyncClient(transport=applications))
        fleet = Fleet(database, ring, client, LEASE)
        for worker in fleet.workers:
            attempts = worker.listener.attempts
            applications.by_port[httpx.URL(worker.url).port] = httpx.ASGITransport(attempts.app())
            assert worker.api is not None
            stack.push_async_callback(worker.api.close)
            stack.push_async_callback(attempts.checker.close)
            assert worker.listener._listener is not None
            stack.callback(worker.listener._listener.close)
        fleet.one.store.register(version="1", handlers=[ENTRY.name], capacity={"children": 9})
        host = await fleet.host(entries=[ENTRY])
        controls = Controls([worker.url for worker in fleet.workers], host.token, clock)
        controls.incarnation = host.id
        control = AsyncControl(controls, transport=applications)
        store = RemoteStore(control, None, InflightRuns(), clock.now)  # type: ignore[arg-type]
        handlers = HandlerRegistry()
        handlers.add(ENTRY)
        tools = RemoteTools(
            store=store,
            handlers=handlers,
            runners={"child": Inline(clock, watched=False)},
            steps=StepWriter(store, clock),
            run_log=RunLogWriter(store, clock),
            clock=clock,
            random=Random(1),
        )
        local = fleet.one.tools.steps
        assert isinstance(local, StepWriter)
        for steps in (local, tools.steps):
            task = asyncio.create_task(steps.run())
            stack.callback(task.cancel)
        yield Site(fleet, applications, children, host, tools)


@dataclass
class Carrier:
    """Runs scripts by one carrier."""

    site: Site
    name: str

    def start(self, *calls: list[Any], **params: Any) -> RunId:
        return self.site.fleet.start("script", calls=[*calls], **params)

    def make_available(self, run: RunId) -> None:
        """Let a waiting run start now."""
        with self.site.fleet.database.transaction() as connection:
            changed = update(tables.live_runs).where(tables.live_runs.c.id == run)
            connection.execute(changed.values(available_at=database_now(connection)))

    async def run(self, *calls: list[Any], **params: Any) -> Told:
        """A whole run of one attempt."""
        return await self.attempt(self.start(*calls, **params))

    def drop(self) -> None:
        """Cancel the runs that wait, so that no other test is given them."""
        for row in self.site.fleet.rows.all(tables.live_runs):
            cancel(self.site.fleet.database, row["id"], actor="test")

    async def attempt(self, run: RunId) -> Told:
        """The next attempt of a run, written to its end."""
        site = self.site
        tokens = len(site.fleet.tokens.texts)
        if self.name == "host":
            await self._on_host(run)
        else:
            await self._local(run)
        await site.fleet.flush()
        return Told(site.fleet, run, site.fleet.tokens.texts[tokens:])

    async def _on_host(self, run: RunId) -> None:
        tools = self.site.tools
        for worker in self.site.fleet.workers:
            await worker.store.look_at_budgets()
            await worker.store.families_settled()
        [taken] = await self.site.host.take(self.site.fleet.one)
        assert taken.run.id == run
        tools.keep([taken])
        inflight = tools.store.inflight_runs.add(taken.run)
        ended = await hosted_attempt(inflight, tools)
        await tools.run_log.flush()
        assert await tools.store.finish([ended]) == {run}
        tools.store.inflight_runs.release(inflight)
        inflight.drop_tokens()

    async def _local(self, run: RunId) -> None:
        worker = self.site.fleet.one
        runners: Mapping[str, Runner] = {
            "inline": Inline(worker.tools.clock, watched=False),
            "thread": Blocking(worker.tools.clock),
            "child": self.site.children,
            "blocking child": self.site.children,
        }
        entry_point = "contract_jobs:script_blocking" if self.name in BLOCKING else ENTRY.entry_point
        handlers = HandlerRegistry()
        handlers.add(replace(ENTRY, entry_point=entry_point))
        tools = replace(worker.tools, handlers=handlers, runners={"child": runners[self.name]})
        await worker.store.look_at_budgets()
        await worker.store.families_settled()
        [admitted] = await worker.store.admit(handlers.limits(), {"child": 1})
        assert admitted.id == run
        inflight = InflightRun(admitted, StopSignal())
        ended = await attempt(inflight, tools)
        await tools.run_log.flush()
        assert await worker.store.finish([ended]) == {run}
        inflight.drop_tokens()


@dataclass
class Told:
    """What the database has of a run after an attempt, and the tokens that the attempt got."""

    fleet: Fleet
    run: RunId
    tokens: list[str]

    def rows(self, table: Any) -> list[dict[str, Any]]:
        return self.fleet.rows.all(table, table.c.run_id == self.run)

    @property
    def children(self) -> list[dict[str, Any]]:
        return self.fleet.rows.all(tables.children, tables.children.c.parent_id == self.run)

    @property
    def outcomes(self) -> list[str]:
        return [row["outcome"] for row in self.fleet.rows.attempts(self.run)]

    @property
    def row(self) -> dict[str, Any]:
        """The run, ended or not."""
        return self.fleet.rows.live(self.run) or self.fleet.rows.run(self.run)

    @property
    def result(self) -> dict[str, Any]:
        result = self.row["result"]
        given: dict[str, Any] = json.loads(result) if isinstance(result, str) else result
        return given

    @property
    def given(self) -> list[Any]:
        given: list[Any] = self.result["given"]
        return given

    def everything(self) -> str:
        """All that is stored of the run, to look for what must not be there."""
        found = [self.row, *self.fleet.rows.attempts(self.run)]
        kept = (tables.steps, tables.waits, tables.run_logs, tables.spends, tables.model_spends)
        for table in (tables.checkpoints, *kept):
            found += self.rows(table)
        return str(found)
