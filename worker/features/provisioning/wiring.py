"""The provisioner of an issuer, from the settings; workers never open it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

from worker.clock import Clock
from worker.diagnosis.check_orgs import open_checks
from worker.features.provisioning.fleet import Fleet
from worker.features.provisioning.management_wiring import open_management
from worker.features.provisioning.provisioning import Provisioner
from worker.features.provisioning.sync import Absent, SyncRules
from worker.model.provider import parse_rules
from worker.operations.installation import Ownership
from worker.settings import Settings
from worker.tokens.sealing import KeyRing
from worker.wiring import open_keyring


@asynccontextmanager
async def open_provisioner(
    settings: Settings, ownership: Ownership, issuer: str, clock: Clock, *, actor: str, seals: bool = True
) -> AsyncIterator[Provisioner]:
    """The provisioner of one issuer; reads the secret of its management credentials.

    Without `seals` it can neither make an application nor open a secret, and needs no key ring.

    Raises:
        NotFound, ConfigurationError: as `open_management`, or there is no key ring.
    """
    # First: on SQLite a missing one is generated, which the checks then find.
    database = ownership.database
    ring = open_keyring(settings, database=database) if seals else KeyRing(Path(), {}, {})
    async with (
        open_management(settings, issuer, clock, permit=ownership.permit) as management,
        open_checks(settings, database, clock) as checks,
    ):
        yield Provisioner(
            ownership,
            ring,
            management,
            checks,
            issuer,
            actor,
            clock,
            concurrency=settings.provisioning.concurrency,
        )


def fleet_of(settings: Settings, provisioner: Provisioner, *, overlap: timedelta | None = None) -> Fleet:
    """The rotation of a provisioner's orgs; `overlap` replaces that of the settings."""
    chosen = settings.provisioning
    return Fleet(
        provisioner,
        announce=chosen.announce,
        overlap=chosen.overlap if overlap is None else overlap,
        per_second=settings.issuers[provisioner.issuer].max_requests_per_second,
    )


def rules_of(settings: Settings, issuer: str, *, absent: Absent, any_number: bool = False) -> SyncRules:
    """How the orgs of an issuer follow the provider; `any_number` of them may be suspended at once."""
    return SyncRules(
        issuer,
        parse_rules(settings.issuers[issuer].management.tags),
        absent,
        None if any_number else settings.provisioning.suspended_share,
    )
