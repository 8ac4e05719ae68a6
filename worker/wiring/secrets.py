"""Issuers, key ring and credentials, as settings and database provide them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from worker.clock import Clock
from worker.errors import ConfigurationError
from worker.ids import OrgId
from worker.operations.check_orgs import Checks
from worker.providers import profile
from worker.settings import Settings
from worker.store import credentials
from worker.store.database import BatchLoader, Database
from worker.telemetry.events import emit
from worker.tokens.credentials import Credential, Secret, read_reference
from worker.tokens.http import open_client
from worker.tokens.issuer import Issuer
from worker.tokens.sealing import KeyRing
from worker.tokens.token_probe import TokenProbe, watch
from worker.wiring import find_keyring


def issuers_of(settings: Settings) -> dict[str, Issuer]:
    """Issuers by their name in `worker.toml`.

    Raises:
        ConfigurationError: an unknown profile, or a URL that a secret must not be sent to.
    """
    return {
        name: Issuer(
            name=name,
            profile=profile.load(issuer.profile),
            url=issuer.url,
            audience=issuer.audience or None,
            api_origins=issuer.api_origins,
            max_requests_per_second=issuer.max_requests_per_second,
            token_endpoint=issuer.token_endpoint,
            keys_url=issuer.keys_url,
        )
        for name, issuer in settings.issuers.items()
    }


class OpenedCredentials:
    """Satisfies `tokens.credentials.CredentialSource`; `keyring` None where every secret is a file.

    The ring's file is read again when a secret is sealed with a key that it did not
    have, so a new key reaches a worker that is up. Files are read each time.
    """

    def __init__(self, database: Database, keyring: KeyRing | None, secrets_dir: str, clock: Clock) -> None:
        self._database = database
        self._keyring = keyring
        self._secrets_dir = Path(secrets_dir) if secrets_dir else None
        self._clock = clock
        self._active: BatchLoader[OrgId, list[dict[str, Any]]] = BatchLoader(self._read_active)
        self._org_of: dict[str, OrgId] = {}
        self._unopened: set[str] = set()

    async def active(self, org_id: OrgId) -> Sequence[Credential]:
        """The active generations of one org, newest first; those that do not open are left out.

        Raises:
            ConfigurationError: none opens: a key is missing, or a file is not there.
        """
        rows = await self._active.of(org_id) or []
        self._org_of.update((row["id"], org_id) for row in rows)
        opened, fault = [], None
        for row in rows:
            try:
                opened.append(self._open(row))
                self._unopened.discard(row["id"])
            except ConfigurationError as error:
                fault = fault or error
                self._tell(row, error)
        if fault is not None and not opened:
            raise fault
        return opened

    async def used(self, credential_id: str, error: str | None) -> None:
        """Count one use of a credential that `active` gave."""
        await self._database.call(
            credentials.used,
            self._org_of[credential_id],
            credential_id,
            at=self._clock.now(),
            error=error,
        )

    async def _read_active(self, org_ids: Sequence[OrgId]) -> Mapping[OrgId, list[dict[str, Any]]]:
        return await self._database.call_autocommit(credentials.active_for_all_orgs, org_ids)

    def _open(self, row: Mapping[str, Any]) -> Credential:
        return Credential(
            id=row["id"],
            org_id=row["org_id"],
            org_code=row["org"],
            generation=row["generation"],
            client_id=row["client_id"],
            secret=Secret(self._secret(row)),
            kind=row["kind"],
        )

    def _tell(self, row: Mapping[str, Any], error: ConfigurationError) -> None:
        if row["id"] not in self._unopened:
            self._unopened.add(row["id"])
            emit("credential.unusable", org=row["org"], generation=row["generation"], error=error.message)

    def _secret(self, row: Mapping[str, Any]) -> str:
        if row["reference"] is not None:
            return read_reference(row["reference"], self._secrets_dir)
        if self._keyring is None:
            raise ConfigurationError(
                "no key ring opens the secrets in the database",
                fix="put the key ring back, or add the credential anew",
            )
        if row["key_id"] not in self._keyring.key_ids:
            self._keyring = KeyRing.load(self._keyring.path)
        return self._keyring.unseal(
            row["sealed"], row["key_id"], org_id=row["org_id"], credential_id=row["id"]
        )


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
            name: TokenProbe(issuer, client, clock=clock) for name, issuer in issuers_of(settings).items()
        }
        try:
            yield Checks(database, source, examiners)
        finally:
            for examiner in examiners.values():
                await examiner.close()
