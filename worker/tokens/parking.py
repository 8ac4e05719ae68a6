"""What is not asked for until a time: an org whose credentials or requests failed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from worker.clock import Clock
from worker.errors import CredentialsRejected, IssuerUnavailable, RequestRejected
from worker.tokens.credentials import Credential

K = TypeVar("K", bound=Hashable)
Parkable = CredentialsRejected | RequestRejected | IssuerUnavailable
MAX_PARKED = 50_000
ASKED_LONGEST = 300.0  # what an issuer's Retry-After can make of it


@dataclass(slots=True)
class _Place:
    error: Parkable
    until: float
    failures: int
    credentials: tuple[Credential, ...]


class Parking(Generic[K]):
    """Keys parked after a failure, for a time that doubles; other credentials release them at once."""

    def __init__(self, first: float, last: float, *, clock: Clock) -> None:
        self._first = first
        self._last = last
        self._clock = clock
        self._places: OrderedDict[K, _Place] = OrderedDict()

    def check(self, key: K, credentials: Sequence[Credential]) -> None:
        """Raise the error that the key is parked for, with `retry_after`; nothing is asked meanwhile."""
        place = self._place(key, credentials)
        left = place.until - self._clock.monotonic() if place else 0.0
        if place and left > 0:
            # A copy: one exception must not be raised to many, each adding to its traceback.
            error = copy.copy(place.error)
            error.retry_after = left
            raise error

    def failures(self, key: K, credentials: Sequence[Credential]) -> int:
        """How many failures in a row, with these credentials."""
        place = self._place(key, credentials)
        return place.failures if place else 0

    def park(
        self, key: K, error: Parkable, credentials: Sequence[Credential], *, share: float = 1.0
    ) -> float:
        """Park the key for `share` of its time; sets the error's `retry_after` and returns the seconds."""
        failures = self.failures(key, credentials)
        seconds = min(self._first * 2.0**failures, self._last) * share
        seconds = max(seconds, min(error.retry_after or 0.0, ASKED_LONGEST))
        self._places[key] = _Place(
            error=copy.copy(error),
            until=self._clock.monotonic() + seconds,
            failures=min(failures + 1, 20),
            credentials=tuple(credentials),
        )
        while len(self._places) > MAX_PARKED:
            self._places.popitem(last=False)
        error.retry_after = seconds
        return seconds

    def release(self, key: K) -> None:
        """Forget the key's failures."""
        self._places.pop(key, None)

    def release_where(self, is_meant: Callable[[K], bool]) -> None:
        """Forget the failures of every key that is meant."""
        for key in [key for key in self._places if is_meant(key)]:
            del self._places[key]

    def _place(self, key: K, credentials: Sequence[Credential]) -> _Place | None:
        place = self._places.get(key)
        if place is not None and place.credentials != tuple(credentials):
            del self._places[key]
            return None
        return place
