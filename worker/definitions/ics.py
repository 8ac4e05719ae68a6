"""iCalendar files (RFC 5545): the dates of whole-day events. What would need a rule is refused.

Not read with a library: `icalendar` is lenient by design, has no line numbers for errors, and adds 3 MB to
each worker for one key of a file. Here nothing is guessed, since a misread date runs a job on a holiday.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import NamedTuple

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
