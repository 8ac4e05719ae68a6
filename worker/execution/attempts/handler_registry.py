"""Handler registry: the handlers that this worker can run, as its catalogue children report them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from worker.definitions.definition import Definition
from worker.handlers.catalogue import HandlerEntry
from worker.runs.run import Declared

ANYWHERE = Declared()


class HandlerRegistry:
    """Handlers by name, without broken ones and without inline ones that the operator does not allow."""

    def __init__(self, inline: frozenset[str] = frozenset()) -> None:
        self._inline = inline
        self._entries: dict[str, HandlerEntry] = {}
        # Of the handlers here, and of those of all workers and hosts.
        self._own: dict[str, Declared] = {}
        self._declared: Mapping[str, Declared] = {}

    def add(self, entry: HandlerEntry) -> bool:
        """Add an entry of the catalogue; returns whether it is offered."""
        if entry.error is not None:
            return False
        if entry.isolation == "inline" and not self.allows_inline(entry):
            return False
        self._entries[entry.name] = entry
        self._own[entry.name] = Declared("inline" if entry.isolation == "inline" else "child", entry.pool)
        return True

    def get(self, name: str) -> HandlerEntry | None:
        return self._entries.get(name)

    def unapproved(self, name: str, definition: Definition, *, is_variant: bool = False) -> str | None:
        """The command that approves a handler, if a run of this definition may not be of it until then."""
        return None

    def allows_inline(self, entry: HandlerEntry) -> bool:
        """Whether the operator allows this entry's distribution in the worker's process."""
        return entry.distribution in self._inline

    def learn(self, declared: Mapping[str, Declared]) -> None:
        """Take what handlers of all workers and hosts declare, for those that are not offered here."""
        self._declared = declared

    def declared(self, name: str) -> Declared:
        """Where a handler asks to run: as it is installed here, else as another worker or host offers it."""
        return self._own.get(name) or self._declared.get(name, ANYWHERE)

    def scopes(self, handlers: Sequence[str]) -> frozenset[str]:
        if not handlers:
            return frozenset()
        entries = (self._entries.get(name) for name in handlers)
        return frozenset(scope for entry in entries if entry is not None for scope in entry.scopes)

    def secrets(self, handlers: Sequence[str]) -> frozenset[str]:
        """The names of all secrets that these handlers get."""
        entries = (self._entries.get(name) for name in handlers)
        return frozenset(name for entry in entries if entry is not None for name in entry.secrets)

    def limits(self) -> Mapping[str, int | None]:
        """The limit of each offered handler over all workers, or None."""
        return {name: entry.max_concurrent for name, entry in self._entries.items()}

    def names(self) -> Sequence[str]:
        return sorted(self._entries)
