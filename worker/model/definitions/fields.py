"""Fields: reads one entry of a file key by key; errors name entry, field and a fix."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from typing import Any, TypeVar

from worker.clock import from_text
from worker.errors import DefinitionError, InvalidTrigger
from worker.model.definitions.origins import parse_base_url, parse_origin
from worker.model.definitions.units import MAX_DEPTH, TOO_DEEP, depth_of, parse_duration

T = TypeVar("T")
# Errors that are reported at once; a file that a program made can have thousands of the same one.
MAX_ERRORS = 20
_MISSING: Any = object()


class Fields:
    """The values of one entry. A reader is a function that raises ValueError for an invalid value."""

    def __init__(self, values: Any, entry: str) -> None:
        if not isinstance(values, Mapping):
            raise refusal(f"expected a table, not {_shown(values)}", entry)
        self._values = values
        self.entry = entry

    def take(self, name: str, read: Callable[[Any], T], default: T = _MISSING) -> T:
        """The value of `name` as `read` returns it, or the default if it is absent or null; else an error."""
        value = self._values.get(name)
        if value is None:
            if default is _MISSING:
                raise refusal(f"{name} is missing", self.entry, name, fix=f"add {name}")
            return default
        try:
            return read(value)
        except ValueError as error:
            raise refusal(str(error), self.entry, name) from error
        except InvalidTrigger as error:
            raise refusal(error.message, self.entry, name, fix=error.fix) from error

    def given(self, names: Collection[str]) -> list[str]:
        """Those of the names that have a value, in the entry's order."""
        return [key for key, value in self._values.items() if value is not None and key in names]

    def only(self, known: Collection[str]) -> None:
        """Raise DefinitionError for an unknown key; its fix is the most similar known key."""
        for key in self._values:
            if key not in known:
                names = sorted(known)
                near = get_close_matches(str(key), names, n=1)
                fix = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(names)}"
                raise refusal(f"unknown key {key!r}", self.entry, str(key), fix=fix)


class Faults:
    """Collects errors; raises the first one with the others, at the latest when there are MAX_ERRORS."""

    def __init__(self) -> None:
        self._found: list[DefinitionError] = []

    def add(self, error: DefinitionError) -> None:
        """Note an error; raises DefinitionError if it is the last one that is reported."""
        self._found.append(error)
        if len(self._found) >= MAX_ERRORS:
            self.check()

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Note an error that ends the block."""
        try:
            yield
        except DefinitionError as error:
            if error not in self._found:
                self.add(error)

    def check(self) -> None:
        """Raise DefinitionError if there is any."""
        if self._found:
            first, *others = self._found
            first.others = tuple(others)
            raise first


def refusal(problem: str, entry: str, field: str = "", *, fix: str = "") -> DefinitionError:
    """An error with entry and field in its message as well as in its attributes."""
    place = ", ".join(part for part in (entry, field) if part)
    return DefinitionError(f"{place}: {problem}" if place else problem, entry=entry, field=field, fix=fix)


def text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected text, not {_shown(value)}")
    check_text(value, "the text")
    return value.strip()


def name(value: Any) -> str:
    """Text that fits into a path and a command line: no slash, no control character."""
    read = text(value)
    if len(read) > 200 or "/" in read or not read.isprintable():
        raise ValueError(
            f"{_shown(value)} is not a name; use at most 200 characters, no slash, no control characters"
        )
    return read


def boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, not {_shown(value)}")
    return value


def integer(least: int) -> Callable[[Any], int]:
    most = 2**31 - 1

    def read(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"expected a whole number, not {_shown(value)}")
        if not least <= value <= most:
            raise ValueError(f"{value} is not between {least} and {most}")
        return value

    return read


def duration(least: timedelta = timedelta(0), *, what: str = "") -> Callable[[Any], timedelta]:
    def read(value: Any) -> timedelta:
        found = parse_duration(value)
        if found < least:
            raise ValueError(f"{value!r} is too short{what and f': {what}'}")
        return found

    return read


def timestamp(value: Any) -> datetime:
    """An RFC 3339 text, or a TOML date-time, with an offset."""
    if isinstance(value, datetime) and value.tzinfo is not None:
        return value.astimezone(UTC)
    if not isinstance(value, str):
        raise ValueError(f"expected a time with an offset, such as 2027-01-01T08:00:00Z, not {value}")
    return from_text(value)


def one_of(choices: tuple[T, ...]) -> Callable[[Any], T]:
    def read(value: Any) -> T:
        for choice in choices:
            if choice == value and isinstance(value, str):
                return choice
        raise ValueError(f"{_shown(value)} is not one of {', '.join(map(str, choices))}")

    return read


def texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list of texts, not {_shown(value)}")
    return tuple(dict.fromkeys(text(item) for item in value))


def origins(value: Any) -> tuple[str, ...]:
    """Origins (RFC 6454): scheme, host and port only."""
    listed = texts(value)
    for item in listed:
        parse_origin(item)
    return listed


def base_url(value: Any) -> str:
    """The base of relative URLs."""
    return parse_base_url(text(value))


def json_table(value: Any) -> Mapping[str, Any]:
    """A table that JSON and a database can hold, at most MAX_DEPTH deep; no TOML date or infinity, no NUL."""
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a table, not {_shown(value)}")
    if depth_of(value) > MAX_DEPTH:
        raise ValueError(TOO_DEEP)
    _check_json(value, "")
    return dict(value)


def _check_json(value: Any, path: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            check_text(str(key), f"a key of {path}" if path else "a key")
            _check_json(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_json(inner, f"{path}[{index}]")
    elif isinstance(value, str):
        check_text(value, path)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{path} is {value}, which JSON cannot represent")
    elif not (value is None or isinstance(value, int | bool)):
        raise ValueError(f"{path} is a {type(value).__name__}, which JSON cannot represent; write it as text")


def check_text(value: str, what: str) -> None:
    """Refuse text that a database cannot store; raises ValueError."""
    if "\0" in value:
        raise ValueError(f"{what} has a NUL character, which a database cannot store")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{what} has half a surrogate pair, which is not a character")


def _shown(value: Any) -> str:
    if depth_of(value) > MAX_DEPTH:
        return "a value nested too deeply"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
