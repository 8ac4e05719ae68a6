"""The vitals of one incarnation, from the parts that know them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from random import SystemRandom

from worker.clock import Clock
from worker.errors import Unavailable
from worker.execution.attempts.dispatcher import Dispatcher
from worker.execution.attempts.handler_registry import HandlerRegistry
from worker.execution.attempts.inflight import InflightRuns
from worker.execution.attempts.plan import Plans
from worker.execution.attempts.run_services import Tools
from worker.execution.loops.admission import Admission
from worker.execution.loops.heartbeat import Heartbeat
from worker.execution.loops.maintenance import Housekeeping, Retention, sweep
from worker.execution.loops.reconciler import Reconciler, Renewal, emit_recovered, recover_dead_workers
from worker.execution.loops.run_log_writer import RunLogWriter
from worker.execution.loops.scheduler import Scheduler
from worker.execution.loops.supervisor import LAST_FLUSH, Liveness, Supervisor
from worker.execution.loops.wakeups import Wakeups
from worker.execution.runners.child.pool import ChildPool
from worker.execution.runners.inline import Inline
from worker.ids import RunId, WorkerId, new_id
from worker.operations.confinement import Confinement
from worker.runs.run import Isolation, Recovered
from worker.settings import Settings
from worker.store.database import Database
from worker.store.worker_store import WorkerStore
from worker.telemetry.events import emit
from worker.telemetry.vitals import Notifier, Vitals
from worker.tokens.cache import Tokens
from worker.tokens.http import open_client
from worker.tokens.sealing import KeyRing
from worker.wiring.catalogue import Cataloguing
from worker.wiring.chores import Chores, ages_of
from worker.wiring.secrets import OpenedCredentials, issuers_of
from worker.wiring.signals import Signals


def pulse_and_vitals(
    scheduler: Scheduler,
    admission: Admission,
    heartbeat: Heartbeat,
    inflight_runs: InflightRuns,
    slots: Mapping[Isolation, int],
    notifier: Notifier,
    signals: Signals,
    clock: Clock,
) -> tuple[Liveness, Vitals]:
    """The pulse of the loops that bring work in, which a drain lets rest; and what may be asked of all."""
    ticks = {"scheduler": lambda: scheduler.ticked_at, "admission": lambda: admission.ticked_at}
    pulse = Liveness(
        ticks, notifier, clock, resting=lambda: signals.asked > 0, status=lambda: vitals.in_words()
    )
    vitals = Vitals(
        ages=pulse.ages,
        stalled=pulse.stalled,
        lease_remaining=lambda: heartbeat.lease.expires_at - clock.monotonic(),
        admitting=lambda: admission.admitting,
        draining=pulse.resting,
        slots={str(isolation): count for isolation, count in slots.items()},
        used=inflight_runs.used,
    )
    return pulse, vitals


# Seconds between two looks for runs whose handler no worker offers: that reads all that wait.
NO_HANDLER_EVERY = 5.0
EXIT_OK = 0
# Seconds between two looks for what is old enough to be deleted.
RETENTION_EVERY = 60.0
EXIT_TRY_LATER = 75
VERSION = version("orgworker")


class Incarnation:
    """Everything one process needs to carry definitions to their outcomes."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        keyring: KeyRing,
        children: ChildPool,
        notifier: Notifier,
        signals: Signals,
        clock: Clock,
        watch: Callable[[Vitals], None],
        confinement: Confinement,
    ) -> None:
        self.id = WorkerId(new_id())
        self._settings = settings
        self._database = database
        self._children = children
        self._notifier = notifier
        self._signals = signals
        self._clock = clock
        self._watch = watch
        self._confinement = confinement
        self._started_at = clock.monotonic()
        self._is_ready = False
        self._store = WorkerStore(database, self.id, settings.execution.lease)
        self._offers = HandlerRegistry(frozenset(settings.execution.inline))
        self._credentials = OpenedCredentials(database, keyring, settings.secrets_dir, clock)

    async def run(self) -> int | None:
        """Run until SIGTERM or SIGINT; 0 when all is written, 75 when the database did not take it.

        None when the lease was lost: others have the runs, and only a new incarnation
        may take more.
        """
        emit(
            "worker.started",
            worker=self.id,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=VERSION,
            database=self._database.url_shown,
        )
        execution = self._settings.execution
        capacity = {"children": execution.max_children, "inline": execution.max_inline}
        await self._database.run(
            self._store.register, version=VERSION, handlers=self._offers.names(), capacity=capacity
        )
        if self._settings.database.sqlite_file is not None:
            # Whoever holds the file's lock knows that every other worker of it is gone.
            emit_recovered(await self._store.recover_all_others())
        async with open_client() as client:
            issuers = issuers_of(self._settings)
            tokens = Tokens(issuers, self._credentials, client=client, clock=self._clock)
            loops = self._assemble(tokens)
            self._children.attach()
            self._signals.pass_to(loops.stop)
            try:
                unwritten = not await loops.run()
            finally:
                await tokens.close()
        if loops.lost and not self._signals.asked:
            return None
        # Without the database's word, others take this lease for lost when it has passed.
        with suppress(Unavailable):
            await self._database.run(self._store.unregister)
        exit_code = EXIT_TRY_LATER if unwritten else EXIT_OK
        emit("worker.stopped", worker=self.id, exit_code=exit_code)
        return exit_code

    def _assemble(self, tokens: Tokens) -> Supervisor:
        execution, clock, store = self._settings.execution, self._clock, self._store
        poll = execution.poll.total_seconds()
        slots: dict[Isolation, int] = {"child": execution.max_children, "inline": execution.max_inline}
        inflight_runs = InflightRuns()
        run_log = RunLogWriter(store, clock)
        origins = {name: issuer.api_origins for name, issuer in self._settings.issuers.items()}
        tools = Tools(
            plans=Plans(
                store,
                clock,
                api_origins=origins,
                private_origins=execution.private_origins,
                insecure_origins=execution.insecure_origins,
            ),
            tokens=tokens,
            handlers=self._offers,
            runners={"child": self._children, "inline": Inline(clock)},
            checkpoints=store,
            run_log=run_log,
            clock=clock,
            random=SystemRandom(),
        )
        chores = Chores(self._database, on_runs=lambda: admission.wake.set())
        dispatcher = Dispatcher(
            tools, inflight_runs, store, on_free=lambda: admission.wake.set(), on_end=chores.ended
        )
        admission = Admission(
            store,
            inflight_runs,
            self._offers,
            clock,
            slots=slots,
            poll=poll,
            start=dispatcher.start,
            on_admitting=lambda: self._ready(vitals.in_words()),
        )
        hints = Wakeups(self._database.hint, clock)

        def fired() -> None:
            admission.wake.set()
            hints.request()

        def look() -> None:
            scheduler.wake.set()
            admission.wake.set()

        scheduler = Scheduler(store, self._offers, clock, poll=poll, on_fired=fired)

        def stop_run(run_id: RunId, reason: str) -> None:
            held = inflight_runs.get(run_id)
            if held is not None and reason == "suspended":
                tokens.drop(held.run.org_id)
            dispatcher.cancel(run_id, reason)

        reconciler = Reconciler(
            inflight_runs,
            store,
            cancel=stop_run,
            on_lease=self._children.renewed,
            on_lost=lambda: loops.give_up(),
        )

        def renewed(renewal: Renewal) -> None:
            reconciler.take(renewal)
            # After an outage nothing is admitted before the lease is renewed.
            admission.wake.set()

        heartbeat = Heartbeat(
            store,
            inflight_runs,
            clock,
            lease=execution.lease,
            renew=execution.renew.total_seconds(),
            on_lease=self._children.renewed,
            on_renewal=renewed,
        )

        def taken_up(recovered: Sequence[Recovered]) -> None:
            chores.recovered(recovered)
            admission.wake.set()

        housekeeping = Housekeeping()
        housekeeping.every(max(poll, 1.0), "sweep", partial(sweep, store))
        housekeeping.every(NO_HANDLER_EVERY, "no_handler", store.mark_no_handler)
        chores.add_to(housekeeping)
        retention = Retention(store, ages_of(self._settings.retention), clock)
        housekeeping.every(RETENTION_EVERY, "retention", retention.tidy)
        pulse, vitals = pulse_and_vitals(
            scheduler, admission, heartbeat, inflight_runs, slots, self._notifier, self._signals, clock
        )
        self._watch(vitals)
        passed = execution.pass_environment
        command = self._confinement.describe
        cataloguing = Cataloguing(
            self._database, store, self._offers, clock, admission.wake.set, passed, command
        )
        loops = Supervisor(
            intake={
                "scheduler": scheduler.run,
                "admission": admission.run,
                "recovery": partial(
                    recover_dead_workers,
                    store,
                    clock,
                    poll=poll,
                    may_recover=heartbeat.may_recover,
                    on_recovered=taken_up,
                ),
                "backfills": chores.backfills,
                "hints": hints.run,
                "listener": partial(self._database.listen, look),
                "catalogue": cataloguing.run,
            },
            outlet={
                "finisher": dispatcher.finisher.run,
                "journal": run_log.run,
                "reconciler": reconciler.run,
                "pulse": pulse.run,
            },
            dispatcher=dispatcher,
            run_log=run_log,
            heartbeat=heartbeat,
            housekeeping=housekeeping,
            clock=clock,
            drain=execution.drain,
            on_draining=self._draining,
        )
        return loops

    def _ready(self, status: str) -> None:
        if self._is_ready:
            return
        self._is_ready = True
        self._notifier.ready(status)
        emit("worker.ready", worker=self.id, seconds=round(self._clock.monotonic() - self._started_at, 3))

    def _draining(self, running: int) -> None:
        seconds = self._settings.execution.drain.total_seconds()
        self._notifier.stopping(seconds + LAST_FLUSH)
        emit("worker.draining", worker=self.id, running=running, seconds=seconds)
