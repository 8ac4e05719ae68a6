"""The next scheduled times of a definition or a schedule, with notes on clock changes and skips. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, TypedDict
from zoneinfo import ZoneInfo

from worker.model.definitions.triggers import parse_schedule
from worker.model.definitions.units import format_duration
from worker.model.definitions.zones import parse_zone
from worker.model.runs.fire import preview


class NextTime(TypedDict):
    """A scheduled time, also as local time; `note` says what is special about it.

    `deadline` is when it must be done by, None without `done_by` and `done_within`.
    """

    scheduled_for: datetime
    local: str
    deadline: datetime | None
    note: str | None


def preview_schedule(schedule: str, zone_name: str, start: datetime, count: int) -> list[NextTime]:
    """The first `count` scheduled times of a schedule at or after `start`.

    Raises:
        InvalidTrigger: the schedule or the zone is invalid, or it never fires.
    """
    zone = parse_zone(zone_name)
    return [_row(at, zone) for at in islice(parse_schedule(schedule, zone).occurrences(start), count)]


def preview_definition(
    row: Mapping[str, Any],
    unfinished: Sequence[Mapping[str, Any]],
    start: datetime | None,
    count: int,
    *,
    now: datetime,
) -> list[NextTime]:
    """The next scheduled times of a definition, with a note if one will be skipped.

    Without `start` it begins with those that are due and have not fired yet.
    """
    zone = parse_zone(row["timezone"])
    times = preview(row, unfinished, now, start=start, count=count)
    return [_row(at, zone, deadline, note) for at, deadline, note in times]


def _row(at: datetime, zone: ZoneInfo, deadline: datetime | None = None, note: str = "") -> NextTime:
    notes = "; ".join(filter(None, (note, _clock_change(at, zone))))
    local = at.astimezone(zone).isoformat()
    return {"scheduled_for": at, "local": local, "deadline": deadline, "note": notes or None}


def _clock_change(at: datetime, zone: ZoneInfo) -> str:
    """Whether clocks change at this time, or its wall time occurs twice."""
    local, before = at.astimezone(zone), (at - timedelta(seconds=1)).astimezone(zone)
    ahead = _offset(local) - _offset(before)
    if ahead > timedelta(0):
        return f"clocks go forward {format_duration(ahead)} here"
    if ahead < timedelta(0):
        return f"clocks go back {format_duration(-ahead)} here"
    if _offset(local.replace(fold=1 - local.fold)) != _offset(local):
        return f"{'second' if local.fold else 'first'} pass of this wall time"
    return ""


def _offset(local: datetime) -> timedelta:
    return local.utcoffset() or timedelta(0)
