"""Conditions on feature flags, as definitions and rollouts have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from worker.model.definitions.fields import text

_FLAG = '"agent-v2", or { flag = "model", equals = "new" }'


@dataclass(frozen=True, slots=True)
class FlagCondition:
    """Met if the flag `name` has the value `equals`; an absent flag is false."""

    name: str
    equals: Any = True


def read_flag(value: Any) -> FlagCondition:
    """A condition as in `requires_flag`; raises ValueError."""
    return FlagCondition(text(value)) if isinstance(value, str) else read_condition(value, {"flag"}, _FLAG)


def read_condition(value: Any, keys: set[str], example: str) -> FlagCondition:
    """The condition of a table that has these keys, and perhaps `equals`; raises ValueError."""
    if not isinstance(value, Mapping) or not keys <= set(value) <= keys | {"equals"}:
        raise ValueError(f"write it as {example}")
    equals = value.get("equals", True)
    if not isinstance(equals, bool | str | int | float):
        raise ValueError("equals must be true, false, text or a number")
    return FlagCondition(text(value["flag"]), equals)


def write_flag(condition: FlagCondition) -> Any:
    return condition.name if condition.equals is True else write_condition(condition)


def write_condition(condition: FlagCondition) -> dict[str, Any]:
    written = {"flag": condition.name}
    return written if condition.equals is True else written | {"equals": condition.equals}
