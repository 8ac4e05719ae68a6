"""Credentials, secrets and shared tokens in the database, opened with the key ring."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from worker.clock import Clock
from worker.errors import ConfigurationError
from worker.ids import OrgId
from worker.model.bindings import Binding, OrgSecret, OrgSecrets
from worker.model.orgs import OrgRef
from worker.secret import Secret
from worker.store import access_tokens, credentials, org_secrets
from worker.store.database import BatchLoader, Database
from worker.telemetry.events import emit
from worker.tokens.credentials import Credential, read_reference
from worker.tokens.sealing import KeyRing
from worker.tokens.shared import Found, StoredToken, TokenRequest

# Seconds: tokens that arrive one after another are stored together.
LINGER = 0.05


class OpenedCredentials:
    """Implements `tokens.credentials.CredentialSource`; without a `keyring` all secrets must be files.

    If a secret is sealed with an unknown key, the key ring file is read again, so a running worker
    learns of new keys. Secret files are read at each use.
    """

    def __init__(self, database: Database, keyring: KeyRing | None, secrets_dir: str, clock: Clock) -> None:
        self._database = database
        self._keyring = keyring
        self._secrets_dir = Path(secrets_dir) if secrets_dir else None
        self._clock = clock
        self._active: BatchLoader[OrgId, list[dict[str, Any]]] = BatchLoader(self._read_active)
        # Numbered, because each use counts.
        self._numbers = itertools.count()
        self._used: BatchLoader[tuple[int, credentials.Use], None] = BatchLoader(
            self._count_uses, linger=LINGER
        )
        self._unusable: set[str] = set()

    async def active(self, org_id: OrgId) -> Sequence[Credential]:
        """The active generations of one org, newest first, without those that cannot be opened.

        Raises ConfigurationError if none can be opened: a key or a file is missing.
        """
        return self._opened(await self._active.of(org_id) or [])

    async def active_of(self, org_ids: Sequence[OrgId]) -> Mapping[OrgId, Sequence[Credential]]:
        """As `active`, of several orgs in one query; those without a usable one are left out."""
        found: dict[OrgId, Sequence[Credential]] = {}
        for org_id, rows in (await self._read_active(org_ids)).items():
            with suppress(ConfigurationError):
                found[org_id] = self._opened(rows)
        return found

    def _opened(self, rows: Sequence[dict[str, Any]]) -> Sequence[Credential]:
        opened, fault = [], None
        for row in rows:
            try:
                opened.append(self._open(row))
                self._unusable.discard(row["id"])
            except ConfigurationError as error:
                fault = fault or error
                if row["id"] not in self._unusable:
                    self._unusable.add(row["id"])
                    org, generation = row["org"], row["generation"]
                    emit("credential.unusable", org=org, generation=generation, error=error.message)
        if fault is not None and not opened:
            raise fault
        return opened

    async def active_ids(self, org_ids: Sequence[OrgId]) -> Mapping[OrgId, Sequence[str]]:
        """The ids of the active generations of these orgs, newest first."""
        return await self._database.call_autocommit(credentials.active_ids, org_ids)

    async def used(self, credential: Credential, error: str | None) -> None:
        """Record one use of a credential; concurrent calls share a statement."""
        use = credentials.Use(credential.id, credential.org_id, error)
        await self._used.of((next(self._numbers), use))

    def ring(self, key_id: str | None = None) -> KeyRing | None:
        """The key ring, read again if it lacks this key."""
        if self._keyring is not None and key_id is not None and key_id not in self._keyring.key_ids:
            self._keyring = KeyRing.load(self._keyring.path)
        return self._keyring

    async def _read_active(self, org_ids: Sequence[OrgId]) -> Mapping[OrgId, list[dict[str, Any]]]:
        return await self._database.call_autocommit(credentials.active_of, org_ids)

    async def _count_uses(
        self, uses: Sequence[tuple[int, credentials.Use]]
    ) -> Mapping[tuple[int, credentials.Use], None]:
        await self._database.call(credentials.used, [use for _, use in uses], at=self._clock.now())
        return {}

    def _open(self, row: Mapping[str, Any]) -> Credential:
        return Credential(
            id=row["id"],
            org_id=row["org_id"],
            org_code=row["org"],
            generation=row["generation"],
            client_id=row["client_id"],
            secret=Secret(self._secret(row)),
            kind=row["kind"],
            from_file=row["reference"] is not None,
        )

    def _secret(self, row: Mapping[str, Any]) -> str:
        if row["reference"] is not None:
            return read_reference(row["reference"], self._secrets_dir)
        ring = self.ring(row["key_id"])
        if ring is None:
            raise ConfigurationError(
                "there is no key ring to open the secrets in the database",
                fix="put the key ring back, or add the credential again",
            )
        return ring.unseal(row["sealed"], row["key_id"], org_id=row["org_id"], credential_id=row["id"])


class OpenedSecrets:
    """Implements `SecretSource` of attempts; those that are asked for at the same time share a query.

    Nothing is kept between attempts: the next one gets what `secrets rotate` has stored.
    """

    def __init__(self, database: Database, ring: Callable[[str | None], KeyRing | None]) -> None:
        self._database = database
        self._ring = ring
        self._stored: BatchLoader[tuple[OrgId, str], dict[str, Any]] = BatchLoader(self._read)
        self._unusable: set[str] = set()

    async def of(self, org: OrgRef, names: Collection[str]) -> OrgSecrets:
        """The org's secrets with these names, without those that it lacks.

        Raises:
            Unavailable: they cannot be read now.
            ConfigurationError: one cannot be opened with the available keys.
        """
        rows = await asyncio.gather(*(self._stored.of((org.id, name)) for name in names))
        return {row["name"]: self._opened(row, org) for row in rows if row is not None}

    def _opened(self, row: Mapping[str, Any], org: OrgRef) -> OrgSecret:
        """The secret of a row; reports the first failure to open it."""
        try:
            value = self._open(row)
        except ConfigurationError as error:
            if row["id"] not in self._unusable:
                self._unusable.add(row["id"])
                emit("secret.unusable", org=org.code, secret=row["name"], error=error.message)
            raise
        self._unusable.discard(row["id"])
        origin = row["origin"]
        return OrgSecret(value, None if origin is None else Binding(origin, row["header"]))

    def _open(self, row: Mapping[str, Any]) -> str:
        ring = self._ring(row["key_id"])
        if ring is None:
            raise ConfigurationError(
                f"there is no key ring to open the secret {row['name']}", fix="put the key ring back"
            )
        return ring.unseal_secret(row["sealed"], row["key_id"], **org_secrets.place_of(row))

    async def _read(self, wanted: Sequence[tuple[OrgId, str]]) -> Mapping[tuple[OrgId, str], dict[str, Any]]:
        return await self._database.call_autocommit(org_secrets.sealed_of, wanted)


@dataclass(frozen=True, slots=True)
class RingSealer:
    """Seals with the key ring; `ring` returns it, read again if it lacks the given key."""

    ring: Callable[[str | None], KeyRing | None]

    def seal(self, text: str, place: Sequence[object]) -> str:
        ring = self.ring(None)
        if ring is None:
            raise ConfigurationError(
                "without a key ring no run can execute on a host", fix="`python -m worker keys generate`"
            )
        return ring.seal_attempt(text, place)

    def open(self, sealed: str, place: Sequence[object]) -> str | None:
        ring = self.ring(sealed.partition(".")[0])
        return None if ring is None else ring.open_attempt(sealed, place)


class StoredTokens:
    """Implements `tokens.shared.TokenStore` for the process `holder`; concurrent calls share a statement."""

    def __init__(self, database: Database, holder: str) -> None:
        self._database = database
        self._holder = holder
        self._found: BatchLoader[TokenRequest, Found] = BatchLoader(self.find_all)
        self._reserved: BatchLoader[access_tokens.Reservation, bool] = BatchLoader(self._reserve)
        self._put: BatchLoader[tuple[TokenRequest, StoredToken], bool] = BatchLoader(
            self._store, linger=LINGER
        )

    async def find(self, request: TokenRequest) -> Found:
        return await self._found.of(request) or Found()

    async def lives(self, requests: Sequence[TokenRequest]) -> Mapping[TokenRequest, tuple[float, float]]:
        ids = [each.id for each in requests]
        found = await self._database.call_autocommit(access_tokens.lives, ids)
        return {each: found[id_] for each, id_ in zip(requests, ids, strict=True) if id_ in found}

    async def reserve(self, request: TokenRequest, version: int, seconds: float) -> bool:
        wanted = access_tokens.Reservation(request.id, request.org.id, request.issuer, version, seconds)
        return await self._reserved.of(wanted) or False

    async def renew(self, requests: Collection[TokenRequest], seconds: float) -> None:
        await self._database.call(
            access_tokens.renew,
            [each.id for each in requests],
            holder=self._holder,
            lasts=timedelta(seconds=seconds),
        )

    async def put(self, request: TokenRequest, token: StoredToken) -> None:
        await self._put.of((request, token))

    async def release(self, request: TokenRequest) -> None:
        await self._database.call(access_tokens.release, request.id, holder=self._holder)

    async def drop(self, request: TokenRequest) -> None:
        await self._database.call(access_tokens.drop, request.id)

    async def find_all(self, requests: Sequence[TokenRequest]) -> Mapping[TokenRequest, Found]:
        ids = [each.id for each in requests]
        rows = await self._database.call_autocommit(access_tokens.find, ids)
        found = {(row.id, row.org_id): _found(row) for row in rows}
        keys = zip(requests, ids, strict=True)
        return {each: found[id_, each.org.id] for each, id_ in keys if (id_, each.org.id) in found}

    async def _reserve(
        self, wanted: Sequence[access_tokens.Reservation]
    ) -> Mapping[access_tokens.Reservation, bool]:
        # Of several for one token, all but the last one are of tasks that were cancelled.
        last = {each.id: each for each in wanted}
        ours = await self._database.call(access_tokens.reserve, list(last.values()), holder=self._holder)
        return {last[id_]: True for id_ in ours}

    async def _store(
        self, tokens: Sequence[tuple[TokenRequest, StoredToken]]
    ) -> Mapping[tuple[TokenRequest, StoredToken], bool]:
        rows = [
            {
                "id": request.id,
                "org_id": request.org.id,
                "issuer": request.issuer,
                "credential_id": token.credential_id,
                "sealed": token.sealed,
                "key_id": token.key_id,
                "received_ago": token.age,
                "left": token.left,
            }
            for request, token in tokens
        ]
        stored = await self._database.call(access_tokens.put, rows)
        return {each: each[0].id in stored for each in tokens}


def _found(row: access_tokens.Stored) -> Found:
    if row.sealed is None or row.left <= 0:
        return Found(row.version)
    return Found(row.version, StoredToken(row.sealed, row.key_id, row.credential_id, row.age, row.left))
