"""Parking: orgs and requests that wait after a failure, until their time is over or a new secret comes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from worker.bounded import drop_where, remember
from worker.clock import Clock
from worker.errors import CredentialsRejected, IssuerUnavailable, RequestRejected
from worker.tokens.credentials import Credential

K = TypeVar("K", bound=Hashable)
Parkable = CredentialsRejected | RequestRejected | IssuerUnavailable
MAX_PARKED = 50_000
ASKED_LONGEST = 300.0  # seconds; caps an issuer's Retry-After


class _Parked(NamedTuple):
    error: Parkable
    until: float
    failures: int
    credentials: tuple[Credential, ...]


@dataclass(eq=False, repr=False)
class ParkedKeys(Generic[K]):
    """Keys parked after a failure, for `first` to `last` seconds; new credentials release them at once."""

    first: float
    last: float
    clock: Clock
    _keys: OrderedDict[K, _Parked] = field(default_factory=OrderedDict, init=False)

    def check(self, key: K, credentials: Sequence[Credential]) -> None:
        """Raise the error that the key is parked for, with `retry_after`, if it is parked now."""
        parked = self._parked(key, credentials)
        left = parked.until - self.clock.monotonic() if parked else 0.0
        if parked and left > 0:
            # A copy: each raise of one exception would add to its traceback.
            error = copy.copy(parked.error)
            error.retry_after = left
            raise error

    def failures(self, key: K, credentials: Sequence[Credential]) -> int:
        """The number of failures in a row with these credentials."""
        parked = self._parked(key, credentials)
        return parked.failures if parked else 0

    def park(
        self, key: K, error: Parkable, credentials: Sequence[Credential], *, share: float = 1.0
    ) -> float:
        """Park the key for `share` of its time; sets the error's `retry_after` and returns the seconds."""
        failures = self.failures(key, credentials)
        seconds = min(self.first * 2.0**failures, self.last) * share
        seconds = max(seconds, min(error.retry_after or 0.0, ASKED_LONGEST))
        until = self.clock.monotonic() + seconds
        parked = _Parked(copy.copy(error), until, min(failures + 1, 20), tuple(credentials))
        remember(self._keys, key, parked, MAX_PARKED)
        error.retry_after = seconds
        return seconds

    def release(self, key: K) -> None:
        self._keys.pop(key, None)

    def release_where(self, matches: Callable[[K], bool]) -> None:
        drop_where(self._keys, matches)

    def _parked(self, key: K, credentials: Sequence[Credential]) -> _Parked | None:
        parked = self._keys.get(key)
        if parked is not None and parked.credentials != tuple(credentials):
            del self._keys[key]
            return None
        return parked
