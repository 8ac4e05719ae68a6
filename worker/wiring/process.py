"""The worker process: starts the zygote, then one incarnation after another until it is asked to stop."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from random import SystemRandom

from worker.adapters.catalogue import StoredCatalogue
from worker.adapters.secrets import OpenedCredentials, OpenedSecrets, StoredTokens
from worker.claims.pools import PoolRules
from worker.clock import Clock, SystemClock
from worker.errors import ConfigurationError, Unavailable
from worker.execution.attempts.attempt import attempt
from worker.execution.attempts.dispatcher import Dispatcher
from worker.execution.attempts.handler_registry import HandlerRegistry
from worker.execution.attempts.inflight import InflightRuns
from worker.execution.attempts.plan import Plans
from worker.execution.attempts.tools import Tools
from worker.execution.incarnation import EXIT_OK, EXIT_TRY_LATER, Announced, Signals, run_incarnations
from worker.execution.loops.admission import Admission
from worker.execution.loops.heartbeat import Heartbeat
from worker.execution.loops.maintenance import Housekeeping, Retention, sweep
from worker.execution.loops.reading import CatalogueReader
from worker.execution.loops.reconciler import Reconciler, Renewal, emit_recovered, recover_dead_workers
from worker.execution.loops.run_log_writer import RunLogWriter
from worker.execution.loops.scheduler import Scheduler
from worker.execution.loops.step_writer import StepWriter
from worker.execution.loops.supervisor import Liveness, Supervisor
from worker.execution.loops.token_renewal import TokenRenewal
from worker.execution.loops.wakeups import Wakeups
from worker.execution.runners.child.pool import SHARE_AFTER, ChildPool
from worker.execution.runners.inline import Inline
from worker.ids import RunId, WorkerId, new_id
from worker.operations.chores import Chores, ages_of
from worker.operations.confinement import Confinement, confinement_of, readable_management_secrets
from worker.operations.guarded_files import FileWatch
from worker.operations.installation import Ownership
from worker.operations.keys import check_ring
from worker.operations.monitoring import monitoring
from worker.operations.new_claims import EVERY as NEW_CLAIMS_EVERY
from worker.operations.new_claims import NewClaims
from worker.outbound import open_client
from worker.runs.run import Isolation, Recovered
from worker.settings import Settings
from worker.store import installation, schema
from worker.store.database import Database
from worker.store.engine import IDLE, lock_sqlite_file
from worker.store.worker_store import WorkerStore, heartbeat_database
from worker.telemetry import logs
from worker.telemetry.events import emit
from worker.telemetry.vitals import Notifier, Vitals
from worker.tokens.cache import Tokens
from worker.tokens.sealing import KeyRing
from worker.tokens.shared import SharedTokens
from worker.web.health import Health
from worker.wiring import find_keyring, open_keyring
from worker.wiring.attempts import AttemptListener
from worker.wiring.issuers import issuers_of
from worker.wiring.placing import check_placers, placing_loops
from worker.wiring.traces import traces_of
from worker.wiring.web import Web, metrics_of

VERSION = version("orgworker")
# Seconds for which a thread keeps the interpreter while another asks for it. The database threads ask
# at each step: with Python's default of 5 ms a busy loop slows them to a tenth of their speed.
SWITCH = 0.0001
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
    traces = traces_of(settings.tracing, clock, version=VERSION)
    notifier = Notifier()
    execution = settings.execution
    check_placers(settings)
    confinement = confinement_of(settings)
    confinement.warn()
    for secret in readable_management_secrets(settings):
        emit("management.exposed", secret=secret)
    on_file = settings.database.sqlite_file is not None
    lock = lock_sqlite_file(settings.database.url, clock=clock) if on_file else None
    # Runs of a worker that is cut off in a transaction must be free once its lease has expired.
    idle = min(IDLE, execution.lease.total_seconds())
    database = Database.open(settings.database.url, clock=clock, own_reads=True, idle=idle)
    try:
        with database.autocommit() as connection:
            schema.check(connection)
        health = Health(metrics_of(settings, version=VERSION), sandbox=confinement.level)
        web = Web(settings, clock, health, open_ring=partial(find_keyring, settings))
        web.bind()
        hosts = AttemptListener(settings.attempts, clock)
        hosts.bind()
        if not settings.keyring_file.exists():
            check_ring(database, None, settings.keyring_file)
        children = ChildPool(
            clock,
            # On SQLite the file lock decides, not the lease: nothing is frozen.
            freezing=not on_file,
            max_freeze=execution.max_freeze,
            preload=execution.preload,
            pass_environment=execution.pass_environment,
            lock_fd=None if lock is None else lock.fd,
            sandbox=confinement.rules,
            spares=min(execution.spare_children, execution.max_children),
            share_after=SHARE_AFTER,
            describes=True,
        )
        children.start()
        # The collector skips what is loaded now and runs less often: each time it walks what all runs in
        # flight hold. By default it runs every few runs and takes a quarter of the time of an inline run.
        gc.freeze()
        # A collection of the newest stops the loop: 100,000 objects take some 20 ms, and these some 5.
        gc.set_threshold(20_000, 100, 50)
        sys.setswitchinterval(SWITCH)
        # From here on this process holds keys, and nothing is forked from it.
        try:
            keyring = open_keyring(settings, database=database)
            check_ring(database, keyring, keyring.path)
        except ConfigurationError:
            asyncio.run(children.close())
            raise

        files = FileWatch(settings, clock)

        def incarnate(signals: Signals) -> Incarnation:
            given = (settings, database, keyring, children, notifier, signals, clock, health)
            return Incarnation(*given, confinement, hosts, files)

        async def serve() -> int:
            own_connection = heartbeat_database(database, execution.lease)
            with traces, monitoring(settings.alerts, own_connection, clock, health):
                async with web.serving(), hosts.serving():
                    await database.run(web.print_link, database)
                    return await run_incarnations(
                        incarnate, children, notifier, clock, waiting="waiting for the database"
                    )

        return asyncio.run(serve())
    finally:
        database.close()


@dataclass
class Incarnation:
    """A worker's life under one lease: its loops and what they share."""

    settings: Settings
    database: Database
    keyring: KeyRing
    children: ChildPool
    notifier: Notifier
    signals: Signals
    clock: Clock
    health: Health
    confinement: Confinement
    hosts: AttemptListener
    files: FileWatch

    def __post_init__(self) -> None:
        self.health.starting()
        self.id = WorkerId(new_id())
        self._announced = Announced(self.notifier, self.clock)
        self._ownership = Ownership(self.database, self.settings.installation)
        settings, database = self.settings, self.database
        self._pool_rules = PoolRules(settings.pool_rules)
        self._store = WorkerStore(
            database,
            self.id,
            settings.execution.lease,
            pools=settings.execution.pools,
            pool_rules=self._pool_rules,
        )
        self._handlers = HandlerRegistry(frozenset(settings.execution.inline))
        self._credentials = OpenedCredentials(database, self.keyring, settings.secrets_dir, self.clock)

    async def run(self) -> int | None:
        """Run until SIGTERM or SIGINT; returns the exit code: 0, or 75 if not everything could be written.

        Returns None if the lease was lost: other workers own the runs, and only a new incarnation may
        admit more.
        """
        emit(
            "worker.started",
            worker=self.id,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=VERSION,
            database=self.database.url_shown,
        )
        execution = self.settings.execution
        capacity = {"children": execution.max_children, "inline": execution.max_inline}
        await self.database.run(
            self._store.register, version=VERSION, handlers=self._handlers.names(), capacity=capacity
        )
        # Before the first run is fired: its handler may be one that only a host offers.
        self._handlers.learn(await self._store.look_at_pools())
        await asyncio.to_thread(self.files.look)
        if self.settings.placed_by_temporal:
            key = await self.database.call(installation.key_of)
            self._ownership = Ownership(self.database, self.settings.installation, key=key)
        if self.settings.database.sqlite_file is not None:
            # This process holds the file lock, so every other worker of this database is dead.
            emit_recovered(await self._store.recover_all_others())
        async with open_client() as client:
            issuers = issuers_of(self.settings)
            shared = None
            if self.settings.tokens.shared:
                stored = StoredTokens(self.database, self.id)
                shared = SharedTokens(stored, self._credentials.ring, self.clock)
            tokens = Tokens(
                issuers,
                self._credentials,
                client=client,
                clock=self.clock,
                shared=shared,
                memory=self.settings.tokens.memory_bytes,
            )
            supervisor = self._assemble(tokens)
            self.children.attach()
            self.signals.pass_to(supervisor.stop)
            try:
                unwritten = not await supervisor.run()
            finally:
                api, self.hosts.attempts.api = self.hosts.attempts.api, None
                if api is not None:
                    await api.close()
                await tokens.close()
        if supervisor.lost and not self.signals.count:
            return None
        # If the database is unavailable, the lease simply expires.
        with suppress(Unavailable):
            await self.database.run(self._store.unregister)
        exit_code = EXIT_TRY_LATER if unwritten else EXIT_OK
        emit("worker.stopped", worker=self.id, exit_code=exit_code)
        return exit_code

    def _assemble(self, tokens: Tokens) -> Supervisor:
        execution, clock, store = self.settings.execution, self.clock, self._store
        poll = execution.poll.total_seconds()
        slots: dict[Isolation, int] = {"child": execution.max_children, "inline": execution.max_inline}
        inflight_runs = InflightRuns()
        run_log, steps = RunLogWriter(store, clock), StepWriter(store, clock)
        plans = Plans(
            store,
            clock,
            api_origins=self.settings.api_origins,
            private_origins=execution.private_origins,
            insecure_origins=execution.insecure_origins,
            api_base_urls={name: issuer.api_base_url for name, issuer in self.settings.issuers.items()},
        )
        tools = Tools(
            plans=plans,
            tokens=tokens,
            handlers=self._handlers,
            runners={"child": self.children, "inline": Inline(clock)},
            checkpoints=store,
            waits=store,
            budgets=store,
            steps=steps,
            run_log=run_log,
            clock=clock,
            random=SystemRandom(),
            digests=self.keyring.digests(),
            pool_rules=self._pool_rules,
            secrets=OpenedSecrets(self.database, self._credentials.ring),
        )

        def wake_own() -> None:
            admission.wake.set()

        def wake_admission() -> None:
            admission.wake.set()
            for loop in placing.values():
                loop.wake.set()
            if api is not None:
                api.wake()

        def wake_loops() -> None:
            scheduler.wake.set()
            wake_admission()

        def on_fired() -> None:
            wake_admission()
            wakeups.request()

        async def wake_parked() -> None:
            if await store.wake_parked():
                on_fired()

        async def look_at_pools() -> None:
            self._handlers.learn(await store.look_at_pools())

        placing = placing_loops(self.settings, store, self.id, self._ownership, clock)
        chores = Chores(self.database, on_runs=wake_admission)
        api = self.hosts.api(store, tools, self.settings, self._credentials.ring, chores.ended)
        self.hosts.attempts.begin(api)
        dispatcher = Dispatcher(tools, attempt, inflight_runs, store, on_free=wake_own, on_end=chores.ended)
        admission = Admission(
            store,
            inflight_runs,
            self._handlers,
            clock,
            slots=slots,
            poll=poll,
            start=dispatcher.start,
            on_admitting=lambda: self._announced.ready(self.id, vitals.in_words()),
        )
        if store.refills:
            dispatcher.finisher.refill_with(admission, store)
        wakeups = Wakeups(self.database.hint, clock)
        scheduler = Scheduler(store, self._handlers, clock, poll=poll, on_fired=on_fired)

        def cancel(run_id: RunId, reason: str) -> None:
            held = inflight_runs.get(run_id)
            if held is not None and reason == "suspended":
                tokens.drop(held.run.org_id)
            dispatcher.cancel(run_id, reason)

        reconciler = Reconciler(
            inflight_runs,
            store,
            cancel=cancel,
            on_lease=self.children.renewed,
            on_lost=lambda: supervisor.give_up(),
            is_placed=lambda run: any(loop.holds(run) for loop in placing.values()),
        )

        def on_renewal(renewal: Renewal) -> None:
            reconciler.take(renewal)
            # After an outage, admission waits for the renewal of the lease.
            admission.wake.set()

        heartbeat = Heartbeat(
            store,
            inflight_runs,
            clock,
            duration=execution.lease,
            renew=execution.renew.total_seconds(),
            on_lease=self.children.renewed,
            on_renewal=on_renewal,
        )

        def on_recovered(recovered: Sequence[Recovered]) -> None:
            chores.recovered(recovered)
            wake_admission()

        housekeeping = Housekeeping()
        housekeeping.every(max(poll, 1.0), "sweep", partial(sweep, store))
        housekeeping.every(WAKE_EVERY, "waits", wake_parked)
        housekeeping.every(NO_HANDLER_EVERY, "no_handler", store.mark_no_handler)
        housekeeping.every(POOLS_EVERY, "pools", look_at_pools)
        new_claims = NewClaims(self.database, clock)

        async def outdate_tokens() -> None:
            for org_id in await new_claims.look():
                tokens.drop(org_id)

        housekeeping.every(NEW_CLAIMS_EVERY, "new_claims", outdate_tokens)
        housekeeping.every(COUNT_EVERY, "backlog", store.count_waiting)
        housekeeping.every(BUDGETS_EVERY, "budgets", store.look_at_budgets)
        chores.add_to(housekeeping)
        retention = Retention(store, ages_of(self.settings.retention), clock)
        housekeeping.every(self.files.every, "files", partial(asyncio.to_thread, self.files.look))
        housekeeping.every(RETENTION_EVERY, "retention", retention.tidy)
        # The loops that a drain ends first must tick.
        liveness = Liveness(
            {"scheduler": lambda: scheduler.ticked_at, "admission": lambda: admission.ticked_at},
            self.notifier,
            clock,
            resting=lambda: self.signals.count > 0,
            status=lambda: vitals.in_words(),
        )
        vitals = Vitals(
            ages=liveness.ages,
            stalled=liveness.stalled,
            lease_remaining=lambda: heartbeat.lease.expires_at - clock.monotonic(),
            admitting=lambda: admission.admitting,
            draining=liveness.resting,
            slots={str(isolation): count for isolation, count in slots.items()},
            used=inflight_runs.used,
        )
        self.health.watch(vitals)
        catalogue = CatalogueReader(
            StoredCatalogue(self.database, store, clock),
            self._handlers,
            on_offered=wake_admission,
            pass_environment=execution.pass_environment,
            command=self.confinement.describe,
            describing=self.children.take_describing,
            on_read=self.hosts.attempts.catalogue_read,
        )
        renewal = TokenRenewal(
            store, tokens, self._handlers, clock, SystemRandom(), self.settings.tokens.ahead
        )
        supervisor = Supervisor(
            intake={
                "scheduler": scheduler.run,
                "admission": admission.run,
                "recovery": partial(
                    recover_dead_workers,
                    store,
                    clock,
                    poll=poll,
                    may_recover=heartbeat.may_recover,
                    on_recovered=on_recovered,
                ),
                "backfills": chores.backfills,
                "hints": wakeups.run,
                "listener": partial(self.database.listen, wake_loops),
                "catalogue": catalogue.run,
                **{f"placing {pool}": loop.run for pool, loop in placing.items()},
                **({"tokens": renewal.run} if self.settings.tokens.shared else {}),
            },
            outlet={
                "finisher": dispatcher.finisher.run,
                "steps": steps.run,
                "journal": run_log.run,
                "reconciler": reconciler.run,
                "pulse": liveness.run,
            },
            dispatcher=dispatcher,
            run_log=run_log,
            heartbeat=heartbeat,
            housekeeping=housekeeping,
            clock=clock,
            drain=execution.drain,
            on_draining=self._draining,
        )
        return supervisor

    def _draining(self, running: int) -> None:
        self.hosts.attempts.draining = True
        self._announced.draining(self.id, running, self.settings.execution.drain)
