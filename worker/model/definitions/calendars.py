"""Calendars: named dates on which nothing runs, as a file for `apply` or an iCalendar file lists them.

Of iCalendar files (RFC 5545) the dates of whole-day events count; what would need a rule is refused. Not read
with a library: `icalendar` is lenient by design, has no line numbers for errors, and adds 3 MB to each worker
for one key of a file. Here nothing is guessed, since a misread date runs a job on a holiday.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple

from worker.model.definitions import fields
from worker.model.definitions.fields import Fields, refusal

MAX_DATES = 2000
FIRST_YEAR = 1970
LAST_YEAR = 2199
_ISO = re.compile(r"\d{4}-\d{2}-\d{2}")

ReadFile = Callable[[str], bytes]
"""Reads a file that an entry names; raises ValueError with what a person needs to know."""
_DAY = timedelta(days=1)
_LAST_YEAR = 9000
# A name, its parameters, and a value; a parameter in quotes may have `:` and `;`.
_LINE = re.compile(
    r'(?P<name>[A-Za-z0-9-]+)(?P<parameters>(?:;[A-Za-z0-9-]+=(?:"[^"]*"|[^";:])*)*):(?P<value>.*)', re.DOTALL
)
_DATE = re.compile(r"(\d{4})(\d{2})(\d{2})")
_WHOLE_DAYS = re.compile(r"\+?P(?:(\d{1,4})W|(\d{1,4})D)")
_RECURRING = frozenset({"RRULE", "RDATE", "EXRULE", "EXDATE", "RECURRENCE-ID"})
_READ_ONCE = frozenset({"UID", "SUMMARY", "STATUS", "DTSTART", "DTEND", "DURATION"})


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


class InvalidCalendar(ValueError):
    """Not an iCalendar file of whole days. The message names the line, and the event if there is one."""


class _Line(NamedTuple):
    number: int
    name: str
    value: str


@dataclass(slots=True)
class _Event:
    number: int
    lines: dict[str, _Line] = field(default_factory=dict)

    def text(self, name: str) -> str:
        line = self.lines.get(name)
        return "" if line is None else line.value.strip()

    def fault(self, problem: str, line: _Line | None = None) -> InvalidCalendar:
        name = re.sub(r"\\(.)", r"\1", self.text("SUMMARY")) or self.text("UID") or "without a name"
        number = self.number if line is None else line.number
        return InvalidCalendar(f"line {number}: event {name[:80]!r} {problem}")


def all_day_dates(content: bytes, *, most: int) -> set[date]:
    """The dates of all whole-day events; those with STATUS:CANCELLED do not count.

    Raises:
        InvalidCalendar: it is not an iCalendar file, has no event, or has one that recurs, has a time of day,
            or lasts for more than `most` days.
    """
    events = list(_events(content))
    if not events:
        raise InvalidCalendar("line 1: there is no event in it")
    found: set[date] = set()
    for event in events:
        found |= _dates(event, most)
    return found


def _dates(event: _Event, most: int) -> set[date]:
    for name in sorted(_RECURRING & event.lines.keys()):
        raise event.fault(f"recurs ({name}); write each of its dates", event.lines[name])
    if event.text("STATUS").upper() == "CANCELLED":
        return set()
    start = _day(event, "DTSTART")
    if start is None:
        raise event.fault("has no DTSTART")
    end = _day(event, "DTEND") or start + _length(event)
    if end <= start:
        problem = "ends before it has begun: DTEND is the day after its last"
        raise event.fault(problem, event.lines.get("DTEND"))
    if end - start > most * _DAY:
        raise event.fault(f"lasts for more than {most} days")
    return {start + count * _DAY for count in range((end - start).days)}


def _day(event: _Event, name: str) -> date | None:
    line = event.lines.get(name)
    if line is None:
        return None
    found = _DATE.fullmatch(line.value.strip())
    if found is None:
        raise event.fault(f"has a time of day ({name}); only whole days count, as VALUE=DATE", line)
    try:
        day = date(*map(int, found.groups()))
    except ValueError:
        raise event.fault(f"has a {name} that is not a date", line) from None
    if day.year > _LAST_YEAR:
        raise event.fault(f"has a {name} after {_LAST_YEAR}", line)
    return day


def _length(event: _Event) -> timedelta:
    line = event.lines.get("DURATION")
    if line is None:
        return _DAY
    found = _WHOLE_DAYS.fullmatch(line.value.strip().upper())
    if found is None:
        raise event.fault("has a DURATION that is not whole days, such as P2D", line)
    weeks, days = found.groups()
    return timedelta(weeks=int(weeks or 0), days=int(days or 0))


def _events(content: bytes) -> Iterator[_Event]:
    """The events, without what is nested in them, such as alarms."""
    open_ones: list[str] = []
    event: _Event | None = None
    last = 1
    for line in _lines(content):
        last = line.number
        named = line.value.strip().upper()
        if line.name == "BEGIN":
            if not open_ones and named != "VCALENDAR":
                raise InvalidCalendar(f"line {line.number}: expected BEGIN:VCALENDAR")
            open_ones.append(named)
            if open_ones[1:] == ["VEVENT"]:
                event = _Event(line.number)
        elif line.name == "END":
            if not open_ones or open_ones[-1] != named:
                raise InvalidCalendar(f"line {line.number}: END:{named[:40]} ends nothing that was begun")
            open_ones.pop()
            if event is not None and len(open_ones) == 1:
                yield event
                event = None
        elif not open_ones:
            raise InvalidCalendar(f"line {line.number}: expected BEGIN:VCALENDAR")
        elif event is not None and len(open_ones) == 2:
            if line.name in event.lines and line.name in _READ_ONCE:
                raise event.fault(f"has {line.name} twice", line)
            event.lines[line.name] = line
    if open_ones:
        raise InvalidCalendar(f"line {last}: it ends within {open_ones[-1][:40]}; is it complete?")


def _lines(content: bytes) -> Iterator[_Line]:
    """The content lines, with those that are folded joined, and the number of the first line of each."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise InvalidCalendar(f"line {number}: it is not UTF-8 text") from error
    joined: list[tuple[int, list[str]]] = []
    # Only these end a line; `splitlines` knows more.
    for number, part in enumerate(re.split(r"\r\n|\n|\r", text), start=1):
        if part[:1] in (" ", "\t") and joined:
            joined[-1][1].append(part[1:])
        elif part:
            joined.append((number, [part]))
    for number, parts in joined:
        found = _LINE.fullmatch("".join(parts))
        if found is None:
            raise InvalidCalendar(f"line {number}: expected NAME:VALUE, as iCalendar files have it")
        yield _Line(number, found["name"].upper(), found["value"])
