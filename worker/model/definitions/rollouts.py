"""Rollouts of new versions of handlers, as a file for `apply` has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from worker.model.definitions import fields
from worker.model.definitions.fields import Fields, refusal
from worker.model.definitions.flags import FlagCondition, read_flag
from worker.model.orgs import Selector, parse_selector

POINTS = ("failed", "refused")
DURATION = "duration_p95"
SCORE = "score"
MAX_STEPS = 20
MAX_METRICS = 20
_KEYS = ("name", "definitions", "from", "to", "orgs", "flag", "steps", "auto", "watch")
_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,3})?)\s*%")
_POINTS = re.compile(r"\+\s*([0-9]{1,2}(?:\.[0-9]{1,2})?)\s+points?")
_FACTOR = re.compile(r"([0-9]{1,2}(?:\.[0-9]{1,3})?)x")
_ALL = Selector()
_DEFAULT_WATCH = {"failed": "+2 points", "refused": "+1 point"}


@dataclass(frozen=True, slots=True)
class RolloutEntry:
    """A table `[[rollout]]` of a file for `apply`; operators only. `rollouts advance` starts it."""

    name: str
    """Names it in commands and in its audit rows."""
    definitions: str
    """The name of a template, or of definitions of several orgs."""
    old: str
    """Their handler, which all orgs keep that have not moved."""
    new: str
    """The handler that orgs move to, step by step."""
    steps: tuple[str, ...]
    """Shares of the orgs, rising: `["1%", "5%", "25%", "100%"]`."""
    selector: Selector = _ALL
    """Which orgs may get it at all, as in a template."""
    flag: FlagCondition | None = None
    """An org whose token does not have this flag keeps `from`: a name, or `{ flag, equals }`."""
    auto: bool = False
    """True: a step ends by itself once it has shown what it must."""
    watch: Mapping[str, str] = field(default_factory=lambda: dict(_DEFAULT_WATCH))
    """What may be lost by metric: `+2 points` of `failed` and `refused`, else a factor such as `1.3x`."""

    @property
    def values(self) -> dict[str, Any]:
        """What of it changes, as its row has it."""
        flag = None if self.flag is None else {"flag": self.flag.name, "equals": self.flag.equals}
        return {
            "definitions": self.definitions,
            "from_handler": self.old,
            "to_handler": self.new,
            "orgs": self.selector.as_json(),
            "flag": flag,
            "steps": list(self.steps),
            "auto": self.auto,
            "watch": dict(self.watch),
        }


# The columns that a change of a file sets.
COLUMNS = ("definitions", "from_handler", "to_handler", "orgs", "flag", "steps", "auto", "watch")


def parse_rollout(values: Any, entry: str) -> RolloutEntry:
    """The rollout of an entry of a file; raises DefinitionError."""
    reader = Fields(values, entry)
    reader.only(_KEYS)
    old, new = reader.take("from", fields.name), reader.take("to", fields.name)
    if old == new:
        raise refusal("from and to are the same handler", entry, "to", fix="name the new version")
    selector = parse_selector(values.get("orgs", "all"), entry=entry)
    return RolloutEntry(
        name=reader.take("name", fields.name),
        definitions=reader.take("definitions", fields.name),
        old=old,
        new=new,
        selector=selector,
        flag=reader.take("flag", read_flag, None),
        steps=reader.take("steps", _steps),
        auto=reader.take("auto", fields.boolean, False),
        watch=reader.take("watch", _watch, _DEFAULT_WATCH),
    )


def _steps(value: Any) -> tuple[str, ...]:
    steps = tuple(fields.texts(value))
    if not 1 <= len(steps) <= MAX_STEPS:
        raise ValueError(f'write 1 to {MAX_STEPS} steps, such as ["1%", "5%", "25%", "100%"]')
    shares = [share_of(step) for step in steps]
    if shares != sorted(set(shares)):
        raise ValueError(f"the steps {', '.join(steps)} do not rise")
    return steps


def share_of(step: str) -> float:
    """The share of orgs of a step such as `5%`; raises ValueError."""
    found = _PERCENT.fullmatch(step)
    if found is None or not 0 < float(found[1]) <= 100:
        raise ValueError(f"{step[:40]!r} is not a share of the orgs; write it as 5% (above 0, at most 100)")
    return float(found[1]) / 100


def _watch(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping) or not 1 <= len(value) <= MAX_METRICS:
        raise ValueError('watch is a table such as { failed = "+2 points", refused = "+1 point" }')
    read = {fields.text(metric): fields.text(allowed) for metric, allowed in value.items()}
    for metric, allowed in read.items():
        (points_of if metric in POINTS else factor_of)(metric, allowed)
    return read


def points_of(metric: str, allowed: str) -> float:
    """The share that a metric may grow by, of a text such as `+2 points`; raises ValueError."""
    found = _POINTS.fullmatch(allowed)
    if found is None:
        raise ValueError(f'{metric}: {allowed[:40]!r} is not a number of points; write "+2 points"')
    return float(found[1]) / 100


def factor_of(metric: str, allowed: str) -> float:
    """The factor that a metric may reach, above 1, or below it if less is worse; raises ValueError."""
    found = _FACTOR.fullmatch(allowed)
    if found is None or float(found[1]) <= 0:
        raise ValueError(
            f'{metric}: {allowed[:40]!r} is not a factor; write "1.3x", or "0.9x" if less is worse'
        )
    if metric == DURATION and float(found[1]) < 1:
        raise ValueError(f"{metric}: a factor below 1 would halt versions that take the same time")
    return float(found[1])
