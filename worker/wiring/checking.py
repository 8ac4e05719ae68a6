"""The checks of the command line put together: what looks at tokens from outside the worker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from worker.clock import Clock
from worker.operations.check_orgs import Checks
from worker.settings import Settings
from worker.store.database import Database
from worker.tokens.examine import Examiner, watch
from worker.tokens.http import open_client
from worker.wiring import find_keyring
from worker.wiring.issuers import issuers_of
from worker.wiring.secrets import OpenedCredentials


@asynccontextmanager
async def open_checks(settings: Settings, database: Database, clock: Clock) -> AsyncIterator[Checks]:
    """Checks at the issuers of `worker.toml`, with the credentials of the database.

    Raises:
        ConfigurationError: an issuer or the key ring is not usable.
    """
    source = OpenedCredentials(database, find_keyring(settings), settings.secrets_dir, clock)
    async with open_client() as client:
        watch(client)
        examiners = {
            name: Examiner(issuer, client, clock=clock) for name, issuer in issuers_of(settings).items()
        }
        try:
            yield Checks(database, source, examiners)
        finally:
            for examiner in examiners.values():
                await examiner.close()
