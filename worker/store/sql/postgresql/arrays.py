"""Python lists as PostgreSQL arrays: as literals, a tenth of the cost of adapting each element.

A list of only None becomes an empty array, which `unnest` fills up with nulls. Identifiers and times of hot
statements go in PostgreSQL's binary form, which costs it a fifth of what it takes to read their text.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Hashable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from typing import Any, TypeVar

from worker.store.dialect import compact_json

T = TypeVar("T")
Value = str | bytes

# Characters; the quoted form of a shorter text is cached, because it recurs.
SHORT = 1024
# What separates the texts of `lines`: no JSON text contains it.
SEPARATOR = "\x1e"


class Uuids(bytes):
    """A `uuid[]` in binary form, as `sessions` sends it."""


class Instants(bytes):
    """A `timestamptz[]` in binary form, as `sessions` sends it."""


class Columns:
    """Rows as arrays of their attributes: for each array its form and the dotted name of the attribute.

    `map` and `attrgetter` take less time than a generator for each array.
    """

    def __init__(self, *columns: tuple[Callable[[Iterable[Any]], Value], str]) -> None:
        self._columns = [(form, attrgetter(name)) for form, names in columns for name in names.split()]
        self.names = [name for _, names in columns for name in names.split()]

    def of(self, rows: Sequence[Any]) -> tuple[Value, ...]:
        return tuple([form(map(attribute, rows)) for form, attribute in self._columns])


def distinct(rows: Iterable[T], key: Callable[[T], Hashable]) -> tuple[list[T], str]:
    """The first row of each key, and for every row the number of the one with its key, from 1."""
    firsts: list[T] = []
    number_of: dict[Hashable, int] = {}
    found = []
    for row in rows:
        value = key(row)
        number = number_of.get(value)
        if number is None:
            firsts.append(row)
            number = number_of[value] = len(firsts)
        found.append(number)
    return firsts, numbers(found)


# A binary array: one dimension (or none), whether there are nulls, the type's OID, and the number of elements
# and that of the first. Each element follows its size.
_HEAD = struct.Struct(">iiIii").pack
_NO_ELEMENTS = struct.Struct(">iiI").pack
_UUID = 2950
_TIMESTAMPTZ = 1184
_UUID_SIZE = "00000010"
# Microseconds since 2000.
_INSTANT = struct.Struct(">iq").pack
_ORIGIN = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_NULL = struct.pack(">i", -1)


def uuids(values: Iterable[str]) -> Uuids:
    """Our identifiers, never None."""
    items = [*values]
    if not items:
        return Uuids(_NO_ELEMENTS(0, 0, _UUID))
    # One conversion for all: the size of each is part of what is converted.
    body = bytes.fromhex((_UUID_SIZE + _UUID_SIZE.join(items)).replace("-", ""))
    return Uuids(_HEAD(1, 0, _UUID, len(items), 1) + body)


def instants(values: Iterable[datetime | None]) -> Instants:
    """Aware times. One that repeats, as in the rows of a template, is converted once."""
    items: list[bytes] = []
    last, item = None, _NULL
    for at in values:
        if at is not last:
            last, item = at, _NULL if at is None else _INSTANT(8, (at - _ORIGIN) // _MICROSECOND)
        items.append(item)
    if not items:
        return Instants(_NO_ELEMENTS(0, 0, _TIMESTAMPTZ))
    return Instants(_HEAD(1, 1, _TIMESTAMPTZ, len(items), 1) + b"".join(items))


def lines(values: Iterable[str | None]) -> str:
    """JSON texts, not empty, for `string_to_array(%s, chr(30), '')`: nothing has to be quoted."""
    return SEPARATOR.join([value or "" for value in values])


def words(values: Iterable[str]) -> str:
    """Our identifiers and words, never None: they need no quotes."""
    return "{" + ",".join(values) + "}"


def numbers(values: Iterable[int]) -> str:
    """Integers, never None."""
    return "{" + ",".join(map(str, values)) + "}"


def plain(values: Iterable[Any]) -> str:
    """Our identifiers, numbers and words, or None: they need no quotes."""
    return _literal(values, str)


def flags(values: Iterable[bool]) -> str:
    return _literal(values, lambda value: "t" if value else "f")


def timestamps(values: Iterable[datetime | None]) -> str:
    return _literal(values, datetime.isoformat)


def texts(values: Iterable[str | None]) -> str:
    """Any text."""
    return _literal(values, _quoted)


def binaries(values: Iterable[bytes | None]) -> str:
    return _literal(values, lambda value: f'"\\\\x{value.hex()}"')


def jsons(values: Iterable[Any]) -> str:
    """Values as JSON text; None becomes null."""
    return _literal(values, lambda value: _quote(compact_json(value)))


def _quoted(text: str) -> str:
    return _cached_quote(text) if len(text) <= SHORT else _quote(text)


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


_cached_quote = functools.lru_cache(maxsize=4096)(_quote)


def _literal(values: Iterable[Any], form: Callable[[Any], str]) -> str:
    """An array of these values. An object that repeats, as in the rows of a template, is formed once."""
    items, last, item, has_value = [], None, "NULL", False
    for value in values:
        if value is not last:
            last, item = value, "NULL" if value is None else form(value)
            has_value = has_value or value is not None
        items.append(item)
    return "{" + ",".join(items) + "}" if has_value else "{}"
