"""The next instants of a schedule, from the very code that fires, and what is particular about each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from itertools import islice
from typing import Any
from zoneinfo import ZoneInfo

from worker.definitions.units import format_duration

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
    return [_row(instant, zone) for instant in islice(parse_schedule(schedule, zone).instants(start), count)]


def of_definition(
    row: Mapping[str, Any],
    unfinished: Sequence[Mapping[str, Any]],
    start: datetime | None,
    count: int,
    *,
    now: datetime,
) -> list[Row]:
    """As `of_schedule`, of a row of `definitions show`; what would be skipped or is not due says so.

    Without `start` it begins with what is due and has not fired yet.
    """
    from worker.definitions.zones import parse_zone
    from worker.runs.preview import Preview

    zone = parse_zone(row["timezone"])
    upcoming = Preview(row, unfinished, now).instants(start, count)
    return [_row(each.scheduled_for, zone, each.note) for each in upcoming]


def _row(instant: datetime, zone: ZoneInfo, note: str = "") -> Row:
    notes = "; ".join(filter(None, (note, _change(instant, zone))))
    return {
        "scheduled_for": instant,
        "local": instant.astimezone(zone).isoformat(),
        "note": notes or None,
    }


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
