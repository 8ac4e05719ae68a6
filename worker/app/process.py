"""The worker process: starts the zygote, then one incarnation after another until it is asked to stop."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

from worker.clock import SystemClock
from worker.engine.attempt.attempt import attempt
from worker.engine.attempt.inflight import InflightRuns
from worker.engine.attempt.plan import HandlerRegistry, Plans
from worker.engine.attempt.run_log import RunLogWriter
from worker.engine.attempt.tools import Batches, LimitSource, NoBatches, NoLimits, SecretSource, Tools
from worker.engine.incarnation import Incarnation, ProcessTools, run_incarnations
from worker.engine.loops.admission import Admission
from worker.engine.loops.dispatcher import Dispatcher
from worker.engine.loops.maintenance import Housekeeping, Retention, sweep
from worker.engine.loops.reconciler import emit_recovered, recover_dead_workers
from worker.engine.loops.scheduler import Scheduler, Wakeups
from worker.engine.loops.starts import Starts
from worker.engine.loops.step_writer import StepWriter
from worker.engine.loops.token_renewal import TokenRenewal
from worker.engine.runners.inline import Inline
from worker.engine.signals import Signals
from worker.errors import ConfigurationError
from worker.ids import RunId, WorkerId, new_id
from worker.kit.broker import broker_of
from worker.kit.feature import Point
from worker.kit.web.health import Health, metrics_of
from worker.kit.web.side import PAGES, Web
from worker.model.claims import PoolRules
from worker.model.runs.run import Recovered
from worker.operations.chores import Chores, ages_of
from worker.operations.new_claims import EVERY as NEW_CLAIMS_EVERY
from worker.operations.new_claims import NewClaims
from worker.operations.starts import make_runs
from worker.outbound import open_client
from worker.process.confinement import confinement_of, network_of, readable_management_secrets
from worker.process.monitoring import monitoring
from worker.settings import Settings
from worker.store import schema
from worker.store.database import Database
from worker.store.engine import IDLE, STATEMENT_DEADLINE, lock_sqlite_file
from worker.store.prices import keep_currency
from worker.store.worker_store import WorkerStore, heartbeat_database
from worker.telemetry import logs
from worker.telemetry.events import emit
from worker.telemetry.vitals import Notifier
from worker.tokens.cache import Tokens
from worker.tokens.sealing import KeyRing
from worker.tokens.shared import SharedTokens
from worker.wiring import check_ring, find_keyring, open_keyring
from worker.wiring.addition import Addition, BatchParts, MakeAddition, MakeBatches, MakeLimits, Parts
from worker.wiring.catalogue import StoredCatalogue
from worker.wiring.issuers import issuers_of
from worker.wiring.secrets import OpenedCredentials, OpenedSecrets, StoredTokens
from worker.wiring.start import VERSION, start
from worker.wiring.traces import traces_of

# What features add to a worker.
ADDITIONS: tuple[Point[MakeAddition], ...] = (
    Point("hosts.worker", "[attempts] listen"),
    Point("rollouts.worker", "the comparison of rollouts"),
)
# What shares limits of calls to other services between workers.
SHARES: Point[MakeLimits] = Point("egress.shares", "[[limit]]")
# What sends model requests in batches.
BATCHES: Point[MakeBatches] = Point("batches.worker", "[batches.NAME]")
# A collection of the newest objects stops the loop: 100,000 take some 20 ms, and these some 5.
COLLECT = (20_000, 100, 50)
# Seconds between two searches for runs whose handler no worker offers; each reads all waiting runs.
NO_HANDLER_EVERY = 5.0
# Seconds after which a worker knows of a budget of `runs` or `run_seconds`.
BUDGETS_EVERY = 2.0
# Seconds after which a worker knows of other rules of pools, and of handlers that only others offer.
POOLS_EVERY = 2.0
# Seconds between two counts of the runs that wait for a pool.
COUNT_EVERY = 10.0
# Seconds between two searches for parked runs whose first deadline has passed.
WAKE_EVERY = 1.0
FAMILIES_EVERY = 5.0
# Seconds between two retention passes.
RETENTION_EVERY = 60.0


def run(settings: Settings) -> int:
    """Run a worker until SIGTERM or SIGINT; returns the exit code of the process.

    Raises:
        Busy: another worker holds the SQLite file.
        ConfigurationError: the schema has another version, or an issuer or key is not usable.
    """
    clock = SystemClock()
    logs.configure(settings.log.style or None, level=settings.log.level)
    content = settings.telemetry.record_content
    traces = traces_of(settings.tracing, clock, version=VERSION, record_content=content)
    notifier = Notifier()
    confinement = confinement_of(settings)
    confinement.warn()
    for secret in readable_management_secrets(settings):
        emit("management.exposed", secret=secret)
    on_file, lease = settings.database.sqlite_file is not None, settings.execution.lease
    lock = lock_sqlite_file(settings.database.url, clock=clock) if on_file else None
    # Runs of a worker that is cut off in a transaction must be free once its lease has expired.
    idle = min(IDLE, lease.total_seconds())
    database = Database.open(settings.database.url, clock=clock, own_reads=True, idle=idle)
    try:
        _check(database, settings)
        health = Health(metrics_of(settings, version=VERSION), sandbox=confinement.level)
        pages = PAGES.find()
        given_pages = pages and pages(settings, clock, health, open_ring=partial(find_keyring, settings))
        web = Web(settings, clock, health, given_pages)
        web.bind()
        additions = [make(settings, clock) for point in ADDITIONS if (make := point.find()) is not None]
        for addition in additions:
            addition.bind()
        if not settings.keyring_file.exists():
            check_ring(database, None, settings.keyring_file)
        # On SQLite the file lock decides, not the lease: nothing is frozen.
        lock_fd = None if lock is None else lock.fd
        given = (settings, clock, notifier, health, confinement, broker_of(settings, clock, confinement))
        process = start("worker", *given, collect=COLLECT, freezing=not on_file, lock_fd=lock_fd)
        # From here on this process holds keys, and nothing is forked from it.
        try:
            keyring = open_keyring(settings, database=database)
            check_ring(database, keyring, keyring.path)
        except ConfigurationError:
            asyncio.run(process.children.close())
            raise
        worker = Worker(settings, database, keyring, process, additions)

        async def serve() -> int:
            own_connection = heartbeat_database(database, lease)
            with traces, monitoring(settings.alerts, own_connection, clock, health, process.threads):
                async with AsyncExitStack() as serving:
                    await serving.enter_async_context(web.serving())
                    for addition in additions:
                        await serving.enter_async_context(addition.serving())
                    await database.run(web.announce, database)
                    return await run_incarnations(worker.begin, process, waiting="waiting for the database")

        return asyncio.run(serve())
    finally:
        database.close()


def _check(database: Database, settings: Settings) -> None:
    """Raise ConfigurationError unless this worker can use what the database has."""
    with database.autocommit() as connection:
        schema.check(connection)
    with database.transaction() as connection:
        keep_currency(connection, settings.prices.currency)


@dataclass
class Worker:
    """Puts together the incarnations of a worker."""

    settings: Settings
    database: Database
    keyring: KeyRing
    process: ProcessTools
    additions: Sequence[Addition]

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[Incarnation]:
        """Register an incarnation and put it together. Raises Unavailable."""
        settings, database, execution = self.settings, self.database, self.settings.execution
        worker_id, rules = WorkerId(new_id()), PoolRules(settings.pool_rules)
        handlers = HandlerRegistry(frozenset(execution.inline))
        store = WorkerStore(
            *(database, worker_id, execution.lease),
            pools=execution.pools,
            pool_rules=rules,
            prices=settings.prices.prices,
        )
        await self._register(worker_id, store, handlers)
        for addition in self.additions:
            await addition.prepare(database)
        recovered: Sequence[Recovered] = ()
        if settings.database.sqlite_file is not None:
            # This process holds the file lock, so every other worker of this database is dead.
            recovered = await store.recover_all_others()
            emit_recovered(recovered)
        async with AsyncExitStack() as resources:
            credentials = OpenedCredentials(database, self.keyring, settings.secrets_dir, self.process.clock)
            tokens = await self._tokens(worker_id, credentials, resources)
            parts = _Parts(self, worker_id, store, handlers, rules, credentials, tokens)
            yield parts.assemble(resources, recovered)

    async def _register(self, worker_id: WorkerId, store: WorkerStore, handlers: HandlerRegistry) -> None:
        emit(
            "worker.started",
            worker=worker_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=VERSION,
            database=self.database.url_shown,
        )
        slots = self.process.slots
        capacity = {"children": slots["child"], "inline": slots["inline"]}
        await self.database.run(store.register, version=VERSION, handlers=handlers.names(), capacity=capacity)
        # Before the first run is fired: its handler may be one that only a host offers.
        handlers.learn(await store.look_at_pools())
        await asyncio.to_thread(self.process.files.look)

    async def _tokens(
        self, worker_id: WorkerId, credentials: OpenedCredentials, resources: AsyncExitStack
    ) -> Tokens:
        clock, shared = self.process.clock, None
        if self.settings.tokens.shared:
            shared = SharedTokens(StoredTokens(self.database, worker_id), credentials.ring, clock)
        tokens = Tokens(
            issuers_of(self.settings),
            credentials,
            client=await resources.enter_async_context(open_client()),
            clock=clock,
            rng=self.process.random,
            shared=shared,
            memory=self.settings.tokens.memory_bytes,
        )
        resources.push_async_callback(tokens.close)
        return tokens


@dataclass
class _Parts:
    """What one incarnation is put together from."""

    worker: Worker
    id: WorkerId
    store: WorkerStore
    handlers: HandlerRegistry
    rules: PoolRules
    credentials: OpenedCredentials
    tokens: Tokens
    signals: Signals = field(default_factory=Signals)

    def assemble(self, resources: AsyncExitStack, recovered: Sequence[Recovered]) -> Incarnation:
        """The incarnation, which closes `resources` after its drain; `recovered` are runs of dead workers."""
        settings, database = self.worker.settings, self.worker.database
        process, store, handlers, signals = self.worker.process, self.store, self.handlers, self.signals
        clock, execution = process.clock, settings.execution
        poll = execution.poll.total_seconds()
        steps, wakeups = StepWriter(store, clock), Wakeups(database.hint, clock)
        tools, chores = self._tools(steps, resources), Chores(database, on_runs=signals.fired)
        parts = Parts(self.id, store, tools, self.credentials.ring, signals, chores.ended, resources)
        joined = [addition.join(parts) for addition in self.worker.additions]
        inflight_runs, free = InflightRuns(), signals.slots_free
        dispatcher = Dispatcher(tools, attempt, inflight_runs, store, on_free=free, on_end=chores.ended)
        given = (process.slots, poll, dispatcher.start, signals.ready, process.broker_fault)
        admission = Admission(store, inflight_runs, handlers, clock, *given)
        if store.refills:
            dispatcher.finisher.refill_with(admission, store)
        scheduler = Scheduler(store, handlers, clock, poll=poll, on_fired=signals.fired)
        signals.fired.calls(signals.runs_due, wakeups.request)
        signals.notified.calls(scheduler.wake.set, signals.runs_due)
        incarnation = Incarnation(
            process=process,
            id=self.id,
            sink=store,
            source=admission,
            loops={"scheduler": scheduler, "admission": admission},
            dispatcher=dispatcher,
            steps=steps,
            handlers=handlers,
            catalogue=StoredCatalogue(database, store, clock),
            signals=signals,
            lease=execution.lease,
            renew=execution.renew.total_seconds(),
            leave=store.leave,
            cancel=partial(self._cancel, dispatcher),
            is_placed=lambda run: any(each.is_placed(run) for each in joined),
            resources=resources,
        )
        incarnation.intake |= {
            "backfills": chores.backfills,
            "hints": wakeups.run,
            "listener": partial(database.listen, signals.notified),
            "limits": tools.limits.run,
            "batches": tools.batches.run,
            **{name: loop for each in joined for name, loop in each.loops.items()},
        }
        if settings.tokens.shared:
            ahead = settings.tokens.ahead
            renewal = TokenRenewal(store, self.tokens, handlers, clock, process.random, ahead)
            incarnation.intake["tokens"] = renewal.run
        if database.dialect == "postgresql":
            incarnation.intake["starts"] = self._starts(poll).run
        may_recover, on_recovered = incarnation.may_recover, chores.recovered
        recovery = partial(recover_dead_workers, store, may_recover=may_recover, on_recovered=on_recovered)
        incarnation.housekeeping.every(poll, "recovery", recovery)
        self._add_chores(incarnation.housekeeping, max(poll, 1.0))
        chores.add_to(incarnation.housekeeping)
        on_recovered(recovered)
        return incarnation

    def _starts(self, poll: float) -> Starts:
        """Over a connection of its own, once there are starts: they keep neither firing nor ends waiting."""
        database = self.worker.database
        own = database.with_deadline(STATEMENT_DEADLINE)
        make = partial(own.run, partial(make_runs, own, looking=database))
        return Starts(make, self.worker.process.clock, poll=poll, on_made=self.signals.fired)

    def _batches(self, secrets: SecretSource) -> Batches:
        worker = self.worker
        if not worker.settings.batches or (make := BATCHES.find()) is None:
            return NoBatches()
        clock, ring, woken = worker.process.clock, self.credentials.ring, self.signals.fired
        given = worker.settings, worker.database, self.id, clock, ring, secrets, self.store
        return make(BatchParts(*given, woken))

    def _limits(self) -> LimitSource:
        make = SHARES.find()
        return NoLimits() if make is None else make(self.worker.database, self.id, self.worker.process.clock)

    def _tools(self, steps: StepWriter, resources: AsyncExitStack) -> Tools:
        worker, store, settings = self.worker, self.store, self.worker.settings
        clock, execution, children = worker.process.clock, settings.execution, worker.process.children
        limits, secrets = self._limits(), OpenedSecrets(worker.database, self.credentials.ring)
        batches = self._batches(secrets)
        for closed in (limits, batches):
            resources.push_async_callback(closed.close)
        plans = Plans(
            store,
            clock,
            api_origins=settings.api_origins,
            private_origins=execution.private_origins,
            insecure_origins=execution.insecure_origins,
            api_base_urls={name: issuer.api_base_url for name, issuer in settings.issuers.items()},
            network=network_of(settings),
            rollouts=store.rollouts,
        )
        return Tools(
            plans=plans,
            tokens=self.tokens,
            handlers=self.handlers,
            runners={"child": children, "inline": Inline(clock, broker=children.broker)},
            store=store,
            steps=steps,
            run_log=RunLogWriter(store, clock),
            clock=clock,
            random=worker.process.random,
            digests=worker.keyring.digests(),
            pool_rules=self.rules,
            brokered=children.broker is not None,
            limits=limits,
            secrets=secrets,
            batches=batches,
            versions=store,
        )

    def _add_chores(self, housekeeping: Housekeeping, often: float) -> None:
        store, clock, settings = self.store, self.worker.process.clock, self.worker.settings
        new_claims = NewClaims(self.worker.database, clock)
        housekeeping.every(often, "sweep", partial(sweep, store))
        housekeeping.every(WAKE_EVERY, "waits", self._wake_parked)
        housekeeping.every(FAMILIES_EVERY, "families", self._look_at_families)
        housekeeping.every(NO_HANDLER_EVERY, "no_handler", store.mark_no_handler)
        housekeeping.every(POOLS_EVERY, "pools", self._look_at_pools)
        housekeeping.every(NEW_CLAIMS_EVERY, "new_claims", partial(self._outdate_tokens, new_claims))
        housekeeping.every(COUNT_EVERY, "backlog", store.count_waiting)
        housekeeping.every(BUDGETS_EVERY, "budgets", store.look_at_budgets)
        housekeeping.every(often, "rollouts", store.look_at_rollouts)
        retention = Retention(store, ages_of(settings.retention), clock)
        housekeeping.every(RETENTION_EVERY, "retention", retention.tidy)

    def _cancel(self, dispatcher: Dispatcher[Tools], run_id: RunId, reason: str) -> None:
        held = dispatcher.inflight_runs.get(run_id)
        if held is not None and reason == "suspended":
            self.tokens.drop(held.run.org_id)
        dispatcher.cancel(run_id, reason)

    async def _wake_parked(self) -> None:
        if await self.store.wake_parked():
            self.signals.fired()

    async def _look_at_families(self) -> None:
        if await self.store.look_at_families():
            self.signals.fired()

    async def _look_at_pools(self) -> None:
        self.handlers.learn(await self.store.look_at_pools())

    async def _outdate_tokens(self, new_claims: NewClaims) -> None:
        for org_id in await new_claims.look():
            self.tokens.drop(org_id)
