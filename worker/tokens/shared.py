"""Shared tokens: one token request per org and lifetime, over all workers and restarts.

The database keeps each verified and enforced token, sealed with the key ring. A worker that needs a token
looks there first. One process at a time requests a new one, under a reservation that ends if it dies.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple, Protocol

from worker.bounded import drop_where, remember
from worker.clock import Clock
from worker.errors import ConfigurationError, Unavailable
from worker.ids import OrgId
from worker.model.orgs import OrgRef
from worker.telemetry.events import emit
from worker.telemetry.masking import masker
from worker.tokens.credentials import Credential
from worker.tokens.issuer_client import GrantedToken
from worker.tokens.sealing import KeyRing

# Seconds that a reservation lasts, how often it is renewed, and how often others look meanwhile.
RESERVED = 15.0
RENEW = 4.0
LOOK = 0.25
# A stored token counts as newer than a known one if it was received this much later, in seconds: the age of
# a row is measured by two clocks.
NEWER = 2.0
# Versions that are remembered from a look until the reservation; a forgotten one costs another look.
MAX_VERSIONS = 10_000
# Rows that `look_up` has read, and the seconds for which they count.
MAX_LOOKED_UP = 5_000
LOOKED_UP = 2.0
# Requests whose ids are kept: one acquisition needs its id several times, and each slot may be one.
MAX_IDS = 4_096


class TokenRequest(NamedTuple):
    """What a `TokenWant` comes to at its issuer, and the key of its token in memory and in the table.

    `scopes` are enforced, `also_ask` are only requested. The audience may be a `resource` (RFC 8707). A
    tuple's hash costs a tenth of a dataclass's.
    """

    issuer: str
    org: OrgRef
    audience: str
    scopes: frozenset[str]
    also_ask: frozenset[str] = frozenset()
    resource: bool = False

    @property
    def labels(self) -> dict[str, str]:
        """The attributes of an event about this request."""
        return {"org": self.org.code, "issuer": self.issuer}

    @property
    def parts(self) -> list[str | list[str]]:
        """What it is for, without the org's code, which may change."""
        resource = ["resource"] if self.resource else []
        return [
            *(self.issuer, self.org.id, self.audience, sorted(self.scopes), sorted(self.also_ask)),
            *resource,
        ]

    @property
    def id(self) -> str:
        """The primary key of its stored token."""
        return _id_of(self)


@lru_cache(MAX_IDS)
def _id_of(request: TokenRequest) -> str:
    return hashlib.sha256(json.dumps(request.parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class StoredToken:
    """A row: `age` and `left` are seconds since it was received and until it expires."""

    sealed: bytes = field(repr=False)
    key_id: str
    credential_id: str
    age: float
    left: float


class Found(NamedTuple):
    """What is stored: `version` counts the tokens that were put there, `token` is the newest."""

    version: int = 0
    token: StoredToken | None = None


class TokenStore(Protocol):
    """Each method raises Unavailable. Concurrent calls share one statement."""

    async def find(self, request: TokenRequest) -> Found:
        """The stored token that has not expired."""

    async def find_all(self, requests: Sequence[TokenRequest]) -> Mapping[TokenRequest, Found]:
        """The same of several requests in one query, without those that have no row."""

    async def lives(self, requests: Sequence[TokenRequest]) -> Mapping[TokenRequest, tuple[float, float]]:
        """The age of each stored token and what is left of its life, in seconds, in one query."""

    async def reserve(self, request: TokenRequest, version: int, seconds: float) -> bool:
        """Reserve the request for a new token.

        False while another process has reserved it, or if a token was stored since `version`.
        """

    async def renew(self, requests: Collection[TokenRequest], seconds: float) -> None:
        """Extend these reservations of this process."""

    async def put(self, request: TokenRequest, token: StoredToken) -> None:
        """Store a token and end the reservation, unless its credential is no longer active."""

    async def release(self, request: TokenRequest) -> None:
        """End the reservation of this process, and keep the token that is there."""

    async def drop(self, request: TokenRequest) -> None:
        """Delete the stored token."""


class SharedTokens:
    """The stored tokens as one process uses them. While the database is away it does without."""

    def __init__(self, store: TokenStore, ring: Callable[[str | None], KeyRing | None], clock: Clock) -> None:
        """`ring` returns the key ring, read again if it lacks the given key."""
        self._store = store
        self._ring = ring
        self._clock = clock
        self._versions: OrderedDict[TokenRequest, int] = OrderedDict()
        # With the monotonic time of the look.
        self._looked_up: OrderedDict[TokenRequest, tuple[float, Found]] = OrderedDict()
        self._reserving: set[TokenRequest] = set()
        # When each was reserved or renewed, monotonic.
        self._reserved: dict[TokenRequest, float] = {}
        self._renewing: asyncio.Task[None] | None = None

    async def find(
        self,
        request: TokenRequest,
        credentials: Sequence[Credential],
        *,
        newest: Callable[[], Awaitable[Sequence[Credential]]],
        newer_than: float | None,
        max_age: float | None,
    ) -> GrantedToken | None:
        """The stored token of a request, as if it had just been granted: it is not verified here.

        None without one, if it is not newer than `newer_than` (monotonic), or if it is older than
        `max_age` seconds. One that does not open, or whose credential is neither among `credentials` nor
        among the `newest`, is deleted and reported. Raises what `newest` raises.
        """
        found = self._found(request)
        self._looked_up.pop(request, None)
        try:
            version, stored = found if found is not None else await self._store.find(request)
        except Unavailable:
            return None
        remember(self._versions, request, version, MAX_VERSIONS)
        if stored is None or (max_age is not None and stored.age >= max_age):
            return None
        received_at = self._clock.monotonic() - stored.age
        if newer_than is not None and received_at < newer_than + NEWER:
            return None
        # Another worker may have used a generation that was added within the last two seconds.
        name = stored.credential_id
        credential = _named(name, credentials) or _named(name, await newest())
        if credential is None:
            await self._reject(request, stored, "its credential is retired, or does not open")
            return None
        granted = self._open(request, stored, credential, received_at)
        if granted is None:
            await self._reject(request, stored, "its key is missing, or it is damaged or from another row")
        return granted

    async def look_up(self, requests: Sequence[TokenRequest]) -> None:
        """Read what is stored for these requests in one query, for `at_hand` and `find` shortly after.

        Raises Unavailable.
        """
        found, now = await self._store.find_all(requests), self._clock.monotonic()
        for request in requests:
            remember(self._looked_up, request, (now, found.get(request, Found())), MAX_LOOKED_UP)

    def at_hand(self, request: TokenRequest, credentials: Sequence[Credential]) -> GrantedToken | None:
        """A stored token that `look_up` has read and that opens, once; all else is left to `find`."""
        found = self._found(request)
        if found is None or found.token is None:
            return None
        credential = _named(found.token.credential_id, credentials)
        if credential is None:
            return None
        granted = self._open(request, found.token, credential, self._clock.monotonic() - found.token.age)
        if granted is not None:
            del self._looked_up[request]
        return granted

    def _found(self, request: TokenRequest) -> Found | None:
        """What `look_up` has read a moment ago, with the ages of now."""
        at, found = self._looked_up.get(request, (float("-inf"), Found()))
        passed = self._clock.monotonic() - at
        if passed >= LOOKED_UP:
            return None
        stored = found.token
        if stored is None or passed >= stored.left:
            return Found(found.version)
        aged = replace(stored, age=stored.age + passed, left=stored.left - passed)
        return Found(found.version, aged)

    def _open(
        self, request: TokenRequest, stored: StoredToken, credential: Credential, received_at: float
    ) -> GrantedToken | None:
        ring = None
        # It is read again for an unknown key, and cannot always be read.
        with suppress(ConfigurationError):
            ring = self._ring(stored.key_id)
        if ring is None:
            return None
        text = ring.open_token(stored.sealed, stored.key_id, _place(request, credential))
        if text is None:
            return None
        masker.note(text, request.org.id)
        return GrantedToken(text, credential, received_at, received_at, stored.age + stored.left)

    async def _reject(self, request: TokenRequest, stored: StoredToken, error: str) -> None:
        """Report a stored token that must not be used, and delete it, so that it is reported once."""
        emit("token.unopened", **request.labels, key=stored.key_id, error=error)
        await self.drop(request)

    def settle(self, request: TokenRequest) -> None:
        """Forget what `find` remembered for `reserve`: its token serves."""
        self._versions.pop(request, None)

    async def life(self, request: TokenRequest) -> tuple[float, float] | None:
        """The age of the stored token and what is left of its life, in seconds, or None.

        Raises Unavailable.
        """
        version, stored = await self._store.find(request)
        remember(self._versions, request, version, MAX_VERSIONS)
        return None if stored is None else (stored.age, stored.left)

    async def lives(self, requests: Sequence[TokenRequest]) -> list[tuple[float, float] | None]:
        """As `life`, of many in one query. Raises Unavailable."""
        found = await self._store.lives(requests)
        return [found.get(request) for request in requests]

    async def reserve(self, request: TokenRequest) -> bool:
        """Whether this process may request a token now, after `find`; if so, `put` or `release` follows.

        Not while another task of it asks the same: they would share a reservation, which either ends.
        """
        if request in self._reserving:
            return False
        self._reserving.add(request)
        try:
            if not await self._store.reserve(request, self._versions.pop(request, 0), RESERVED):
                return False
        except Unavailable:
            return True
        finally:
            self._reserving.remove(request)
        self._reserved[request] = self._clock.monotonic()
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._renew())
        return True

    async def put(self, request: TokenRequest, granted: GrantedToken, *, left: float) -> None:
        """Store a verified and enforced token with `left` seconds to live, and end the reservation."""
        ring = self._ring(None)
        self._reserved.pop(request, None)
        if ring is None:
            return
        sealed, key_id = ring.seal_token(granted.text, _place(request, granted.credential))
        age = self._clock.monotonic() - granted.received_at
        token = StoredToken(sealed, key_id, granted.credential.id, age, left)
        # Else the reservation ends by itself, and the next process requests another token.
        with suppress(Unavailable):
            await self._store.put(request, token)

    async def release(self, request: TokenRequest) -> None:
        """End the reservation: no token came."""
        if self._reserved.pop(request, None) is not None:
            with suppress(Unavailable):
                await self._store.release(request)

    async def drop(self, request: TokenRequest) -> None:
        """Delete the stored token: it must not be used, or shows rights that the org no longer has."""
        self._looked_up.pop(request, None)
        with suppress(Unavailable):
            await self._store.drop(request)

    def forget(self, org_id: OrgId) -> None:
        """Forget what was looked up of an org."""
        drop_where(self._looked_up, lambda request: request.org.id == org_id)

    async def close(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)

    async def _renew(self) -> None:
        """Extend the reservations while there are any: requests wait for the issuer's rate."""
        try:
            while True:
                await self._clock.sleep(RENEW)
                if not self._reserved:
                    return
                now = self._clock.monotonic()
                # Most tokens come before that.
                old = [request for request, since in self._reserved.items() if since <= now - RENEW]
                if old:
                    with suppress(Unavailable):
                        await self._store.renew(old, RESERVED)
                        self._reserved |= dict.fromkeys(self._reserved.keys() & old, now)
        finally:
            self._renewing = None


def _named(credential_id: str, credentials: Sequence[Credential]) -> Credential | None:
    return next((known for known in credentials if known.id == credential_id), None)


def _place(request: TokenRequest, credential: Credential) -> list[str | list[str]]:
    """What a token is sealed for: issuer, org, audience, scopes, and the credential it came from."""
    return [*request.parts, credential.client_id, credential.id, str(credential.generation)]
