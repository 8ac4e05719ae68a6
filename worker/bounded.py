"""Bounded memory: what is kept of many orgs, the oldest dropped first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def remember(memory: OrderedDict[K, V], key: K, value: V, most: int) -> None:
    """Add an entry as the newest, and drop the oldest beyond `most`."""
    memory[key] = value
    memory.move_to_end(key)
    while len(memory) > most:
        memory.popitem(last=False)


def drop_where(memory: OrderedDict[K, V], matches: Callable[[K], bool]) -> None:
    """Remove all entries whose key matches."""
    for key in [key for key in memory if matches(key)]:
        del memory[key]


class Sized(Generic[K, V]):
    """Entries of at most `limit` bytes together, as `size` estimates them; drops those used longest ago."""

    def __init__(self, limit: int, size: Callable[[V], int]) -> None:
        self._limit = limit
        self._size = size
        self._entries: OrderedDict[K, V] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        """The value, which counts as used."""
        value = self._entries.get(key)
        if value is not None:
            self._entries.move_to_end(key)
        return value

    def peek(self, key: K) -> V | None:
        """The value, which does not count as used."""
        return self._entries.get(key)

    def put(self, key: K, value: V) -> None:
        """Add or replace an entry; the newest is kept even if it alone exceeds the limit."""
        self.pop(key)
        self._entries[key] = value
        self.bytes += self._size(value)
        while self.bytes > self._limit and len(self._entries) > 1:
            self.bytes -= self._size(self._entries.popitem(last=False)[1])

    def pop(self, key: K) -> V | None:
        value = self._entries.pop(key, None)
        if value is not None:
            self.bytes -= self._size(value)
        return value

    def drop_where(self, matches: Callable[[K], bool]) -> None:
        for key in [key for key in self._entries if matches(key)]:
            self.pop(key)
