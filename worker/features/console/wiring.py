"""API and console, beside a worker or alone (`serve`)."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import httpx
from starlette.types import ASGIApp

from worker.clock import Clock, SystemClock
from worker.engine.runners.child.linux import allow_many_descriptors
from worker.errors import ConfigurationError
from worker.features.console.access import Access, FindCaller, Operator, StoredOperators
from worker.features.console.callers import OpenRing, no_ring
from worker.features.console.login import Login, basis_of, local_origin, print_login_link
from worker.features.console.server import build
from worker.guard import Guard
from worker.kit.web.clients import Addresses, ClientLimits
from worker.kit.web.database_health import DatabaseHealth
from worker.kit.web.health import Health, metrics_of
from worker.kit.web.side import Web
from worker.operations.definitions import edit_definition
from worker.outbound import open_client
from worker.settings import Settings
from worker.store import orgs, roles, schema
from worker.store.database import Database
from worker.store.orgs import OrgCaller
from worker.telemetry import logs
from worker.telemetry.events import emit
from worker.telemetry.vitals import Notifier
from worker.wiring.issuers import issuers_of, login_secret


class ConsolePages:
    """API and console of one process; `open_ring` if it may have the key ring."""

    def __init__(
        self, settings: Settings, clock: Clock, health: Health, *, open_ring: OpenRing = no_ring
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._health = health
        self._open_ring = open_ring

    def check(self) -> None:
        """Raise ConfigurationError if the secret of `[web.login]` or the extra for `[web] mcp` is missing."""
        if self._settings.web.mcp:
            try:
                import_module("worker.features.console.mcp.server")
            except ModuleNotFoundError as error:
                message = f"[web] mcp needs the extra mcp: the module {error.name} is not installed"
                raise ConfigurationError(message, fix="install that extra, or set mcp = false") from None
        if self._settings.web.login.issuer:
            login_secret(self._settings.web.login.issuer, self._settings.secrets_dir)

    def metrics_access(self) -> Access:
        """Knows the operators of worker.toml, who may read metrics that name orgs."""
        return self._access({}, _no_org)

    def announce(self, database: Database, address: tuple[str, int]) -> None:
        """On a terminal, print a link that logs in once, if this machine's browser can reach the console."""
        origin = local_origin(self._settings.web.public_url, *address)
        print_login_link(database, origin, at=self._clock.now())

    async def application(self, stack: contextlib.AsyncExitStack) -> ASGIApp:
        """The application behind `listen`; `stack` closes its resources."""
        web = self._settings.web
        # Its own connections: a page never delays the loops.
        database = Database.open(self._settings.database.url, clock=self._clock, role="web")
        stack.callback(database.close)
        # The caller is not known yet, so this role sees no org.
        anonymous = database.acting(roles.NOBODY)

        async def find_caller(code: str, client_id: str) -> OrgCaller | None:
            return await anonymous.call_autocommit(orgs.find_caller, code, client_id)

        client = await stack.enter_async_context(open_client())
        guards = {
            name: Guard(issuer, client=client, clock=self._clock, report=emit)
            for name, issuer in issuers_of(self._settings).items()
            if issuer.audience
        }
        login = self._login(client)
        if login is not None:
            stack.push_async_callback(login.close)
        return build(
            self._health,
            database,
            self._access(guards, find_caller, StoredOperators(database, self._clock)),
            self._clock,
            public_url=web.public_url,
            with_health=not web.health_listen,
            login=login,
            edit=partial(
                edit_definition,
                inline=self._settings.execution.inline,
                insecure_origins=self._settings.execution.insecure_origins,
                api_origins=self._settings.api_origins,
            ),
            open_ring=self._open_ring,
            secrets_dir=Path(folder) if (folder := self._settings.secrets_dir) else None,
            installation=self._settings.installation,
            mcp_hosts=[web.listen] if web.mcp else None,
            org_usage=web.org_usage,
        )

    def _login(self, client: httpx.AsyncClient) -> Login | None:
        """How people log in, if they can; raises ConfigurationError if the issuer is not usable for it."""
        rules, folder = self._settings.web.login, self._settings.secrets_dir
        if not rules.issuer:
            return None

        def secret() -> str:
            return login_secret(rules.issuer, folder)

        return Login(rules, issuers_of(self._settings)[rules.issuer], client, secret, clock=self._clock)

    def _access(
        self, guards: Mapping[str, Guard], find_caller: FindCaller, stored: StoredOperators | None = None
    ) -> Access:
        web = self._settings.web
        return Access(
            [Operator(one.name, one.role, one.token_sha256) for one in web.operators],
            guards,
            find_caller,
            org_role=web.org_role,
            org_scope=web.org_scope,
            addresses=Addresses(web.trusted_proxies),
            stored=stored,
            login_basis=basis_of(web.login),
            portal=web.portal.may,
            limits=ClientLimits(
                self._clock, logins_per_minute=web.logins_per_minute, calls_per_second=web.calls_per_second
            ),
        )


async def _no_org(code: str, client_id: str) -> None:
    """Finds no org: health and metrics know operators only."""


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code of the process.

    Raises:
        Busy: another process uses the port.
        ConfigurationError: `web.listen` is empty or not usable, or the schema has another version.
        RolesMissing: the database login cannot act for callers.
        StoreUnavailable: the database does not respond at the start.
    """
    if not settings.web.listen:
        raise ConfigurationError(
            '[web] listen is "": there is nothing to serve',
            fix="set an address, such as --set web.listen=127.0.0.1:8470",
        )
    clock = SystemClock()
    logs.configure(settings.log.style or None, level=settings.log.level)
    allow_many_descriptors()
    database = Database.open(settings.database.url, clock=clock, role="web")
    check = partial(database.run, schema.check_for_web, database)
    health = DatabaseHealth(metrics_of(settings, version=version("orgworker")), check)
    try:
        schema.check_for_web(database)
        if database.dialect == "postgresql":
            with database.autocommit() as connection:
                for warning in roles.serve_warnings(connection):
                    emit("web.rights", detail=warning)
        web = Web(settings, clock, health, ConsolePages(settings, clock, health))
        web.bind(required=True)
        asyncio.run(_serve(web, health))
    finally:
        database.close()
    return 0


async def _serve(web: Web, health: DatabaseHealth) -> None:
    notifier, stop = Notifier(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with web.serving():
        notifier.ready("serving")
        await health.look_until(stop, notifier)
