"""Feature flags decide whether a run starts, and which variant of its handler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from worker.claims.claims import Claims


class FlagCondition(Protocol):
    """A flag and the value that counts as on."""

    @property
    def name(self) -> str: ...

    @property
    def equals(self) -> Any: ...


class Variant(Protocol):
    """Another handler for the orgs whose flag is on."""

    @property
    def flag(self) -> FlagCondition: ...


V = TypeVar("V", bound=Variant)


def flag_value(claims: Claims, name: str, default: Any = False) -> Any:
    """The value of a flag, else of the property of that name, else the default.

    Kinde's flags in M2M tokens are the same for every org of an environment, so an
    org of its own is switched by a property; a property `"true"` is true.
    """
    if name in claims.flags:
        return claims.flags[name].value
    value = claims.properties.get(name, default)
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    return value


def is_on(claims: Claims, condition: FlagCondition) -> bool:
    """Whether the flag has exactly the value that the condition names.

    An absent flag is off, so `false` is its value; one of a type that this worker
    does not know has no value that could be compared.
    """
    flag = claims.flags.get(condition.name)
    if flag is not None and flag.type not in ("boolean", "string", "number"):
        return False
    value = flag_value(claims, condition.name, False)
    wanted = condition.equals
    if isinstance(value, str) and _is_number(wanted) and flag is None:
        # Properties hold text only: a number arrives as its digits.
        try:
            value = float(value)
        except ValueError:
            return False
    if isinstance(value, bool) or isinstance(wanted, bool):
        # 1 == True in Python, and a flag of the number 1 is not on.
        return value is wanted
    return bool(value == wanted)


def choose_variant(variants: Sequence[V], claims: Claims) -> V | None:
    """The first variant whose flag is on, or None for the definition's own handler."""
    return next((variant for variant in variants if is_on(claims, variant.flag)), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
