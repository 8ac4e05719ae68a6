"""Escapes: finds what a text says that is written within another text, and where each character is there."""

from __future__ import annotations

import functools
import html
import re
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from html.entities import name2codepoint
from itertools import accumulate
from operator import add, sub

from worker.telemetry.slices import SLICE

UNKNOWN = "\ufffd"
# Characters of the longest escape, a surrogate pair.
LONGEST = 12


@dataclass(frozen=True, slots=True)
class Undone:
    """A text without its escapes. `at` are the places of the `characters` that were escaped.

    `shifts` are what is added to a place up to each of them to get the place in the text with escapes.
    """

    text: str
    # Arrays, which are dropped at once: freeing a million objects holds the interpreter lock.
    at: array[int]
    shifts: array[int]
    characters: str

    def original(self, place: int) -> int:
        """The place in the text with escapes: of a character's start, or of the end of the one before."""
        return place + self.shifts[bisect_left(self.at, place)]


@dataclass(frozen=True)
class Escape:
    """One way to write text in other text.

    Each match of `pattern`, which is one group, stands for one character; `unfinished` matches the
    beginning of an escape at the end of a text that was cut. Texts without `sign` have none.
    """

    sign: str
    pattern: re.Pattern[str]
    unfinished: re.Pattern[str]
    meaning: Callable[[str], str]

    def undo(self, text: str, wanted: Set[str] | None = None) -> Undone | None:
        """The text without these escapes; None if no character of `wanted`, or none at all, is escaped."""
        if self.sign not in text:
            return None
        texts, characters = list[str](), list[str]()
        at, shifts = array("i"), array("i", [0])
        plain = escaped = 0
        # Without a loop in Python for each of them: a hostile text may have half a million escapes.
        for parts in self._slices(text):
            escapes = parts[1::2]
            meant = list(map(self.meaning, escapes))
            count = len(at)
            places = accumulate(map(len, parts[:-1:2]), initial=plain)
            next(places)
            at.extend(map(add, places, range(count, count + len(meant))))
            ends = accumulate(map(len, escapes), initial=escaped)
            next(ends)
            shifts.extend(map(sub, ends, range(count + 1, count + 1 + len(meant))))
            plain += sum(map(len, parts[::2]))
            escaped += sum(map(len, escapes))
            parts[1::2] = meant
            texts.append("".join(parts))
            characters.append("".join(meant))
        found = "".join(characters)
        if not found or (wanted is not None and wanted.isdisjoint(found)):
            return None
        return Undone("".join(texts), at, shifts, found)

    def _slices(self, text: str) -> Iterator[list[str]]:
        """What the pattern splits a text into, slice by slice, as it splits the whole."""
        start = 0
        while len(text) - start > SLICE:
            end = start + SLICE
            parts = self.pattern.split(text[start:end])
            # An escape that begins near the end may go on after it.
            certain = end - LONGEST + 1
            at = end - len(parts[-1])
            while len(parts) > 1 and at - len(parts[-2]) >= certain:
                at -= len(parts[-2]) + len(parts[-3])
                del parts[-2:]
            upto = max(at, certain)
            parts[-1] = parts[-1][: upto - at]
            yield parts
            start = upto
        yield self.pattern.split(text[start:])


def _character(code: int) -> str:
    return chr(code) if code < 0x110000 else UNKNOWN


_LETTERS = dict(zip("bfnrtv", "\b\f\n\r\t\v", strict=True))


@functools.lru_cache(4096)
def _after_backslash(escape: str) -> str:
    kind = escape[1]
    if kind in "xU":
        return _character(int(escape[2:], 16))
    if kind == "u":
        if len(escape) == 12:  # a surrogate pair
            high, low = int(escape[2:6], 16), int(escape[8:], 16)
            return chr(0x10000 + (high - 0xD800 << 10) + (low - 0xDC00))
        return _character(int(escape[2:].strip("{}"), 16))
    if kind.isdigit():
        return chr(int(escape[1:], 8))
    return _LETTERS.get(kind, kind)


def _percent(escape: str) -> str:
    """A byte of UTF-8, as Latin-1 reads it."""
    return " " if escape == "+" else chr(int(escape[1:], 16))


@functools.lru_cache(4096)
def _entity(escape: str) -> str:
    name = escape[1:-1]
    if name[0] == "#":
        hexadecimal = name[1] in "xX"
        return _character(int(name[2:], 16) if hexadecimal else int(name[1:]))
    return chr(name2codepoint[name]) if name in name2codepoint else html.unescape(escape)[:1]


_HEX = "[0-9a-fA-F]"
# Of JSON, of `repr` of text and bytes, of `unicode_escape`, and of other languages.
BACKSLASH = Escape(
    "\\",
    re.compile(
        rf"(\\(?:u[dD][89abAB]{_HEX}{{2}}\\u[dD][c-fC-F]{_HEX}{{2}}|u{_HEX}{{4}}|u\{{{_HEX}{{1,6}}\}}"
        rf"|U{_HEX}{{8}}|x{_HEX}{{2}}|[0-3][0-7]{{2}}|[\"'\\/bfnrtv]))"
    ),
    re.compile(
        rf"\\(?:u[dD]{_HEX}{{3}}\\?u?{_HEX}{{0,3}}|u{_HEX}{{0,3}}|u\{{{_HEX}{{0,6}}|U{_HEX}{{0,7}}|x{_HEX}?|[0-3][0-7]?)?\Z"
    ),
    _after_backslash,
)
PERCENT = Escape("%", re.compile(rf"(%{_HEX}{{2}})"), re.compile(rf"%{_HEX}?\Z"), _percent)
# Of forms, where a plus is a space.
FORM = Escape("+", re.compile(rf"(\+|%{_HEX}{{2}})"), PERCENT.unfinished, _percent)
HTML = Escape(
    "&",
    re.compile(rf"(&(?:#[0-9]{{1,7}}|#[xX]{_HEX}{{1,6}}|[a-zA-Z][a-zA-Z0-9]{{1,7}});)"),
    re.compile(r"&#?[0-9a-zA-Z]{0,8}\Z"),
    _entity,
)
ESCAPES = (BACKSLASH, PERCENT, FORM, HTML)
# What is escaped where one escape is written within another.
SIGNS = frozenset("\\%&+")
