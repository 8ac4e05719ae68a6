"""An installation under simulation: workers and hosts put together by the product's own wiring.

Simulated are only the loop, time, chance, threads, processes and the network; see `loop`, `children`,
`database`. The issuer signs real tokens.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

import apscheduler.executors.base
import apscheduler.job
import apscheduler.schedulers.base
import apscheduler.triggers.interval
import httpx

from tests.fakes.issuer import AUDIENCE, URL, App, FakeIssuer
from tests.simulation import jobs, models
from tests.simulation.broker import Brokers, SimulatedHelper
from tests.simulation.children import SimulatedChildren
from tests.simulation.database import EPOCH, PostgresServer, SqliteFile
from tests.simulation.loop import (
    SeededLoop,
    SimulatedProcess,
    SimulatedThreads,
    Thread,
    outside,
    process_now,
    within,
)
from tests.simulation.network import HostControls, Net, ToIssuer
from tests.simulation.service import LIMITED, Service
from tests.simulation.stubs import Files, Health, Reader, TurnsOfEach
from worker import ids
from worker.app import process as wiring
from worker.app.process import Worker
from worker.engine import incarnation
from worker.engine.incarnation import FAREWELL, ProcessTools, run_incarnations
from worker.engine.runners import inline
from worker.errors import StoreUnavailable, WorkerError
from worker.features.hosts import wiring as hosting
from worker.features.hosts.wiring import Host
from worker.features.hosts.worker_wiring import AttemptListener, HostsOfWorker
from worker.features.rollouts.wiring import RolloutsOfWorker
from worker.operations import chores, starts
from worker.outbound import open_client
from worker.settings import Settings
from worker.store.database import Database
from worker.store.ring_walk import RingWalk
from worker.telemetry import events, mask_in_turn
from worker.telemetry.vitals import Notifier
from worker.tokens.sealing import KeyRing

Dialect = Literal["sqlite", "postgresql"]

ORGS = 5
LEASE, RENEW, POLL = 24.0, 5.0, 8.0
# How much rarer chores are than in the product: their work is the same, and its instants are not.
RARER = 20
# Seconds between two looks at the families of runs, and at deadlines and what is late.
FAMILIES_EVERY, DEADLINES_EVERY = 25.0, 20.0
# Starts whose runs a worker makes in one transaction.
MADE_AT_ONCE = 3
# Seconds until systemd starts a worker again that ended.
AGAIN = 1.0
IDLE = 5.0
# Seconds after which an answer that is lost is not waited for any more.
LOST = 10.0


@dataclass
class Skew:
    """How the wall clock of one machine differs from the true time: by seconds, and seconds a second."""

    ahead: float = 0.0
    drift: float = 0.0


class MachineClock:
    """A `worker.clock.Clock` of one machine: its wall clock may be wrong, its monotonic one is not."""

    def __init__(self, loop: SeededLoop, skew: Skew) -> None:
        self._loop = loop
        self.skew = skew

    def now(self) -> datetime:
        seconds = self._loop.time()
        return EPOCH + timedelta(seconds=seconds * (1 + self.skew.drift) + self.skew.ahead)

    def monotonic(self) -> float:
        return self._loop.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@dataclass(frozen=True)
class Struck:
    """What may take the runs of a machine: its death, that of its zygote, or that it stood still."""

    machine: str
    kind: Literal["killed", "zygote", "still"]
    since: float
    until: float

    @property
    def lasting(self) -> float:
        return self.until - self.since


class Machine:
    """One worker or host: started, killed and started again, as systemd does."""

    def __init__(self, world: World, name: str, kind: Literal["worker", "host"]) -> None:
        self.world = world
        self.name = name
        self.kind = kind
        self.skew = Skew()
        self.process: SimulatedProcess | None = None
        self.children: SimulatedChildren | None = None
        self.tools: ProcessTools | None = None
        self.attempts: AttemptListener | None = None
        # Calls to it that are not answered yet, and what tells others that its own calls are given up.
        self.open_calls: dict[asyncio.Future[Any], None] = {}
        self.own_calls: dict[asyncio.Event, None] = {}
        # Whether it is started again when it has ended.
        self.wanted = True

    @property
    def broker(self) -> SimulatedHelper | None:
        """Its broker, while both are alive."""
        found = None if self.process is None else self.world.brokers.running.get(self.process)
        return found if self.up and found is not None and found.process.alive else None

    @property
    def up(self) -> bool:
        return self.process is not None and self.process.alive

    def start(self) -> None:
        world = self.world
        self.process = process = SimulatedProcess(world.loop, self.name)
        process.context.run(world.loop.create_task, self._live(process))

    async def _live(self, process: SimulatedProcess) -> None:
        code: object = None
        try:
            code = await (self._work() if self.kind == "worker" else self._host())
        except WorkerError as error:
            code = error.code
        except BaseException as error:
            code = repr(error)
            self.world.loop.failures.append(f"{self.name} ended: {error!r}")
        self.world.ended(self, process, code)

    def _tools(self) -> ProcessTools:
        world, process = self.world, process_now()
        assert process is not None
        clock = MachineClock(world.loop, self.skew)
        freezing = self.kind == "host" or not world.on_file
        self.children = SimulatedChildren(
            world.loop,
            process,
            clock,
            freezing=freezing,
            max_freeze=world.settings.execution.max_freeze.total_seconds(),
            asks=partial(world.net.reached, process),
            brokers=world.brokers,
        )
        self.tools = ProcessTools(
            self.kind,
            self.children,
            Notifier(""),
            clock,
            Health(),
            Files(),
            {"child": 8, "inline": 4},
            timedelta(seconds=4),
            farewell=FAREWELL if self.kind == "host" else 0.0,
            random=Random(world.loop.choices.random()),
            threads=SimulatedThreads(),
        )
        return self.tools

    async def _work(self) -> int:
        world = self.world
        settings = world.settings
        tools = self._tools()
        database = world.open_database(tools.clock)
        keyring = KeyRing.load(settings.keyring_file)
        hosts = HostsOfWorker(settings, tools.clock)
        hosts.listener._listener = SimpleNamespace()  # type: ignore[assignment]
        self.attempts = hosts.listener
        # Where there is a rollout: its loop would change what all other seeds do.
        more = [RolloutsOfWorker(settings, tools.clock)] if world.has_rollout else []
        worker = Worker(settings, database, keyring, tools, [hosts, *more])
        try:
            return await run_incarnations(worker.begin, tools, waiting="waiting for the database")
        finally:
            database.close()

    async def _host(self) -> int:
        world, tools = self.world, self._tools()
        controls = HostControls(world, world.tokens[self.name], tools.clock)
        host = Host(world.settings, controls, tools, None)
        return await run_incarnations(host.begin, tools, waiting="waiting for a worker", patient=True)

    def stop(self) -> None:
        """SIGTERM."""
        if self.up and self.tools is not None and self.process is not None:
            process, tools = self.process, self.tools
            self.world.loop.call_soon(tools.requests._receive, context=process.context)

    def kill(self) -> None:
        """SIGKILL of the process; the zygote notices, and ends with it."""
        if self.process is None or not self.process.alive:
            return
        process = self.process
        process.kill()
        self.world.killed(self, process)
        for answered in self.open_calls:
            if not answered.done():
                self.world.loop.call_later(self.world.loop.delay(), _reset, answered, context=outside())
        for given_up in self.own_calls:
            self.world.loop.call_later(self.world.loop.delay(), given_up.set, context=outside())
        self.open_calls, self.own_calls = {}, {}


def _reset(answered: asyncio.Future[Any]) -> None:
    if not answered.done():
        answered.set_exception(httpx.ReadError("the connection was reset"))


class World:
    """One simulation. `settings` are those of every worker."""

    def __init__(
        self,
        seed: int,
        dialect: Dialect,
        url: str,
        folder: Path,
        tokens: Mapping[str, str],
        *,
        workers: int,
        hosts: int,
        batches: bool = False,
        trace: list[str] | None = None,
    ) -> None:
        self.seed = seed
        self.dialect = dialect
        self.on_file = dialect == "sqlite"
        self.url = url
        self.tokens = tokens
        self.loop = SeededLoop(Random(f"choices {seed}"), trace=trace)
        self.net = Net(self.loop)
        self.server: SqliteFile | PostgresServer = (
            SqliteFile(self.loop, self.net)
            if dialect == "sqlite"
            else PostgresServer(self.loop, self.net, url, idle=min(IDLE, LEASE))
        )
        self.clock = MachineClock(self.loop, Skew())
        self.service = Service(self.loop)
        self.brokers = Brokers(self.loop, self.service, self.net)
        self.issuer: Any = FakeIssuer(self.clock)  # type: ignore[arg-type]
        for number in range(ORGS):
            self.issuer.add(app_of(number))
        self.models = self.service.models = models.Models(self.loop, seed)
        self.settings = settings_of(url, folder, models.settings_in(folder) if batches else {})
        self.machines: dict[str, Machine] = {}
        self.workers = [f"w{number}" for number in range(1, workers + 1)]
        for name in self.workers:
            self.machines[name] = Machine(self, name, "worker")
        for name in [f"h{number}" for number in range(1, hosts + 1)]:
            self.machines[name] = Machine(self, name, "host")
        self.watch: Any = None
        self.has_rollout = False
        self.on_admission: Callable[[], None] = lambda: None
        # By worker how many seconds the answer of its next admission takes; without end if it is lost.
        self.late_admissions: dict[str, float] = {}
        # The workers and hosts in whose brokers requests waited at the end.
        self.still_waiting: list[str] = []
        # What befell a machine, or "*" all of them.
        self.struck: list[Struck] = []
        self.emitted: list[tuple[float, str, str, dict[str, Any]]] = []

    def open_database(self, clock: Any) -> Database:
        url = self.settings.database.url
        return Database.open(url, clock=clock, own_reads=True, idle=min(IDLE, LEASE))

    def ended(self, machine: Machine, process: SimulatedProcess, code: object) -> None:
        """A process ended by itself."""
        self.loop.note(process, f"ended {code}")
        process.kill()
        self._close(process)
        self._again(machine)

    def killed(self, machine: Machine, process: SimulatedProcess) -> None:
        self._close(process)
        self._again(machine)

    def _close(self, process: SimulatedProcess) -> None:
        if isinstance(self.server, PostgresServer):
            self.server.end_sessions(process)

    def _again(self, machine: Machine) -> None:
        if machine.wanted:
            self.loop.call_later(AGAIN, self._restart, machine, context=outside())

    def stop_restarts(self) -> None:
        for machine in self.machines.values():
            machine.wanted = False

    def _restart(self, machine: Machine) -> None:
        if machine.wanted and not machine.up:
            machine.start()

    @contextmanager
    def simulated(self) -> Iterator[None]:
        """Replace what is real: time, chance, threads, processes and the network."""
        loop = self.loop

        class VirtualDatetime(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
                return (EPOCH + timedelta(seconds=loop.time())).astimezone(tz)

        chance = Random(f"ids {self.seed}")
        random.seed(self.seed)
        logging.disable(logging.CRITICAL)

        def nanoseconds() -> int:
            process = process_now()
            root = "" if process is None else process.name.partition("/")[0]
            clock = self.clock
            if root in self.machines:
                clock = MachineClock(loop, self.machines[root].skew)
            return int(clock.now().timestamp() * 1e6) * 1000

        def client(transport: Any = None) -> Any:
            return open_client(transport or ToIssuer(self))

        def heard(emitted: Any) -> None:
            process = process_now()
            name = "-" if process is None else process.name
            self.emitted.append((loop.time(), name, emitted.event.name, emitted.fields))
            loop.note(process, emitted.event.name)

        def start_within(work: Any, *, context: Any, **options: Any) -> Any:
            return start_task(work, context=within(context), **options)

        @contextmanager
        def admitting(walk: RingWalk, *args: Any) -> Iterator[Any]:
            with in_transaction(walk, *args) as connection:
                yield connection
            self.on_admission()
            process, thread = process_now(), Thread.current()
            late = self.late_admissions.pop(process.name, 0.0) if process is not None else 0.0
            if late and thread is not None:
                loop.note(process, "the answer of an admission is late, or lost")
                thread.park(LOST if late == float("inf") else late)
                if late == float("inf"):
                    raise StoreUnavailable("the answer of an admission is lost")

        start_task, in_transaction = inline.start_task, RingWalk._transaction
        with ExitStack() as stack:
            stack.enter_context(patch.object(inline, "start_task", start_within))
            stack.enter_context(patch.object(RingWalk, "_transaction", admitting))
            for module in (apscheduler.schedulers.base, apscheduler.triggers.interval):
                stack.enter_context(patch.object(module, "datetime", VirtualDatetime))
            stack.enter_context(patch.object(incarnation, "CatalogueReader", Reader))
            stack.enter_context(patch.object(mask_in_turn._masking, "_turns", TurnsOfEach()))
            stack.enter_context(patch.object(wiring, "open_client", client))
            for name in (
                "POOLS_EVERY",
                "BUDGETS_EVERY",
                "WAKE_EVERY",
                "NEW_CLAIMS_EVERY",
                "NO_HANDLER_EVERY",
            ):
                stack.enter_context(patch.object(wiring, name, RARER * getattr(wiring, name)))
            stack.enter_context(patch.object(wiring, "FAMILIES_EVERY", FAMILIES_EVERY))
            stack.enter_context(patch.object(chores, "EVERY", DEADLINES_EVERY))
            stack.enter_context(patch.object(starts, "RUNS", MADE_AT_ONCE))
            for module in (wiring, hosting):
                runner = partial(inline.Inline, find=jobs.find, watched=False)
                stack.enter_context(patch.object(module, "Inline", runner))
            ids.draw_from(nanoseconds, chance.randbytes)
            stack.callback(ids.draw_from)
            stack.callback(events.listen(heard))
            stack.enter_context(self.server.simulated())
            stack.enter_context(self.brokers.simulated())
            if self.settings.batches:
                stack.enter_context(models.simulated(loop, self.net, self.models, self.seed))
            jobs.JOURNAL = jobs.Journal(loop.time)
            self.service.note = jobs.JOURNAL.seen
            yield

    def run(self, main: Awaitable[Any]) -> Any:
        """Run the simulation to its end."""
        asyncio.set_event_loop(self.loop)
        return self.loop.run_until_complete(main)


def app_of(number: int) -> App:
    return App(f"org_{number}", f"client-{number}", f"secret-{number}", lifetime=60)


def settings_of(url: str, folder: Path, more: Mapping[str, Any]) -> Settings:
    return Settings.model_validate(
        {
            "secrets_dir": str(folder),
            "database": {"url": url},
            "issuers": {
                "main": {
                    "profile": "kinde",
                    "url": URL,
                    "audience": AUDIENCE,
                    "max_requests_per_second": 100,
                    "api_origins": [LIMITED],
                }
            },
            "tokens": {"shared": True},
            "execution": {
                "lease": f"{LEASE:g}s",
                "renew": f"{RENEW:g}s",
                "poll": f"{POLL:g}s",
                "drain": "4s",
                "max_freeze": "60s",
                "inline": [jobs.DISTRIBUTION],
            },
            "attempts": {"listen": "127.0.0.1:8471"},
            "web": {"listen": ""},
            **more,
        }
    )
