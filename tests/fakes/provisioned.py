"""An installation and its provider in memory, for provisioning and rotation."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from tests.fakes.clock import ManualClock
from tests.fakes.issuer import FakeIssuer, kinde_issuer
from tests.fakes.management import MemoryManagement
from worker.diagnosis.check_orgs import Checks
from worker.features.provisioning import sync
from worker.features.provisioning.provisioning import Provisioned, Provisioner, exclusive
from worker.operations.installation import Ownership
from worker.store.database import Database
from worker.tokens.sealing import KeyRing
from worker.tokens.token_probe import TokenProbe, watch
from worker.wiring.secrets import OpenedCredentials

NIGHTLY = """
[[template]]
name = "nightly"
orgs = "all"
handler = "acme.note"
schedule = "0 3 * * *"
params = { text = "x" }
"""


class Killed(BaseException):
    """The process dies here."""


class Passing(ManualClock):
    """A clock on which every sleep is over at once, and has taken its time."""

    async def sleep(self, seconds: float) -> None:
        self.advance(seconds)
        await asyncio.sleep(0)


@dataclass
class Place:
    """An installation and its provider."""

    database: Database
    ring: KeyRing
    management: MemoryManagement
    checks: Checks
    clock: Passing

    def provisioner(self, **changes: Any) -> Provisioner:
        values: dict[str, Any] = {
            "ownership": Ownership(self.database, ""),
            "ring": self.ring,
            "management": self.management,
            "checks": self.checks,
            "issuer": "main",
            "actor": "ops",
            "clock": self.clock,
        }
        return Provisioner(**values | changes)

    async def kill_in(self, work: Callable[[], Awaitable[object]], rng: random.Random) -> None:
        """Kill the process at some call of the provider, unless it ends before."""
        left = rng.randrange(1, 40)

        def may_die(call: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed

        self.management.before = self.management.after = may_die
        try:
            await work()
        except BaseException as error:
            # A group may have a part in it that only cancellation ended.
            if not isinstance(error, Killed | BaseExceptionGroup) or "Killed" not in repr(error):
                raise
        self.management.before = self.management.after = lambda call: None

    async def provision(self, org: str | None = None) -> dict[str, Provisioned]:
        with exclusive(Ownership(self.database, ""), "main"):
            return {each.org: each for each in await self.provisioner().provision(org)}

    async def sync(self, only: str | None = None, **rules: Any) -> dict[str, sync.SyncRow]:
        rule = sync.SyncRules("main", **rules)
        listed = await sync.read_orgs(self.management, rule, only)
        made = sync.planned(self.database, listed, rule, only)
        rows = sync.apply(self.database, made, rule, actor="ops", issuers=["main"])
        made.check_suspended(rule)
        return {row["org"]: row for row in rows}


@asynccontextmanager
async def opened_checks(
    database: Database, keyring: KeyRing, clock: ManualClock
) -> AsyncIterator[tuple[FakeIssuer, Checks]]:
    """An issuer, and the checks of orgs there."""
    # A clock of its own that stands still, since a request's deadline is a sleep as well.
    at_the_issuer = ManualClock(clock.now())
    issuer = FakeIssuer(at_the_issuer)
    source = OpenedCredentials(database, keyring, "", clock)
    async with issuer.client() as client:
        watch(client)
        probe = TokenProbe(kinde_issuer(max_requests_per_second=1000), client, clock=at_the_issuer)
        yield issuer, Checks(database, source, {"main": probe})
        await probe.close()


@asynccontextmanager
async def opened_place(
    database: Database, keyring: KeyRing, clock: Passing, apply: Any
) -> AsyncIterator[Place]:
    """An installation whose provider has the orgs org_a to org_h, and a template for each of them."""
    apply(NIGHTLY)
    async with opened_checks(database, keyring, clock) as (issuer, checks):
        management = MemoryManagement(issuer, {f"org_{letter}": letter.upper() for letter in "abcdefgh"})
        yield Place(database, keyring, management, checks, clock)
