"""Deadline: until when the run of a scheduled time must have succeeded (`done_by`, `done_within`). Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from itertools import islice, pairwise
from zoneinfo import ZoneInfo

from worker.model.definitions.triggers import Trigger, parse_schedule, without_dates
from worker.model.definitions.units import format_duration

_TIME_OF_DAY = re.compile(r"([01]\d|2[0-3]):([0-5]\d)")
# Scheduled times that are looked at to tell whether all are at one time of day, or closer than `done_within`.
_LOOKED_AT = 8
_SOME_DAY = datetime(2001, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Deadline:
    """The deadlines of a definition's scheduled times: `at_times` are those of `done_by`."""

    at_times: Trigger | None
    within: timedelta | None

    def of(self, scheduled_for: datetime) -> datetime:
        """The earlier of the next `done_by` after a scheduled time, and that time plus `done_within`.

        A later scheduled time never has an earlier deadline.
        """
        found = [] if self.within is None else [scheduled_for + self.within]
        if self.at_times is not None and (at := self.at_times.after(scheduled_for)) is not None:
            found.append(at)
        return min(found)

    def of_each(self, times: Iterable[datetime]) -> list[tuple[datetime, datetime]]:
        """The last of these scheduled times for each deadline, with that deadline.

        Once it is done, so are those before it.
        """
        newest = {self.of(at): at for at in sorted(times)}
        return [(at, deadline) for deadline, at in newest.items()]


def deadline(
    done_by: time | None, within: timedelta | None, zone: ZoneInfo, closed: tuple[date, ...] = ()
) -> Deadline | None:
    """The deadlines in a zone, None without any; `done_by` does not come on the `closed` dates.

    It comes once a day: a time of day that the clocks skip when they skip it, one that they repeat at its
    first pass.
    """
    if done_by is None and within is None:
        return None
    at_times = None
    if done_by is not None:
        at_times = parse_schedule(f"{done_by.minute} {done_by.hour} * * *", zone)
        at_times = without_dates(at_times, closed, zone) if closed else at_times
    return Deadline(at_times, within)


def read_time(value: object) -> time:
    """A time of day from its text; raises ValueError."""
    found = _TIME_OF_DAY.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        shown = str(value)[:60]
        raise ValueError(f'"{shown}" is not a time of day; write it as text, such as "06:00"')
    return time(int(found[1]), int(found[2]))


def write_time(value: time) -> str:
    return f"{value:%H:%M}"


def is_always_at(done_by: time, nominal: Trigger, zone: ZoneInfo) -> bool:
    """Whether a schedule is due at this time of day only, which leaves each run the time until its next."""
    times = [at.astimezone(zone) for at in islice(nominal.occurrences(_SOME_DAY), _LOOKED_AT)]
    return bool(times) and all(at.time() == done_by for at in times)


def longest_period(nominal: Trigger, after: datetime) -> timedelta | None:
    """The longest time between some scheduled times in a row; None if there are not two of them."""
    times = list(islice(nominal.occurrences(after), _LOOKED_AT))
    return max((later - at for at, later in pairwise(times)), default=None)


def before_firing(deadline: Deadline, nominal: Trigger, spread: timedelta, after: datetime) -> str:
    """Why a definition is late before it fires, as `spread` delays it for longer; empty if it is not."""
    times = islice(nominal.occurrences(after), _LOOKED_AT)
    if not spread or all(deadline.of(at) > at + spread for at in times):
        return ""
    return f"its deadline passes before it fires, {format_duration(spread)} after its scheduled time (spread)"


def beyond_period(within: timedelta, nominal: Trigger, after: datetime) -> str:
    """Why `done_within` is longer than the schedule's period; empty if it is not."""
    period = longest_period(nominal, after)
    if period is None or within <= period:
        return ""
    return (
        f"done_within {format_duration(within)} is longer than the {format_duration(period)} between "
        "scheduled times: by then the next one is due, and its success counts for this one, too"
    )
