"""The next instants of a schedule, from the very code that fires, and what is particular about each."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from worker.definitions.units import format_duration

if TYPE_CHECKING:
    from worker.definitions.triggers import Trigger

Row = dict[str, Any]

_NONE = timedelta(0)


def of_schedule(schedule: str, zone_name: str, start: datetime, count: int) -> list[Row]:
    """The first `count` instants of a schedule's text at or after `start`.

    Raises:
        InvalidTrigger: the text or the zone cannot be read, or it never fires.
    """
    from worker.definitions.triggers import parse_schedule
    from worker.definitions.zones import parse_zone

    zone = parse_zone(zone_name)
    return _rows(parse_schedule(schedule, zone), zone, start, count)


def of_definition(row: Mapping[str, Any], start: datetime, count: int) -> list[Row]:
    """As `of_schedule`, of a row of `definitions show`, within its `starts_at` and `ends_at`.

    Where the definition or its org is stopped, each instant says that it is not due.
    """
    from worker.definitions.definition import from_spec
    from worker.definitions.spread import spread_of
    from worker.definitions.zones import parse_zone

    definition = from_spec(row["org"], row["name"], row["spec"])
    trigger = definition.trigger(row["timezone"])
    spread = spread_of(row["org"], row["name"], definition.schedule, trigger, definition.spread)
    notes = [_stopped(row), f"fires {format_duration(spread)} later" if spread else ""]
    return _rows(trigger, parse_zone(row["timezone"]), start, count, notes)


def _rows(
    trigger: Trigger, zone: ZoneInfo, start: datetime, count: int, notes: list[str] | None = None
) -> list[Row]:
    rows: list[Row] = []
    for instant in islice(trigger.instants(start), count):
        local = instant.astimezone(zone)
        note = "; ".join(filter(None, [*(notes or ()), _change(instant, zone)]))
        rows.append({"scheduled_for": instant, "local": local.isoformat(), "note": note or None})
    return rows


def _stopped(row: Mapping[str, Any]) -> str:
    if row["org_state"] != "active":
        return f"not due: the org is {row['org_state']}"
    return "" if row["state"] == "active" else f"not due: the definition is {row['state']}"


def _change(instant: datetime, zone: ZoneInfo) -> str:
    """Whether clocks change at this instant, or make its wall time come twice."""
    local = instant.astimezone(zone)
    ahead = _offset(local) - _offset((instant - timedelta(seconds=1)).astimezone(zone))
    if ahead > _NONE:
        return f"clocks go forward {format_duration(ahead)} here"
    if ahead < _NONE:
        return f"clocks go back {format_duration(-ahead)} here"
    if _offset(local.replace(fold=1 - local.fold)) != _offset(local):
        return f"{'second' if local.fold else 'first'} pass of this wall time"
    return ""


def _offset(instant: datetime) -> timedelta:
    return instant.utcoffset() or _NONE
