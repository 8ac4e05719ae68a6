"""The attempt API of a worker: a listener of the process, and the answers of its incarnation."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from worker.clock import Clock
from worker.engine.attempt.inflight import InflightRun
from worker.engine.attempt.tools import Tools
from worker.features.hosts.attempt_api import AttemptApi
from worker.features.hosts.delivery import HostTools
from worker.features.hosts.listener import DEADLINES, MAX_CALLS, Attempts
from worker.features.hosts.sharing import Sharing
from worker.features.hosts.temporal.wiring import check_placers, placing_loops
from worker.features.hosts.wire import TemporalPlace
from worker.kit.web.connections import Connections
from worker.kit.web.listener import WebServer, bind, server_tls
from worker.model.runs.outcome import EndedAttempt
from worker.operations.installation import Ownership
from worker.settings import Settings
from worker.settings.sections import AttemptsSettings
from worker.store import installation
from worker.store.database import Database
from worker.store.host_store import HostStore
from worker.store.worker_store import WorkerStore
from worker.tokens.sealing import KeyRing
from worker.wiring.addition import Joined, Parts
from worker.wiring.secrets import RingSealer


class AttemptListener:
    """Where hosts reach this worker, if `[attempts] listen` is set."""

    def __init__(self, settings: AttemptsSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._listener: socket.socket | None = None
        self._tls: ssl.SSLContext | None = None
        self.attempts = Attempts(clock)

    def bind(self) -> None:
        """Bind the address and read the certificate, before the worker starts anything else.

        Raises:
            Busy: another process uses the port.
            ConfigurationError: the address, the certificate or the key is not usable.
        """
        settings = self._settings
        if not settings.listen:
            return
        if settings.certificate:
            self._tls = server_tls(settings.certificate, settings.key, "attempts")
        self._listener = bind(settings.listen, "[attempts] listen")

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Answer hosts until the block ends."""
        if self._listener is None:
            yield
            return
        server = WebServer(
            self.attempts.app(),
            self._settings.listen,
            self._listener,
            self._clock,
            connections=Connections(most=MAX_CALLS),
            deadlines=DEADLINES,
            tls=self._tls,
            event="attempts.listening",
        )
        try:
            async with server.serving():
                yield
        finally:
            await self.attempts.checker.close()

    def api(
        self,
        store: WorkerStore,
        tools: Tools,
        settings: Settings,
        ring: Callable[[str | None], KeyRing | None],
        on_end: Callable[[EndedAttempt, InflightRun | None], None],
    ) -> AttemptApi | None:
        """The answers of one incarnation; None without a listener."""
        if self._listener is None:
            return None
        execution, temporal = settings.execution, settings.temporal
        place = TemporalPlace(temporal.address, temporal.namespace, temporal.tls)
        poll, of_hosts = execution.poll.total_seconds(), HostStore(store, execution.lease, self._clock)
        sharing = Sharing(of_hosts, self._clock, poll)
        shared = HostTools(tools, of_hosts, RingSealer(ring), sharing, on_end)
        return AttemptApi(
            shared,
            store,
            lease=execution.lease.total_seconds(),
            renew_every=execution.renew.total_seconds(),
            poll=poll,
            temporal=dict.fromkeys(settings.placed_by_temporal, place),
        )

    def drain(self) -> None:
        """Give out no more runs."""
        self.attempts.draining = True

    async def end(self) -> None:
        """Answer no host any more, and write what hosts have reported."""
        api, self.attempts.api = self.attempts.api, None
        if api is not None:
            await api.close()


class HostsOfWorker:
    """What hosts add to a worker: the attempt API, and the placing loops of pools that Temporal serves."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._ownership: Ownership | None = None
        self.listener = AttemptListener(settings.attempts, clock)

    def bind(self) -> None:
        check_placers(self._settings)
        self.listener.bind()

    def serving(self) -> AbstractAsyncContextManager[None]:
        return self.listener.serving()

    async def prepare(self, database: Database) -> None:
        """The key by which Temporal tells installations apart."""
        if self._settings.placed_by_temporal:
            key = await database.call(installation.key_of)
            self._ownership = Ownership(database, self._settings.installation, key=key)

    def join(self, parts: Parts) -> Joined:
        listener, signals = self.listener, parts.signals
        api = listener.api(parts.store, parts.tools, self._settings, parts.ring, parts.on_end)
        listener.attempts.begin(api)
        parts.resources.push_async_callback(listener.end)
        if api is not None:
            signals.runs_due.calls(api.wake)
        signals.catalogue_read.calls(listener.attempts.catalogue_read)
        signals.draining.calls(listener.drain)
        if self._ownership is None:
            return Joined()
        placing = placing_loops(self._settings, parts.store, parts.id, self._ownership, self._clock)
        signals.runs_due.calls(*(loop.wake.set for loop in placing.values()))
        return Joined(
            {f"placing {pool}": loop.run for pool, loop in placing.items()},
            lambda run: any(loop.holds(run) for loop in placing.values()),
        )
