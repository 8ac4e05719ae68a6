"""Conditions on feature flags: what a definition requires, and which variant of its handler runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from worker.definitions.fields import text


@dataclass(frozen=True, slots=True)
class FlagCondition:
    """Holds where the flag `name` has the value `equals`; an absent flag is off."""

    name: str
    equals: Any = True


@dataclass(frozen=True, slots=True)
class Variant:
    """The handler that runs instead of the definition's where `flag` holds."""

    flag: FlagCondition
    handler: str


def read_flag(value: Any) -> FlagCondition:
    """`"agent-v2"`, or `{ flag = "model", equals = "new" }`; ValueError for anything else."""
    if isinstance(value, str):
        return FlagCondition(text(value))
    if not isinstance(value, Mapping) or not {"flag"} <= set(value) <= {"flag", "equals"}:
        raise ValueError('a flag is expected: "agent-v2", or { flag = "model", equals = "new" }')
    return _condition(value)


def read_variants(value: Any) -> tuple[Variant, ...]:
    """A list of `{ flag = "agent-v2", handler = "acme.digest_v2" }`; ValueError for anything else."""
    if not isinstance(value, list):
        raise ValueError('a list is expected: [{ flag = "agent-v2", handler = "acme.digest_v2" }]')
    found = []
    for item in value:
        keys = set(item) if isinstance(item, Mapping) else set()
        if not {"flag", "handler"} <= keys <= {"flag", "equals", "handler"}:
            raise ValueError('a variant is written { flag = "agent-v2", handler = "acme.digest_v2" }')
        found.append(Variant(_condition(item), text(item["handler"])))
    return tuple(found)


def write_flag(condition: FlagCondition) -> Any:
    """The shortest form that `read_flag` gives back."""
    return condition.name if condition.equals is True else _written(condition)


def write_variants(variants: tuple[Variant, ...]) -> list[dict[str, Any]]:
    """The form that `read_variants` gives back."""
    return [_written(variant.flag) | {"handler": variant.handler} for variant in variants]


def _condition(value: Mapping[str, Any]) -> FlagCondition:
    equals = value.get("equals", True)
    if not isinstance(equals, bool | str | int | float):
        raise ValueError("equals is true, false, a text or a number")
    return FlagCondition(text(value["flag"]), equals)


def _written(condition: FlagCondition) -> dict[str, Any]:
    written: dict[str, Any] = {"flag": condition.name}
    return written if condition.equals is True else written | {"equals": condition.equals}
