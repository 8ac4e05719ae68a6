"""The process `provision`: follows every issuer with a management API, and takes its webhooks."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from importlib.metadata import version
from typing import Any

from worker.clock import Clock, SystemClock
from worker.engine.runners.child.linux import allow_many_descriptors
from worker.errors import ConfigurationError, NotFound
from worker.features.provisioning.hooks import HookReceiver, Hooks, build_hooks
from worker.features.provisioning.provision_loop import LAST_TURN, ProvisionLoop
from worker.features.provisioning.scopes import Scopes
from worker.features.provisioning.sync import Absent
from worker.features.provisioning.wiring import fleet_of, open_provisioner, rules_of
from worker.kit.web.clients import Addresses
from worker.kit.web.connections import Connections
from worker.kit.web.database_health import DatabaseHealth
from worker.kit.web.health import metrics_of
from worker.kit.web.listener import WebServer, bind, build_health
from worker.operations.installation import Ownership
from worker.process.monitoring import alerting
from worker.settings import Settings
from worker.store import schema
from worker.store.database import Database
from worker.telemetry import logs
from worker.telemetry.events import emit
from worker.telemetry.vitals import Notifier

ACTOR = "provision"
EXIT_OK = 0


class ProvisionHealth(DatabaseHealth):
    """Also tells what the loops of the issuers do."""

    _loops: Mapping[str, ProvisionLoop] = {}
    _is_ready = False

    def follow(self, loops: Mapping[str, ProvisionLoop]) -> None:
        """Tell what these loops do, by issuer."""
        self._loops = loops

    def details(self) -> Mapping[str, Any]:
        return {"issuers": {name: loop.doing for name, loop in self._loops.items()}}

    def _report(self, notifier: Notifier) -> None:
        lacking = [f"no {name}" for name in self._lacking]
        status = "; ".join([*lacking, *(f"{name}: {loop.doing}" for name, loop in self._loops.items())])
        if not lacking and not self._is_ready:
            self._is_ready = True
            notifier.ready(status)
        notifier.status(status)


def provision(settings: Settings, *, issuer: str | None, absent: Absent) -> int:
    """Follow the providers until SIGTERM or SIGINT; returns the exit code of the process.

    Raises:
        NotFound: worker.toml has no such issuer.
        ConfigurationError: no issuer has a management API, or its settings or secret are not usable.
        InstallationMismatch: the database may be a copy of another installation's.
        Busy: another process uses the port.
        StoreUnavailable: the database does not respond at the start.
    """
    names = _issuers(settings, issuer)
    clock = SystemClock()
    logs.configure(settings.log.style or None, level=settings.log.level)
    allow_many_descriptors()
    notifier = Notifier()
    # More threads than a command has: two for each issuer, and one for the lock that it holds meanwhile.
    database = Database.open(settings.database.url, clock=clock, role="provision", threads=3 * len(names))
    watched = Database.open(settings.database.url, clock=clock, role="provision", threads=1)
    metrics = metrics_of(settings, version=version("orgworker"))
    health = ProvisionHealth(metrics, partial(watched.call_autocommit, schema.check))
    try:
        with database.autocommit() as connection:
            schema.check(connection)
        ownership = Ownership(database, settings.installation)
        ownership.require()
        listeners = _bind(settings)
        with alerting(settings.alerts, watched, clock):
            asyncio.run(_provision(settings, names, absent, ownership, health, notifier, clock, listeners))
    finally:
        database.close()
        watched.close()
    emit("provisioning.stopped", exit_code=EXIT_OK)
    return EXIT_OK


def _issuers(settings: Settings, issuer: str | None) -> list[str]:
    """The issuers to follow."""
    if issuer is not None and issuer not in settings.issuers:
        known = ", ".join(sorted(settings.issuers)) or "none"
        raise NotFound(f"there is no issuer {issuer!r}", fix=f"worker.toml has {known}")
    managed = [name for name, each in sorted(settings.issuers.items()) if each.management.client_id]
    if issuer is None and not managed:
        raise ConfigurationError(
            "no issuer has a management API: there is nothing to provision",
            fix="add [issuers.NAME.management] to worker.toml; the documentation's page Kinde shows how",
        )
    # One without a management API is refused when it is opened.
    return managed if issuer is None else [issuer]


def _bind(settings: Settings) -> dict[str, socket.socket]:
    """The listening sockets by setting."""
    addresses = {
        "[provisioning] listen": settings.provisioning.listen,
        "[web] health_listen": settings.web.health_listen,
    }
    return {setting: bind(address, setting) for setting, address in addresses.items() if address}


async def _provision(
    settings: Settings,
    names: Sequence[str],
    absent: Absent,
    ownership: Ownership,
    health: ProvisionHealth,
    notifier: Notifier,
    clock: Clock,
    listeners: Mapping[str, socket.socket],
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    web, listen = settings.web, settings.provisioning.listen
    async with AsyncExitStack() as stack:
        loops: dict[str, ProvisionLoop] = {}
        for name in names:
            provisioner = await stack.enter_async_context(
                open_provisioner(settings, ownership, name, clock, actor=ACTOR)
            )
            loops[name] = ProvisionLoop(
                provisioner,
                rules_of(settings, name, absent=absent),
                list(settings.issuers),
                settings.provisioning.every,
                Scopes(provisioner, settings.provisioning.trim_scopes),
                partial(fleet_of, settings, provisioner),
                settings.provisioning.rotate_after,
            )
        health.follow(loops)
        if (listener := listeners.get("[web] health_listen")) is not None:
            server = WebServer(build_health(health), web.health_listen, listener, clock)
            await stack.enter_async_context(server.serving())
        if (listener := listeners.get("[provisioning] listen")) is not None:
            receivers = {
                name: HookReceiver(loop.provisioner.management, loop.notify) for name, loop in loops.items()
            }
            addresses = Addresses(web.trusted_proxies)
            app = build_hooks(health, Hooks(receivers, clock, addresses))
            connections = Connections(web.connections_per_address, addresses)
            server = WebServer(app, listen, listener, clock, connections=connections)
            await stack.enter_async_context(server.serving())
        emit("provisioning.started", issuers=", ".join(names), address=listen or None, pid=os.getpid())
        running = asyncio.gather(*(loop.run(stop) for loop in loops.values()))
        running.add_done_callback(lambda _: stop.set())
        await health.look_until(stop, notifier, last=LAST_TURN)
        await running
