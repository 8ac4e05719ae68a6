"""Credentials as tokens need them: read from the database, opened with the key ring or a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from worker.clock import Clock
from worker.errors import ConfigurationError
from worker.ids import OrgId
from worker.store import credentials
from worker.store.database import Database
from worker.tokens.credentials import Credential, Secret
from worker.tokens.sealing import KeyRing


class OpenedCredentials:
    """Satisfies `tokens.credentials.CredentialSource`; `keyring` None where every secret is a file."""

    def __init__(self, database: Database, keyring: KeyRing | None, secrets_dir: str, clock: Clock) -> None:
        self._database = database
        self._keyring = keyring
        self._secrets_dir = Path(secrets_dir) if secrets_dir else None
        self._clock = clock
        self._org_of: dict[str, OrgId] = {}

    async def active(self, org_id: OrgId) -> Sequence[Credential]:
        """The active generations of one org, newest first.

        Raises:
            ConfigurationError: a secret does not open, or its file is not there.
        """
        rows = await self._database.call_autocommit(credentials.active, org_id)
        self._org_of.update((row["id"], org_id) for row in rows)
        return [self._open(row) for row in rows]

    async def used(self, credential_id: str, error: str | None) -> None:
        """Count one use of a credential that `active` gave."""
        await self._database.call(
            credentials.used,
            self._org_of[credential_id],
            credential_id,
            at=self._clock.now(),
            error=error,
        )

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

    def _secret(self, row: Mapping[str, Any]) -> str:
        if row["reference"] is not None:
            return self._read(row["reference"].removeprefix("file:"))
        if self._keyring is None:
            raise ConfigurationError(
                "no key ring opens the secrets in the database",
                fix="put the key ring back, or add the credential anew",
            )
        return self._keyring.unseal(
            row["sealed"], row["key_id"], org_id=row["org_id"], credential_id=row["id"]
        )

    def _read(self, name: str) -> str:
        if self._secrets_dir is None or Path(name).name != name:
            raise ConfigurationError(f"the secret {name} is to be a file of secrets_dir, by its bare name")
        try:
            return (self._secrets_dir / name).read_text(encoding="utf-8").rstrip("\r\n")
        except OSError as error:
            raise ConfigurationError(f"the secret {name} cannot be read: {error.strerror}") from None
