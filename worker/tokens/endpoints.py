"""Where an issuer's endpoints are: configured, known from its profile, or discovered (RFC 8414)."""

from __future__ import annotations

from dataclasses import dataclass

import httpx

from worker.clock import Clock
from worker.errors import IssuerUnavailable
from worker.tokens.http import KEYS_LIMIT, TOKEN_LIMIT, NoReply, Reply, exchange
from worker.tokens.issuer import Issuer, fault_of, origin_of
from worker.tokens.jwks import KeySet
from worker.tokens.single_flight import SingleFlight
from worker.tokens.strict_json import Malformed, loads

MAX_AGE = 3600.0
FAILED_PAUSE = 5.0


@dataclass(frozen=True, slots=True)
class Discovered:
    """What we use of a discovery document."""

    token_endpoint: str
    keys_url: str


class Endpoints:
    """The token endpoint and the key set's URL of one issuer; the document is read only if it is needed."""

    def __init__(self, issuer: Issuer, client: httpx.AsyncClient, *, clock: Clock) -> None:
        self._issuer = issuer
        self._client = client
        self._clock = clock
        self._discovered: Discovered | None = None
        self._read_at = 0.0
        self._next_try = 0.0
        self._fault = ""
        self._reading: SingleFlight[str, Discovered | None] = SingleFlight()

    async def token(self) -> str:
        """The URL that tokens are asked at.

        Raises:
            IssuerUnavailable: the discovery document cannot be read, or is not this issuer's.
        """
        known = self._issuer.token_endpoint or self._of_profile(self._issuer.profile.token)
        return known or (await self.discovered()).token_endpoint

    async def keys(self) -> str:
        """The URL of the key set; raises IssuerUnavailable as `token` does."""
        known = self._issuer.keys_url or self._of_profile(self._issuer.profile.keys)
        return known or (await self.discovered()).keys_url

    async def read_keys(self) -> Reply | NoReply:
        """The answer of the key set's URL."""
        try:
            url = await self.keys()
        except IssuerUnavailable as error:
            return NoReply(error.code)
        return await exchange(self._client, "GET", url, clock=self._clock, limit=KEYS_LIMIT)

    def _of_profile(self, path: str) -> str:
        return self._issuer.base + path if path else ""

    async def discovered(self) -> Discovered:
        """What the issuer's discovery document says, read again once an hour beside its use.

        Raises:
            IssuerUnavailable: it cannot be read, or is not this issuer's.
        """
        now = self._clock.monotonic()
        may_read = now >= self._next_try
        if self._discovered is not None:
            # The last good one is kept while the endpoint fails, and nobody waits for a newer one.
            if may_read and now - self._read_at >= MAX_AGE:
                self._reading.start(self._issuer.name, self._refresh)
            return self._discovered
        read = None
        if may_read or self._issuer.name in self._reading:
            read = await self._reading.join(self._issuer.name, self._refresh)
        if read is None:
            raise self._unavailable(f"its discovery document cannot be used: {self._fault}")
        return read

    async def close(self) -> None:
        """End a read that is under way."""
        await self._reading.close()

    async def _refresh(self) -> Discovered | None:
        read = await self._read_document()
        now = self._clock.monotonic()
        if isinstance(read, Discovered):
            self._discovered, self._read_at = read, now
            return read
        self._fault, self._next_try = read, now + FAILED_PAUSE
        return None

    def _unavailable(self, why: str) -> IssuerUnavailable:
        error = IssuerUnavailable(f"issuer {self._issuer.name}: {why}")
        error.retry_after = max(1.0, self._next_try - self._clock.monotonic())
        return error

    async def _read_document(self) -> Discovered | str:
        """The document's content, or what is wrong with it."""
        url = self._issuer.base + self._issuer.profile.discovery
        reply = await exchange(self._client, "GET", url, clock=self._clock, limit=TOKEN_LIMIT)
        if isinstance(reply, NoReply):
            return reply.why
        if reply.status != 200:
            return f"status {reply.status}"
        try:
            document = loads(reply.content)
        except Malformed as malformed:
            return malformed.code
        if not isinstance(document, dict) or document.get("issuer") != self._issuer.iss:
            return f"it is not the document of {self._issuer.iss}"
        endpoint, keys_url = document.get("token_endpoint"), document.get("jwks_uri")
        for found in (endpoint, keys_url):
            # A secret goes to the first and trust comes from the second: both stay with the issuer.
            if not isinstance(found, str) or fault_of(found) or origin_of(found) != origin_of(url):
                return "an endpoint of it is not at the issuer's own origin"
        return Discovered(str(endpoint), str(keys_url))


def open_key_set(issuer: Issuer, endpoints: Endpoints, *, clock: Clock) -> KeySet:
    """The issuer's keys, read at its endpoint."""
    return KeySet(issuer.name, issuer.profile.algorithms, endpoints.read_keys, clock=clock)
