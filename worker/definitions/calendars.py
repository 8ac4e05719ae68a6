"""Calendars: named dates on which nothing runs, as a file for `apply` or an iCalendar file lists them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime
from functools import lru_cache
from typing import Any

from worker.definitions import fields
from worker.definitions.fields import Fields, refusal
from worker.definitions.ics import InvalidCalendar, all_day_dates

MAX_DATES = 2000
FIRST_YEAR = 1970
LAST_YEAR = 2199
_ISO = re.compile(r"\d{4}-\d{2}-\d{2}")

ReadFile = Callable[[str], bytes]
"""Reads a file that an entry names; raises ValueError with what a person needs to know."""


@dataclass(frozen=True, slots=True)
class CalendarEntry:
    """A table `[[calendar]]` of a file for `apply`; calendars are for all orgs."""

    name: str
    """What definitions and templates name as their `calendar`."""
    dates: tuple[date, ...]
    """The dates, such as `["2026-12-25", "2026-12-26"]`, at most 2000. Instead, `ics` names an iCalendar
    file, relative to this file.
    """


def no_files(path: str) -> bytes:
    """For files of which no others can be read."""
    raise ValueError(f"{path} cannot be read from here; write its dates as `dates`")


def parse_calendar(values: Any, entry: str, read_file: ReadFile = no_files) -> CalendarEntry:
    """The calendar of an entry of a file; raises DefinitionError."""
    reader = Fields(values, entry)
    reader.only(("name", "dates", "ics"))
    name = reader.take("name", fields.name)
    if len(reader.given(("dates", "ics"))) != 1:
        example = 'dates = ["2026-12-25"], or ics = "holidays.ics"'
        raise refusal("it has one of dates and ics", entry, "dates", fix=f"write {example}")
    if reader.given(("ics",)):
        return CalendarEntry(name, reader.take("ics", lambda value: _of_file(fields.text(value), read_file)))
    return CalendarEntry(name, reader.take("dates", read_dates))


def read_dates(value: Any) -> tuple[date, ...]:
    """The dates of a list, sorted and each once; raises ValueError."""
    if not isinstance(value, list | tuple):
        raise ValueError('write the dates as a list: ["2026-12-25", "2026-12-26"]')
    if all(type(item) is str for item in value):
        return _dates_of(tuple(value))
    return _checked({_read_date(item) for item in value})


@lru_cache(maxsize=256)
def _dates_of(texts: tuple[str, ...]) -> tuple[date, ...]:
    # The definitions that share a calendar share its dates.
    return _checked({_read_date(item) for item in texts})


def _read_date(value: Any) -> date:
    # TOML has dates of its own; a date-time is a date for Python.
    if isinstance(value, date) and not isinstance(value, datetime):
        return value
    if isinstance(value, str) and _ISO.fullmatch(value):
        try:
            return date.fromisoformat(value)
        except ValueError as error:
            raise ValueError(f"{value}: there is no such date") from error
    raise ValueError(f"expected a date such as 2026-12-25, not {value!r:.60}")


def _checked(dates: set[date]) -> tuple[date, ...]:
    found = sorted(dates)
    if len(found) > MAX_DATES:
        raise ValueError(f"it has {len(found)} dates, more than {MAX_DATES}; split it, or leave out old ones")
    for day in (*found[:1], *found[-1:]):
        if not FIRST_YEAR <= day.year <= LAST_YEAR:
            raise ValueError(f"{day} is not between {FIRST_YEAR} and {LAST_YEAR}")
    return tuple(found)


def _of_file(path: str, read_file: ReadFile) -> tuple[date, ...]:
    try:
        return _checked(all_day_dates(read_file(path), most=MAX_DATES))
    except InvalidCalendar as error:
        raise ValueError(f"{path}, {error}") from error
