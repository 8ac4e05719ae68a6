"""The keys of a file for `apply`, from the attribute docstrings of the classes that they fill."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any

from docs.generate.docstrings import attributes
from docs.generate.tables import code, table
from worker.model.definitions.budgets import BudgetEntry
from worker.model.definitions.calendars import CalendarEntry
from worker.model.definitions.definition import Definition
from worker.model.definitions.limits import LimitEntry
from worker.model.definitions.rollouts import RolloutEntry
from worker.model.definitions.units import format_duration
from worker.model.orgs import OrgEntry

# Defaults that the file reader supplies for required attributes.
FILLED_IN = {
    (OrgEntry, "name"): "the code",
    (RolloutEntry, "selector"): code('"all"'),
    (RolloutEntry, "watch"): code('{ failed = "+2 points", refused = "+1 point" }'),
}
# Keys whose attributes have another name.
NAMED = {
    (RolloutEntry, "old"): "from",
    (RolloutEntry, "new"): "to",
    (RolloutEntry, "selector"): "orgs",
}
# What a stored spec has besides the keys of a file.
STORED = {(Definition, "calendar_dates"), (BudgetEntry, "currency")}


def org_keys() -> str:
    return _keys(OrgEntry)


def definition_keys() -> str:
    return _keys(Definition)


def budget_keys() -> str:
    return _keys(BudgetEntry)


def calendar_keys() -> str:
    return _keys(CalendarEntry)


def limit_keys() -> str:
    return _keys(LimitEntry)


def rollout_keys() -> str:
    return _keys(RolloutEntry)


def _keys(owner: type) -> str:
    words = attributes(owner)
    rows = []
    for field in dataclasses.fields(owner):
        if (owner, field.name) in STORED:
            continue
        default = FILLED_IN.get((owner, field.name)) or _default(field)
        name = NAMED.get((owner, field.name), field.name)
        rows.append((code(name), default, words[field.name][1]))
    return table(("key", "default", "meaning"), rows)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return code("{}")
    value = field.default
    if value is dataclasses.MISSING:
        return "required"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return code(str(value).lower())
    if isinstance(value, timedelta):
        return code(f'"{format_duration(value)}"')
    if isinstance(value, tuple | frozenset):
        return code("[]")
    return code(f'"{value}"' if isinstance(value, str) else f"{value}")
