"""Workers that answer hosts over real connections; tests play the hosts."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from tests.conftest import migrated_on
from tests.fakes.ports import free_port
from tests.fakes.site import definition, org_entry
from worker.clock import SystemClock
from worker.engine.attempt.inflight import InflightRun
from worker.engine.attempt.plan import HandlerRegistry, Plans
from worker.engine.attempt.run_log import RunLogWriter
from worker.engine.attempt.tools import Tools
from worker.engine.loops.step_writer import StepWriter
from worker.features.hosts import wire
from worker.features.hosts.operations import add_host
from worker.features.hosts.sent import END, End
from worker.features.hosts.worker_wiring import AttemptListener
from worker.guard.claims import Claims
from worker.handlers.catalogue import HandlerEntry
from worker.ids import OrgId, RunId, WorkerId, new_id
from worker.model.claims import Enforced
from worker.model.definitions.file import parse_file
from worker.model.orgs import OrgRef, TokenWant
from worker.model.prices import OwnPrice, Prices
from worker.model.runs import outcome as outcomes
from worker.model.runs.outcome import EndedAttempt
from worker.operations.apply import apply
from worker.operations.runs import run_now
from worker.settings import Settings
from worker.settings.sections import AttemptsSettings, ExecutionSettings
from worker.store import catalogue, tables
from worker.store.database import Database
from worker.store.worker_store import WorkerStore
from worker.tokens.sealing import KeyRing
from worker.wiring.secrets import OpenedSecrets

HANDLER = "acme.render"
OTHER = "acme.render_v2"
ENTRIES = [
    HandlerEntry(HANDLER, "acme", "1", "acme:render", scopes=("read:kb",)),
    HandlerEntry(OTHER, "acme", "1", "acme:render_v2", scopes=("read:kb", "ask:model")),
    HandlerEntry("acme.admin", "acme", "1", "acme:admin", scopes=("admin",)),
    HandlerEntry("acme.remembers", "acme", "1", "acme:remembers", state=True),
    HandlerEntry("acme.keyed", "acme", "1", "acme:keyed", secrets=("openai",)),
]
FILE = "".join(
    (
        org_entry("org_a"),
        org_entry("org_b"),
        definition(
            "org_a",
            "render",
            HANDLER,
            "@yearly",
            overlap="allow",
            variants=[{"flag": "v2", "handler": OTHER}],
        ),
        definition("org_b", "render", HANDLER, "@yearly", overlap="allow"),
        definition("org_a", "remember", "acme.remembers", "@yearly"),
        definition("org_a", "keyed", "acme.keyed", "@yearly", overlap="allow"),
        definition("org_a", "elsewhere", HANDLER, "@yearly", overlap="allow", pool="eu"),
    )
)
LEASE = timedelta(seconds=30)
# Units of the currency for a million tokens.
PRICES = Prices(own=[OwnPrice("house", {"input": Fraction(2)})])
NOW = "2030-01-01T00:00:00Z"
STEP: Mapping[str, Any] = {
    **{"name": "fetch", "key": None, "occurrence": 1, "seq": 1, "result_json": "[1]", "spends": []},
    **{"started_at": NOW, "ended_at": NOW},
}


class Tokens:
    """A `TokenSource` without an issuer: a token of each org, whose text only the attempts make known."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.of_org = ""
        self.scopes = frozenset({"read:kb", "ask:model"})
        self.texts: list[str] = []
        # What each was requested for.
        self.wanted: list[TokenWant] = []

    def at_hand(self, want: TokenWant) -> None:
        return None

    async def ensure(self, want: TokenWant) -> Enforced:
        self.wanted.append(want)
        await self.may_answer.wait()
        if self.error is not None:
            raise self.error
        clock = SystemClock()
        now = clock.now()
        expires_at = now + timedelta(hours=1)
        self.texts.append(secrets.token_urlsafe(40))
        claims = Claims(
            org_code=self.of_org or want.org.code,
            client_id="client",
            scopes=self.scopes,
            properties={"region": "eu"},
            flags={},
            issued_at=now,
            expires_at=expires_at,
            issuer="https://id.test",
            jti="j",
        )
        return Enforced.of(self.texts[-1], claims, clock)

    async def outdate(self, want: TokenWant) -> None: ...

    async def load(self, orgs: Sequence[OrgRef]) -> Sequence[OrgId]:
        return ()

    async def look_up(self, wanted: Sequence[TokenWant]) -> None: ...


@dataclass
class Worker:
    """A worker without loops of its own, whose attempt API answers on a port."""

    database: Database
    ring: KeyRing
    tokens: Tokens
    lease: timedelta = LEASE
    ended: list[EndedAttempt] = field(default_factory=list)

    def __post_init__(self) -> None:
        clock = SystemClock()
        self.id = WorkerId(new_id())
        self.store = store = WorkerStore(self.database, self.id, self.lease, prices=PRICES)
        self.tools = Tools(
            plans=Plans(store, clock, api_origins={"main": ()}, rollouts=store.rollouts),
            tokens=self.tokens,
            handlers=HandlerRegistry(),
            runners={},
            store=store,
            steps=StepWriter(store, clock),
            run_log=RunLogWriter(store, clock),
            clock=clock,
            random=Random(1),
            secrets=OpenedSecrets(self.database, lambda _: self.ring),
            versions=store,
        )
        settings = Settings(
            attempts=AttemptsSettings(listen=f"127.0.0.1:{free_port()}"),
            execution=ExecutionSettings(lease=self.lease, poll=timedelta(milliseconds=50)),
        )
        self.url = f"http://{settings.attempts.listen}"
        self.listener = AttemptListener(settings.attempts, clock)
        self.listener.bind()
        self.api = self.listener.api(store, self.tools, settings, lambda _: self.ring, self._ended)
        self.listener.attempts.api = self.api

    def _ended(self, ended: EndedAttempt, inflight: InflightRun | None) -> None:
        assert inflight is None or inflight.run.id == ended.run_id
        self.ended.append(ended)


class Host:
    """A host as a test plays it: one incarnation, whose calls go to a worker of the test's choice."""

    def __init__(self, client: httpx.AsyncClient, token: str) -> None:
        self.client = client
        self.token = token
        self.id = ""

    async def send(
        self, worker: Worker, name: str, message: Mapping[str, Any] | bytes = b"{}", **headers: str
    ) -> httpx.Response:
        content = message if isinstance(message, bytes) else json.dumps(message).encode()
        given = {"Authorization": f"Bearer {self.token}", "OrgWorker-Incarnation": self.id, **headers}
        return await self.client.post(
            f"{worker.url}{wire.PREFIX}/{name}", content=content, headers=given, timeout=30
        )

    async def call(self, worker: Worker, name: str, **message: Any) -> dict[str, Any]:
        """The answer of a call that must succeed."""
        response = await self.send(worker, name, message)
        assert response.status_code == 200, (name, response.status_code, response.text)
        answer: dict[str, Any] = response.json()
        return answer

    async def register(self, worker: Worker, entries: Sequence[HandlerEntry] = ENTRIES) -> None:
        registration = wire.Registration("gpu1", 7, "1", {"child": 10, "inline": 10}, entries)
        answer = await self.call(worker, "register", **wire.REGISTRATION.write(registration))
        self.id = answer["worker"]

    async def take(self, worker: Worker, count: int = 1, wait: float = 5.0) -> list[wire.Taken]:
        answer = await self.call(worker, "take", free={"child": count}, wait=wait)
        return [wire.taken_of(taken) for taken in answer["attempts"]]

    async def take_all(self, worker: Worker, count: int) -> list[wire.Taken]:
        """As many attempts, by run: a take answers as soon as one of them is ready."""
        taken: list[wire.Taken] = []
        async with asyncio.timeout(20):
            while len(taken) < count:
                taken += await self.take(worker, count - len(taken))
        return sorted(taken, key=lambda one: one.run.id)

    async def finish(self, worker: Worker, *ends: End) -> list[str]:
        answer = await self.call(worker, "finish", ends=[END.write(end) for end in ends])
        accepted: list[str] = answer["accepted"]
        return accepted


def end_of(taken: wire.Taken, outcome: outcomes.Outcome | None = None, **values: Any) -> End:
    run = taken.run
    given = {"handler_seconds": 0.0, "sealed": taken.sealed, **values}
    return End(run.id, run.fencing_token, outcome or outcomes.Succeeded('{"n":1}'), **given)


def fence(taken: wire.Taken) -> dict[str, Any]:
    return {"run": taken.run.id, "fencing_token": taken.run.fencing_token}


def step_of(taken: wire.Taken, **changes: Any) -> dict[str, Any]:
    """A step as a host sends it."""
    return {**fence(taken), "handler": HANDLER, "step": {**STEP, **changes}}


def line_of(taken: wire.Taken, text: str, seq: int = 1) -> dict[str, Any]:
    """A line of the log as a host sends it."""
    return {**fence(taken), "seq": seq, "at": NOW, "level": "info", "source": "log", "text": text}


class Rows:
    """What is in the database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def all(self, table: Any, *where: Any) -> list[dict[str, Any]]:
        query = table.select().where(*where).order_by(*table.primary_key.columns)
        with self.database.autocommit() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def live(self, run_id: str) -> dict[str, Any] | None:
        rows = self.all(tables.live_runs, tables.live_runs.c.id == run_id)
        return rows[0] if rows else None

    def unended(self, run_id: str) -> dict[str, Any]:
        row = self.live(run_id)
        assert row is not None
        return row

    def run(self, run_id: str) -> dict[str, Any]:
        [row] = self.all(tables.runs, tables.runs.c.id == run_id)
        return row

    def attempts(self, run_id: str) -> list[dict[str, Any]]:
        return self.all(tables.attempts, tables.attempts.c.run_id == run_id)


class Fleet:
    """Two workers and any number of hosts on one database, with two orgs."""

    def __init__(
        self, database: Database, ring: KeyRing, client: httpx.AsyncClient, lease: timedelta = LEASE
    ) -> None:
        self.database = database
        self.client = client
        self.tokens = Tokens()
        self.rows = Rows(database)
        self.workers = [Worker(database, ring, self.tokens, lease) for _ in range(2)]
        self.one, self.two = self.workers

    async def host(self, name: str = "h1", pool: str = "default", **register: Any) -> Host:
        """A host that has registered at the first worker."""
        row = add_host(self.database, name, pool, actor="test")
        host = Host(self.client, row["token"])
        await host.register(self.one, **register)
        return host

    async def busy_host(self) -> tuple[Host, wire.Taken]:
        """A host that has taken a run from the first worker."""
        host = await self.host()
        self.start()
        [taken] = await host.take(self.one)
        return host, taken

    async def without_token(self) -> tuple[Host, RunId]:
        """A host, and a run that it does not get before its token is there."""
        host, run = await self.host(), self.start()
        self.tokens.may_answer.clear()
        assert await host.take(self.one, wait=0.3) == []
        return host, run

    def start(self, definition: str = "render", org: str = "org_a", **params: Any) -> RunId:
        """A run that waits for a slot."""
        row = run_now(self.database, org, definition, params=params or None, actor="test")
        return RunId(row["id"])

    async def flush(self) -> None:
        """Write the progress that hosts have sent, as each worker does twice a second."""
        for worker in self.workers:
            await worker.tools.run_log.flush()

    def org(self, code: str) -> OrgId:
        [row] = self.rows.all(tables.orgs, tables.orgs.c.code == code)
        return OrgId(row["id"])


@pytest.fixture
def migrated_url(request: pytest.FixtureRequest) -> str:
    """On SQLite, for what no statement decides; on both where a test asks for either."""
    return migrated_on(getattr(request, "param", "sqlite"), request)


@pytest.fixture
def database(migrated_url: str) -> Iterator[Database]:
    opened = Database.open(migrated_url, clock=SystemClock(), threads=4)
    with opened.transaction() as connection:
        catalogue.put(connection, ENTRIES, at=opened.now(connection))
    apply(opened, parse_file(FILE), actor="test")
    yield opened
    opened.close()


@pytest.fixture
async def fleet(database: Database, tmp_path: Path) -> AsyncIterator[Fleet]:
    ring = KeyRing.generate(tmp_path / "keyring")
    async with AsyncExitStack() as stack:
        # All calls go to a loopback address by http; loading the authorities takes 10 ms.
        client = httpx.AsyncClient(verify=False)
        made = Fleet(database, ring, client)
        for worker in made.workers:
            await stack.enter_async_context(worker.listener.serving())
            assert worker.api is not None
            stack.push_async_callback(worker.api.close)
        # Its connections close first, so that no listener waits for them.
        await stack.enter_async_context(client)
        yield made
