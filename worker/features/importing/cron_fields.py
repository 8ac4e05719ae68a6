"""Crontab fields from sets of numbers, for schedulers whose expressions mean something else than cron's."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from itertools import groupby
from typing import Any

from worker.features.importing.entries import NotTaken
from worker.model.definitions.units import format_duration

SECONDS = MINUTES = range(60)
HOURS = range(24)
DAYS = range(1, 32)
MONTHS = range(1, 13)
# Sunday is 0.
WEEKDAYS = range(7)
WEEKDAY_NAMES = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")

_FOREVER = 10**10

BOTH_DAYS = (
    "it restricts the day of the month and the day of the week: both must match there, "
    "in a crontab line either may; let the handler check one of them"
)


def field(values: Iterable[int], full: range, *, starred: bool = False, names: bool = False) -> str:
    """The field of a crontab line for a set of numbers.

    `starred` if the source wrote `*` or `*/n`: cron treats such a field differently when clocks
    change. `names` writes weekdays by name.
    """
    found = sorted(set(values))
    if found == list(full):
        return "*"
    if starred and len(found) > 1:
        step = found[1] - found[0]
        if found == list(full[::step]):
            return f"*/{step}"
    return ",".join(_runs(found, WEEKDAY_NAMES if names else None))


def _runs(values: list[int], names: tuple[str, ...] | None) -> Iterable[str]:
    """`1-5` for three and more numbers in a row, and the rest one by one."""
    for _, group in groupby(enumerate(values), key=lambda pair: pair[1] - pair[0]):
        run = [names[value] if names else str(value) for _, value in group]
        yield from run if len(run) < 3 else [f"{run[0]}-{run[-1]}"]


def split_line(text: str, what: str) -> list[str]:
    """The five fields of a crontab line; raises NotTaken."""
    parts = text.split()
    if len(parts) != 5:
        raise NotTaken(f"{what} takes five fields")
    return parts


def seconds(value: Any, what: str) -> timedelta:
    """A positive number of seconds; raises NotTaken."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _FOREVER:
        return timedelta(seconds=value)
    raise NotTaken(f"its {what} is not a positive number of seconds")


def every(interval: timedelta) -> dict[str, Any]:
    """The keys of a definition that runs at an interval.

    Raises:
        NotTaken: the interval is not whole seconds, at least one.
    """
    if interval < timedelta(seconds=1) or interval % timedelta(seconds=1):
        raise NotTaken(
            f"its interval is {interval.total_seconds():g} s; it must be whole seconds, at least one"
        )
    return {"schedule": f"every {format_duration(interval)}"}
