"""An installation to measure: a database, orgs with definitions, a backlog, and real workers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import func, insert, select, text

from bench.server import own_server, processor_time
from tests.fakes.plugins import make_plugin
from tests.fakes.postgres import Server
from worker.clock import SystemClock
from worker.demo.provider import Application, serve_provider
from worker.errors import Unavailable
from worker.ids import RunId, new_id
from worker.model.runs.run import NewRun
from worker.operations.orgs import import_orgs
from worker.store import firing, schema, tables
from worker.store.database import Database
from worker.tokens.sealing import KeyRing

AUDIENCE = "https://api.bench.example"
HANDLERS = """\
import asyncio
import resource
import time
from pathlib import Path

from worker import job


@job("bench.inline", isolation="inline")
async def inline(ctx):
    return None


@job("bench.fails", isolation="inline", max_attempts=1)
async def fails(ctx):
    raise RuntimeError("the CRM answered with status 503")


@job("bench.child")
def child(ctx):
    return None


@job("bench.asks", isolation="inline")
async def asks(ctx):
    return await ctx.wait_for("approval")


@job("bench.asks_child")
async def asks_child(ctx):
    return await ctx.wait_for("approval")


@job("bench.tree", children={"bench.inline", "bench.child"})
async def tree(ctx):
    count = 0
    children = [ctx.start(ctx.params["handler"], key=n) for n in range(ctx.params["children"])]
    async for _ in ctx.gather(children):
        count += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"count": count, "peak": peak}


@job("bench.agent")
async def agent(ctx):
    from worker import durable

    return (await durable(REPORTER, ctx).run(f"Report on {ctx.org.code}.")).output


def reporter(url):
    # As agents of a module are made: once, not by each attempt.
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=url, api_key="sk-run")
    made = Agent(OpenAIResponsesModel("gpt-5-mini", provider=provider), name="reporter")

    @made.tool_plain
    async def look_up(topic: str) -> str:
        return f"about {topic}"

    return made


MODELS = Path(__file__).with_name("models.txt")
REPORTER = reporter(MODELS.read_text()) if MODELS.exists() else None


@job("bench.plain_agent")
async def plain_agent(ctx):
    # The same over Anthropic's messages, without a library.
    messages = [{"role": "user", "content": f"Report on {ctx.org.code}."}]
    while True:
        body = {"model": "claude-sonnet-4-5", "max_tokens": 500, "messages": messages}
        response = await ctx.complete(body)
        [part] = response["content"]
        if part["type"] == "text":
            return part["text"]

        async def look_up():
            return f"about {part['input']['topic']}"

        found = await ctx.step("look_up", look_up)
        result = {"type": "tool_result", "tool_use_id": part["id"], "content": found}
        messages += [
            {"role": "assistant", "content": [part]},
            {"role": "user", "content": [result]},
        ]


async def stepwise(ctx):
    async def nothing():
        return None

    took = []
    began = time.time()
    for _ in range(ctx.params["steps"]):
        at = time.perf_counter()
        await ctx.step("nothing", nothing)
        took.append(round(time.perf_counter() - at, 6))
    return {"began": began, "ended": time.time(), "took": took}


steps = job("bench.steps")(stepwise)
steps_inline = job("bench.steps_inline", isolation="inline")(stepwise)


@job("bench.map")
async def mapped(ctx):
    began = time.time()
    await ctx.map("call", asyncio.sleep, [ctx.params["seconds"]] * ctx.params["steps"], concurrency=8)
    return {"began": began, "ended": time.time(), "took": []}
"""
ENTRY_POINTS = {
    **{
        f"bench.{name}": f"orgworker_bench:{name}"
        for name in (
            "inline",
            "fails",
            "child",
            "asks",
            "asks_child",
            "steps",
            "tree",
            "agent",
            "plain_agent",
        )
    },
    "bench.steps_inline": "orgworker_bench:steps_inline",
    "bench.map": "orgworker_bench:mapped",
}
BATCH = 500


class Rates(NamedTuple):
    """Runs per second by the database's clock.

    `steady`: over the last three quarters of the ends, without the start and the requests for tokens.
    `whole`: from the first start to the last end.
    """

    steady: float
    whole: float


@dataclass
class Workers:
    """Running worker processes; their processor times are in seconds."""

    processes: list[subprocess.Popen[bytes]]

    def cpu(self) -> float:
        """What all threads used."""
        return sum(_processor_time(Path(f"/proc/{process.pid}/stat")) for process in self.processes)

    def loop_cpu(self) -> float:
        """What the main threads used, which run the event loops."""
        return sum(
            _processor_time(Path(f"/proc/{process.pid}/task/{process.pid}/stat"))
            for process in self.processes
        )


def _processor_time(stat: Path) -> float:
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Installation:
    """One database with `orgs` orgs, each with one definition of the handler."""

    def __init__(self, folder: Path, url: str, provider_url: str, server: Server | None) -> None:
        self.folder = folder
        self.url = url
        self._server = server
        self._started: list[subprocess.Popen[bytes]] = []
        self._provider_url = provider_url
        self.database = Database.open(url, clock=SystemClock(), role="bench")

    def configure(
        self, *, slots: int, children: int = 0, requests_per_second: float = 1000, extra: str = ""
    ) -> None:
        """Write worker.toml; `slots` are inline ones."""
        (self.folder / "worker.toml").write_text(
            f"""\
secrets_dir = "{self.folder / "secrets"}"
[database]
url = "{self.url}"
[issuers.main]
profile = "kinde"
url = "{self._provider_url}"
audience = "{AUDIENCE}"
max_requests_per_second = {requests_per_second:g}
[execution]
max_children = {children}
max_inline = {slots}
inline = ["orgworker-bench"]
{extra}
[web]
listen = ""
[log]
level = "warning"
style = "json"
"""
        )

    def add_orgs(self, applications: list[Application], *, limit: int) -> None:
        """Add orgs with a credential and one definition each, whose schedule is never due."""
        lines = [
            json.dumps(
                {"code": app.org_code, "name": app.org_code, "issuer": "main"}
                | {"client_id": app.client_id, "client_secret": app.client_secret}
            )
            for app in applications
        ]
        # Not the folder itself: handlers may not read one that holds secrets, and the plug-in is in it.
        secrets = self.folder / "secrets"
        secrets.mkdir(mode=0o700, exist_ok=True)
        keyring = KeyRing.load_or_generate(secrets / "keyring")
        import_orgs(self.database, keyring, lines, actor="bench")
        with self.database.transaction() as connection:
            connection.execute(text("UPDATE orgs SET max_concurrent_runs = :limit"), {"limit": limit})

    def define(
        self,
        handler: str,
        *,
        count: int | None = None,
        due_at: list[datetime] | None = None,
        spec: dict[str, object],
    ) -> None:
        """Add a definition for each org, so many, or with `due_at` one for each time; orgs in turn."""
        with self.database.transaction() as connection:
            orgs = list(connection.execute(select(tables.orgs.c.id)).scalars())
            at = self.database.now(connection)
            ids = [new_id() for _ in range(count or len(due_at or orgs))]
            common = {"revision": 1, "enabled": True, "created_at": at, "updated_at": at}
            rows = [
                {"id": id_, "org_id": orgs[n % len(orgs)], "name": f"d{n}"} | common
                for n, id_ in enumerate(ids)
            ]
            whole = {"handler": handler, "schedule": "every 1h", "isolation": "inline"} | spec
            for part in range(0, len(ids), BATCH):
                some = rows[part : part + BATCH]
                connection.execute(insert(tables.definitions), some)
                connection.execute(
                    insert(tables.definition_revisions),
                    [
                        {"definition_id": row["id"], "revision": 1, "spec": whole, "at": at, "by": "bench"}
                        for row in some
                    ],
                )
                due = [None] * len(some) if due_at is None else due_at[part : part + BATCH]
                connection.execute(
                    insert(tables.schedule),
                    [
                        {"definition_id": row["id"], "org_id": row["org_id"]}
                        | {"next_scheduled_for": instant, "next_fire_at": instant}
                        for row, instant in zip(some, due, strict=True)
                    ],
                )

    def add_backlog(self, count: int, handler: str, isolation: str, *, vacuum: bool = True) -> None:
        """Add waiting runs, definitions in turn, as `definitions run` would create them."""
        definitions = tables.definitions
        with self.database.transaction() as connection:
            found = connection.execute(select(definitions.c.id, definitions.c.org_id)).all()
            at = self.database.now(connection) - timedelta(seconds=1)
        for part in range(0, count, BATCH):
            runs = []
            for number in range(part, min(part + BATCH, count)):
                definition_id, org_id = found[number % len(found)]
                runs.append(
                    NewRun(
                        id=RunId(new_id()),
                        org_id=org_id,
                        definition_id=definition_id,
                        revision=1,
                        handler=handler,
                        origin="manual",
                        scheduled_for=at,
                        available_at=at,
                        idempotency_key=new_id(),
                        serial=False,
                        isolation=isolation,  # type: ignore[arg-type]
                    )
                )
            with self.database.transaction() as connection:
                firing.write(connection, runs)
        if vacuum and self.database.dialect == "postgresql":
            with self.database.autocommit() as connection:
                connection.execute(text("VACUUM ANALYZE"))

    @contextlib.contextmanager
    def workers(
        self,
        count: int = 1,
        *,
        python: str = sys.executable,
        profile: Path | None = None,
        plugins: Sequence[Path] = (),
    ) -> Iterator[Workers]:
        """Start worker processes under this interpreter, and drain them at the end.

        `plugins` is the folder of each; without it all have that of the installation.
        """
        command = [python, "-m", "worker", "--config", str(self.folder / "worker.toml"), "run"]
        if profile is not None:
            command = [python, "-m", "cProfile", "-o", str(profile), *command[1:]]
        folders = plugins or [self.folder / "plugins"] * count
        log = (self.folder / "worker.log").open("ab")
        self._started = started = [
            subprocess.Popen(
                command,
                env=os.environ | {"PYTHONPATH": str(folder)},
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )
            for folder in folders
        ]
        try:
            yield Workers(started)
        finally:
            self._started = []
            for process in started:
                process.send_signal(signal.SIGTERM)
            for process in started:
                process.wait(timeout=60)
            log.close()

    def check(self) -> None:
        """Raise SystemExit if a worker has ended."""
        if any(process.poll() is not None for process in self._started):
            last = (self.folder / "worker.log").read_text().splitlines()[-1:]
            raise SystemExit(f"a worker has ended: {''.join(last)}")

    def ended(self) -> int:
        """How many runs have succeeded or failed."""
        with self.database.autocommit() as connection:
            query = text("SELECT count(*) FROM runs WHERE state IN ('succeeded', 'failed')")
            return int(connection.execute(query).scalar_one())

    def new_database(self) -> contextlib.AbstractContextManager[str]:
        """The URL of another database of its PostgreSQL."""
        if self._server is None:
            raise LookupError("SQLite has no server")
        return self._server.new_database()

    def restart_server(self) -> None:
        """End its PostgreSQL at once, as a crash does, and start it again; queries fail meanwhile."""
        if self._server is None:
            raise LookupError("SQLite has no server")
        self._server.stop(signal.SIGQUIT)
        self._server.start()

    def server_cpu(self) -> float:
        """Processor seconds of PostgreSQL; 0 on SQLite."""
        pid = None if self._server is None else self._server.pid
        return 0.0 if pid is None else processor_time(pid)

    def now(self) -> datetime:
        """The database's time."""
        with self.database.autocommit() as connection:
            return self.database.now(connection)

    def rates(self, since: datetime) -> Rates:
        """How fast the runs ended that started after `since`, counted both ways."""
        runs = tables.runs
        ended = runs.c.state.in_(("succeeded", "failed")), runs.c.started_at > since
        with self.database.autocommit() as connection:
            ends = sorted(connection.execute(select(runs.c.finished_at).where(*ended)).scalars())
            began = connection.execute(select(func.min(runs.c.started_at)).where(*ended)).scalar_one()
        first = len(ends) // 4
        whole = len(ends) / (ends[-1] - began).total_seconds()
        span = (ends[-1] - ends[first]).total_seconds()
        # The runs of a short backlog may end with one statement.
        return Rates(steady=(len(ends) - first) / span if span else whole, whole=whole)

    def wait_for_end(
        self, count: int, *, timeout: float = 600.0, meanwhile: Callable[[], object] = lambda: None
    ) -> None:
        """Wait until this many runs have ended; polls rarely, so as not to distort the measurement.

        `meanwhile` is called at each poll.
        """
        until = time.monotonic() + timeout
        ended = -1
        while ended < count:
            self.check()
            if time.monotonic() > until:
                raise SystemExit(f"only {ended} of {count} ended; see {self.folder}/worker.log")
            time.sleep(0.25)
            meanwhile()
            # The database may be away.
            with contextlib.suppress(Unavailable):
                ended = self.ended()


@contextlib.contextmanager
def installation(dialect: str, *, orgs: int, limit: int = 10_000) -> Iterator[Installation]:
    """A fresh installation on SQLite, or on a PostgreSQL of its own that syncs to disk."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orgworker-bench-")))
        server = stack.enter_context(own_server()) if dialect == "postgresql" else None
        url = server.url() if server else f"sqlite:///{folder / 'worker.db'}"
        schema.upgrade(url)
        plugins = folder / "plugins"
        plugins.mkdir()
        make_plugin(
            plugins,
            dist="orgworker-bench",
            modules={"orgworker_bench": HANDLERS},
            entry_points=ENTRY_POINTS,
        )
        provider, thread = serve_provider()
        stack.enter_context(thread)
        made = Installation(folder, url, provider.url, server)
        stack.callback(made.database.close)
        made.configure(slots=1000)
        applications = [
            Application(f"org_{n}", f"client-{n}", f"secret-of-{n}", audiences=(AUDIENCE,))
            for n in range(orgs)
        ]
        for app in applications:
            provider.add(app)
        made.add_orgs(applications, limit=limit)
        yield made
