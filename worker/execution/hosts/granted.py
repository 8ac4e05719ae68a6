"""Granted: the handlers of one incarnation of a host, as far as it may run them."""

from __future__ import annotations

from collections.abc import Mapping

from worker.definitions.definition import Definition
from worker.execution.attempts.plan import HandlerRegistry
from worker.handlers.ceiling import Offered


class GrantedHandlers(HandlerRegistry):
    """The registry for its attempts: no entry goes beyond the ceiling, whatever the host declares."""

    def __init__(self, offered: Offered) -> None:
        # The host has already left out what its operator does not allow inline.
        super().__init__(frozenset(grant.entry.distribution for grant in offered.grants.values()))
        self._grants = offered.grants
        self._admitted = offered.admitted.union(offered.free)
        for grant in offered.grants.values():
            self.add(grant.entry)

    def unapproved(self, name: str, definition: Definition, *, is_variant: bool = False) -> str | None:
        grant = self._grants.get(name)
        if grant is None or not grant.beyond:
            return None
        own = {
            "scopes": definition.scopes,
            "timeout": definition.timeout,
            "max_attempts": definition.max_attempts,
        }
        return None if grant.may_run(own, is_variant=is_variant) else grant.command

    def limits(self) -> Mapping[str, int | None]:
        """The limit of each handler that may be admitted now: it bounds only what this incarnation takes."""
        return {name: most for name, most in super().limits().items() if name in self._admitted}
