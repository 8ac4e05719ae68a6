"""Operators: people and programs that work for all orgs, from worker.toml and from the database."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from worker.clock import Clock
from worker.features.console.operators import TOKEN_PREFIX
from worker.store import roles, sign_in
from worker.store.database import Database

OperatorRole = Literal["viewer", "operator", "admin"]

# Seconds for which it is remembered that the database has operators, or none.
REMEMBERED = 2.0


@dataclass(frozen=True, slots=True)
class Operator:
    """A person or program that works for all orgs; `token_sha256` in lower-case hexadecimal."""

    name: str
    role: OperatorRole
    token_sha256: str = field(repr=False)


class StoredOperators:
    """The operators of the database. Each lookup reads it, so a change is in force at once."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database.acting(roles.ALL_ORGS)
        self._clock = clock
        self._has_any = False
        self._read_at = float("-inf")

    async def find(self, token_sha256: str) -> Operator | None:
        """The operator with this token; raises StoreUnavailable."""
        row = await self._database.call_autocommit(sign_in.find_operator, token_sha256)
        return None if row is None else Operator(row["name"], row["role"], token_sha256)

    async def has_any(self) -> bool:
        """Whether there is any, at most REMEMBERED seconds ago; raises StoreUnavailable."""
        now = self._clock.monotonic()
        if now - self._read_at >= REMEMBERED:
            self._has_any = await self._database.call_autocommit(sign_in.has_operators)
            self._read_at = now
        return self._has_any


class Operators:
    """Finds operators by the hash of their token: those of worker.toml first, without the database."""

    def __init__(self, configured: Sequence[Operator], stored: StoredOperators | None = None) -> None:
        self._configured = configured
        self._stored = stored

    async def with_token(self, token: str) -> Operator | None:
        """The operator with this token; raises StoreUnavailable if only the database can tell."""
        digest = sign_in.sha256(token)
        found = self._in_file(digest)
        # Other tokens, such as those of orgs, need no lookup.
        if found is None and token.startswith(TOKEN_PREFIX):
            return await self._in_database(digest)
        return found

    async def with_hash(self, token_sha256: str) -> Operator | None:
        """The operator whose token has this hash; raises as `with_token`."""
        return self._in_file(token_sha256) or await self._in_database(token_sha256)

    async def has_any(self) -> bool:
        """Whether there is any; raises as `with_token`."""
        return bool(self._configured) or (self._stored is not None and await self._stored.has_any())

    def _in_file(self, digest: str) -> Operator | None:
        found = None
        # All are compared, so that the time taken does not reveal which one matched.
        for operator in self._configured:
            if hmac.compare_digest(operator.token_sha256, digest):
                found = operator
        return found

    async def _in_database(self, digest: str) -> Operator | None:
        return None if self._stored is None else await self._stored.find(digest)
