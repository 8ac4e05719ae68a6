"""Fields: reads one entry of a file key by key; what does not fit is refused with entry, field and a fix."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from typing import Any, TypeVar

from worker.clock import from_text
from worker.definitions.origins import parse_origin
from worker.definitions.units import MAX_DEPTH, TOO_DEEP, depth_of, parse_duration, parse_memory
from worker.errors import DefinitionError

T = TypeVar("T")
_MISSING: Any = object()


class Fields:
    """The values of one entry. A reader is a function that raises ValueError with what is wrong."""

    def __init__(self, values: Any, entry: str) -> None:
        if not isinstance(values, Mapping):
            raise refusal(f"a table is expected, not {_shown(values)}", entry)
        self._values = values
        self.entry = entry

    def take(self, name: str, read: Callable[[Any], T], default: T = _MISSING) -> T:
        """The value of `name` as `read` makes it, or the default where the key is absent or null.

        Raises:
            DefinitionError: it is missing and has no default, or does not fit.
        """
        value = self._values.get(name)
        if value is None:
            if default is _MISSING:
                raise refusal(f"{name} is missing", self.entry, name, fix=f"add {name}")
            return default
        try:
            return read(value)
        except ValueError as error:
            raise refusal(str(error), self.entry, name) from error

    def given(self, names: Collection[str]) -> list[str]:
        """Those of the names that have a value, in the entry's order."""
        return [key for key, value in self._values.items() if value is not None and key in names]

    def only(self, known: Collection[str]) -> None:
        """Refuse any key that is not known.

        Raises:
            DefinitionError: names the unknown key, and the known one that it resembles.
        """
        for key in self._values:
            if key not in known:
                names = sorted(known)
                near = get_close_matches(str(key), names, n=1)
                fix = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(names)}"
                raise refusal(f"unknown key {key!r}", self.entry, str(key), fix=fix)


def refusal(problem: str, entry: str, field: str = "", *, fix: str = "") -> DefinitionError:
    """The error that names entry and field in its message as well as in its attributes."""
    place = ", ".join(part for part in (entry, field) if part)
    return DefinitionError(f"{place}: {problem}" if place else problem, entry=entry, field=field, fix=fix)


def text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"a text is expected, not {_shown(value)}")
    _check_text(value, "the text")
    return value.strip()


def name(value: Any) -> str:
    """A text that may stand in a path and on a command line: no slash, no control character."""
    read = text(value)
    if len(read) > 200 or "/" in read or not read.isprintable():
        raise ValueError(f"{_shown(value)} is no name; at most 200 characters, no slash, no controls")
    return read


def boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"true or false is expected, not {_shown(value)}")
    return value


def integer(least: int, most: int = 2**31 - 1) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"a whole number is expected, not {_shown(value)}")
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


def instant(value: Any) -> datetime:
    """An RFC 3339 text, or a TOML date-time, with an offset."""
    if isinstance(value, datetime) and value.tzinfo is not None:
        return value.astimezone(UTC)
    if not isinstance(value, str):
        raise ValueError(f"an instant with an offset is expected, such as 2027-01-01T08:00:00Z, not {value}")
    return from_text(value)


def memory(value: Any) -> int:
    return parse_memory(value)


def one_of(choices: tuple[T, ...]) -> Callable[[Any], T]:
    def read(value: Any) -> T:
        for choice in choices:
            if choice == value and isinstance(value, str):
                return choice
        raise ValueError(f"{_shown(value)} is none of {', '.join(map(str, choices))}")

    return read


def texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f"a list of texts is expected, not {_shown(value)}")
    return tuple(dict.fromkeys(text(item) for item in value))


def origins(value: Any) -> tuple[str, ...]:
    """Origins as RFC 6454 writes them: scheme, host and port, and nothing else."""
    listed = texts(value)
    for item in listed:
        parse_origin(item)
    return listed


def json_table(value: Any) -> Mapping[str, Any]:
    """A table of what JSON can say and a database keep: no date or infinity of TOML, no NUL in a text.

    It nests at most `MAX_DEPTH` levels.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"a table is expected, not {_shown(value)}")
    if depth_of(value) > MAX_DEPTH:
        raise ValueError(TOO_DEEP)
    _check_json(value, "")
    return dict(value)


def _check_json(value: Any, path: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_text(str(key), f"a key of {path}" if path else "a key")
            _check_json(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            _check_json(inner, f"{path}[{place}]")
    elif isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{path} is {value}, which JSON cannot say")
    elif not (value is None or isinstance(value, int | bool)):
        raise ValueError(f"{path} is a {type(value).__name__}, which JSON cannot say; write it as text")


def _check_text(value: str, what: str) -> None:
    if "\0" in value:
        raise ValueError(f"{what} has a NUL character, which no database keeps")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{what} has half a surrogate pair, which is no character")


def _shown(value: Any) -> str:
    if depth_of(value) > MAX_DEPTH:
        return "what nests so deeply"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
