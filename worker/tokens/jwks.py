"""The issuer's keys: fetched when needed, refetched for an unknown kid, and the last good set is kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress

from worker.clock import Clock
from worker.errors import IssuerUnavailable
from worker.telemetry.events import emit
from worker.tokens.http import NoReply, Reply
from worker.tokens.jws import MAX_KEYS, Key, invalid, read_keys
from worker.tokens.single_flight import SingleFlight
from worker.tokens.strict_json import Malformed, loads

COOLDOWN = 10.0  # between two fetches for the sake of unknown kids
PUBLICATION = 60.0  # for so long after its first sight an unknown kid may still be published
MAX_AGE = 3600.0  # after so long a set is read anew beside its use, so that withdrawn keys go
FAILED_FIRST, FAILED_LAST = 2.0, 60.0  # the pause after a failed fetch, doubling
MAX_REMEMBERED = 1_000


class KeyNotPublished(IssuerUnavailable):
    """The kid is in no key set yet: no verdict."""

    code = "key_not_published"


class KeySet:
    """The keys of one issuer. `read` makes the request; times are of the monotonic clock."""

    def __init__(
        self,
        issuer: str,
        algorithms: frozenset[str],
        read: Callable[[], Awaitable[Reply | NoReply]],
        *,
        clock: Clock,
    ) -> None:
        self._issuer = issuer
        self._algorithms = algorithms
        self._read = read
        self._clock = clock
        self._keys: dict[str, Key] = {}
        self._read_at = 0.0
        self._next_look = 0.0
        self._failures = 0
        self._next_try = 0.0
        self._first_sights: OrderedDict[str, float] = OrderedDict()
        self._reading: SingleFlight[str, None] = SingleFlight()

    async def find(self, kid: str) -> Key:
        """The key with this id.

        Raises:
            KeyNotPublished: no set has it yet, and it was first seen less than 60 s ago.
            IssuerUnavailable: no set could be read yet.
            TokenRefused: token_invalid(unknown_kid).
        """
        just_read = not self._keys
        if just_read:
            await self._fetch()
        elif self._clock.monotonic() - self._read_at > MAX_AGE and self._may_read():
            # Whoever has a key does not wait for the others.
            self._reading.start(self._issuer, self._refresh)
        if kid not in self._keys:
            await self._look_for(kid, just_read)
        self._first_sights.pop(kid, None)
        return self._keys[kid]

    async def close(self) -> None:
        """End a fetch that is under way."""
        await self._reading.close()

    async def _look_for(self, kid: str, just_read: bool) -> None:
        """Return once the kid is in the set, or raise."""
        first_sight = self._first_sights.setdefault(kid, self._clock.monotonic())
        while len(self._first_sights) > MAX_REMEMBERED:
            self._first_sights.popitem(last=False)
        if not just_read and self._may_look():
            # The last good set goes on serving when this fails; only this kid has no verdict.
            with suppress(IssuerUnavailable):
                await self._fetch()
        if kid in self._keys:
            return
        now = self._clock.monotonic()
        looked = self._read_at >= first_sight
        if now - first_sight < PUBLICATION or not looked:
            error = KeyNotPublished(f"issuer {self._issuer} signed with a key that it does not publish yet")
            error.retry_after = max(1.0, max(self._next_look, self._next_try) - now)
            raise error
        raise invalid("unknown_kid", "it is signed with a key that the issuer does not publish")

    def _may_look(self) -> bool:
        """Whether an unknown kid may cause a fetch now, or wait for one that is under way."""
        if self._issuer in self._reading:
            return True
        if self._clock.monotonic() < self._next_look or not self._may_read():
            return False
        self._next_look = self._clock.monotonic() + COOLDOWN
        return True

    def _may_read(self) -> bool:
        return self._clock.monotonic() >= self._next_try

    async def _fetch(self) -> None:
        """Read the set now, or with whoever is reading it.

        Raises:
            IssuerUnavailable: it cannot be read, or not yet again.
        """
        if self._issuer in self._reading or self._may_read():
            await self._reading.join(self._issuer, self._refresh)
            if not self._failures:
                return
        unavailable = IssuerUnavailable(f"the keys of issuer {self._issuer} cannot be read")
        unavailable.retry_after = max(1.0, self._next_try - self._clock.monotonic())
        raise unavailable

    async def _refresh(self) -> None:
        keys, fault = self._usable(await self._read())
        now = self._clock.monotonic()
        if fault is None:
            self._keys, self._read_at = keys, now
            self._failures, self._next_try = 0, 0.0
            emit("keys.fetched", issuer=self._issuer, keys=len(keys))
            return
        self._next_try = now + min(FAILED_FIRST * 2**self._failures, FAILED_LAST)
        self._failures = min(self._failures + 1, 10)
        emit("keys.failed", issuer=self._issuer, error=fault)

    def _usable(self, reply: Reply | NoReply) -> tuple[dict[str, Key], str | None]:
        """The keys of an answer, or why there are none: an empty set never replaces a good one."""
        if isinstance(reply, NoReply):
            return {}, reply.why
        if reply.status != 200:
            return {}, f"status_{reply.status}"
        try:
            document = loads(reply.content)
        except Malformed as malformed:
            return {}, malformed.code
        entries = document.get("keys") if isinstance(document, dict) else None
        if not isinstance(entries, list) or len(entries) > MAX_KEYS:
            return {}, "key_set"
        keys = read_keys(entries, self._algorithms)
        return keys, None if keys else "no_key"
