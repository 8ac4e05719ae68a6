"""Rules of pools: what a token must carry so that a run may execute there. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from worker.errors import TokenRefused
from worker.guard.claims import Claims

# Of each pool the properties that a token must have, with their values.
Rules = Mapping[str, Mapping[str, Any]]


def pool_mismatch(pool: str, claims: Claims, rules: Rules) -> str | None:
    """The first property that the pool requires and the token lacks or has with another value, else None."""
    for name, expected in rules.get(pool, {}).items():
        if name not in claims.properties or not _is(claims.properties[name], expected):
            return name
    return None


def _is(value: Any, expected: Any) -> bool:
    """Whether a property has the value that a rule expects: texts may hold true, false and numbers."""
    text = _text(value)
    return text is not None and text == _text(expected)


def _text(value: Any) -> str | None:
    """A value as a property of text has it; None for lists, tables and null, which match nothing."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, str | int | float) else None


def as_texts(rules: Rules) -> Rules:
    """The same rules with all values as texts, as they are stored and compared."""
    return {
        pool: {name: _text(value) for name, value in required.items()} for pool, required in rules.items()
    }


class PoolRules:
    """The rules that a worker enforces: those of its own configuration, and those stored for all workers.

    Both hold. While they differ for a pool, the worker takes no run of that pool: a worker that started
    later has other rules, and this one must restart with them.
    """

    def __init__(self, own: Rules | None = None, stored: Rules | None = None) -> None:
        self.own = as_texts(own or {})
        self.stored: Rules = stored or {}

    def enforce(self, pool: str, claims: Claims) -> None:
        """Raise TokenRefused if the token may not be used for a run in this pool."""
        for rules in (self.own, self.stored):
            if pool in rules and (missing := pool_mismatch(pool, claims, rules)) is not None:
                raise TokenRefused("pool_mismatch", missing)

    @property
    def differing(self) -> frozenset[str]:
        """The pools of the configuration whose stored rules are others."""
        return frozenset(pool for pool, rules in self.own.items() if rules != self.stored.get(pool))

    def usable(self, pools: Collection[str]) -> tuple[str, ...]:
        """Those of these pools that the worker may take runs of."""
        differing = self.differing
        return tuple(pool for pool in pools if pool not in differing)
