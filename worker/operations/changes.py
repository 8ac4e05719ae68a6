"""What an `apply` changes, for people to read: one line an org or definition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["org", "definition", "template"]
Action = Literal["add", "change", "reopen", "close"]


@dataclass(frozen=True, slots=True)
class Change:
    """One change: `fields` has the value before and after of each key; an absent one is None."""

    kind: Kind
    action: Action
    org: str | None
    name: str
    fields: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    def as_row(self) -> dict[str, Any]:
        """The columns that `apply` prints."""
        fields = {key: {"before": before, "after": after} for key, (before, after) in self.fields.items()}
        return {
            "kind": self.kind,
            "action": self.action,
            "org": self.org,
            "name": self.name,
            "fields": fields,
        }


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys whose values are not the same, with both."""
    keys = sorted(before.keys() | after.keys())
    return {
        key: (before.get(key), after.get(key)) for key in keys if not same(before.get(key), after.get(key))
    }


def same(one: Any, other: Any) -> bool:
    """Equality as JSON has it: true is not 1, while 1 and 1.0 are one number, as in `jsonb`."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
