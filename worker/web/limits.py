"""Limits: how many logins an address and how many calls a caller may make, in this process."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict

from worker.clock import Clock
from worker.errors import TooManyRequests
from worker.web.addresses import Client

# Keys that are remembered at once. To forget one is to forgive it what it has used up.
MOST_KEYS = 20_000
# Tokens that are known to have been good.
MOST_TOKENS = 10_000


class Buckets:
    """One token bucket for each key: `size` at once, then `rate` a second.

    Full buckets are not kept. If there are too many others, the fullest are dropped: a flood
    of keys drops its own buckets before that of a key that has reached its limit.
    """

    def __init__(self, clock: Clock, *, size: float, rate: float, most: int = MOST_KEYS) -> None:
        self._clock = clock
        self._rate = rate
        self._longest = size / rate
        self._most = most
        # When each bucket is full again, in seconds of the monotonic clock.
        self._full_at: dict[str, float] = {}

    def take(self, key: str) -> float:
        """Take one; 0.0, or in how many seconds there will be one."""
        seconds = self.wait(key)
        if seconds == 0.0:
            self.charge(key)
        return seconds

    def wait(self, key: str) -> float:
        """In how many seconds there will be one to take; 0.0 where there is one."""
        now = self._clock.monotonic()
        missing = max(self._full_at.get(key, now), now) + 1 / self._rate - now - self._longest
        return missing if missing > 1e-9 else 0.0

    def charge(self, key: str) -> None:
        """Take one, also where there is none: then the next one comes that much later."""
        now = self._clock.monotonic()
        if key not in self._full_at and len(self._full_at) >= self._most:
            self._forget(now)
        self._full_at[key] = max(self._full_at.get(key, now), now) + 1 / self._rate

    def give_back(self, key: str) -> None:
        """Undo one `take`."""
        if key in self._full_at:
            self._full_at[key] -= 1 / self._rate

    def _forget(self, now: float) -> None:
        """Make room for a tenth of all, so that a flood seldom pays for it."""
        self._full_at = {key: at for key, at in self._full_at.items() if at > now}
        room = max(1, self._most // 10)
        if len(self._full_at) > self._most - room:
            ordered = sorted(self._full_at.items(), key=lambda entry: entry[1])
            self._full_at = dict(ordered[len(ordered) - self._most + room :])


class Limits:
    """Counts by address until the caller is known, and by caller from then on.

    A trusted proxy that asks for itself is not counted by its address. Each method raises
    TooManyRequests where there were too many.
    """

    def __init__(self, clock: Clock, *, logins_per_minute: int, calls_per_second: int) -> None:
        self._logins = Buckets(clock, size=logins_per_minute, rate=logins_per_minute / 60)
        self._strangers = Buckets(clock, size=calls_per_second, rate=calls_per_second)
        # Tokens that are being checked.
        self._new = Buckets(clock, size=calls_per_second, rate=calls_per_second)
        self._callers = Buckets(clock, size=calls_per_second, rate=calls_per_second)
        self._good: OrderedDict[bytes, None] = OrderedDict()

    def login(self, client: Client) -> None:
        """Count a try to log in."""
        if not client.is_proxy:
            _require(self._logins.take(client.key), f"too many logins from {client.key}")

    def stranger(self, client: Client) -> None:
        """Count a request without a token or session."""
        if not client.is_proxy:
            _require(self._strangers.take(client.key), f"too many requests without a token from {client.key}")

    def caller(self, key: str, name: str) -> None:
        """Count a call of a known caller."""
        _require(self._callers.take(key), f"too many calls by {name}")

    def token(self, token: str, client: Client) -> None:
        """Ask whether a token may be checked; `was_good` or `was_bad` follows.

        A bad token counts as a login. A token that was good before passes whatever others at its
        address have tried, and new tokens that arrive together do not block each other.
        """
        if client.is_proxy or _digest(token) in self._good:
            return
        _require(self._logins.wait(client.key), f"too many bad tokens from {client.key}")
        _require(self._new.take(client.key), f"too many new tokens from {client.key}")

    def was_good(self, token: str, client: Client) -> None:
        """Remember a good token."""
        digest = _digest(token)
        if digest not in self._good and not client.is_proxy:
            self._new.give_back(client.key)
        self._good[digest] = None
        self._good.move_to_end(digest)
        if len(self._good) > MOST_TOKENS:
            self._good.popitem(last=False)

    def was_bad(self, token: str, client: Client) -> None:
        """Count a bad token as a login, unless it was good before, such as one that has expired."""
        digest = _digest(token)
        if digest in self._good:
            del self._good[digest]
        elif not client.is_proxy:
            self._logins.charge(client.key)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _require(seconds: float, message: str) -> None:
    if seconds > 0:
        raise TooManyRequests(message, retry_after=math.ceil(seconds))
