"""Regular expressions of a plug-in's schema, matched in linear time and at a known price.

Python's `re` backtracks: one bad pattern holds the interpreter for as long as its
author likes. These use pydantic's Rust engine, which is also what a model's `pattern`
means in the run's own process. It knows no look-around and no back-references.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from pydantic_core import SchemaError, SchemaValidator, core_schema

LONGEST = 1_000
"""Characters of a pattern at most."""

# What an atom costs to compile. Classes of Unicode are automata over the bytes of UTF-8:
# `\w` alone took 300 times as long as a letter.
_HEAVY, _MEDIUM, _LIGHT = 300, 60, 10
_BASE = 50
_NUMBERS = re.compile(r"[0-9]+")
# After a parenthesis: a name, or flags that end with it or open a group.
_OPENING = re.compile(r"\?(?:P?<\w+>|([A-Za-z-]*)([:)]))")


class UnusablePattern(Exception):
    """A pattern that the linear engine does not take; the message says why."""


class Cost(NamedTuple):
    """Upper bounds: the engine's states for a pattern, and steps of about a microsecond to compile it."""

    states: int
    compiling: int


class Pattern:
    """A compiled pattern. `cost` is known before any of it is compiled."""

    def __init__(self, text: str, cost: Cost) -> None:
        """Compile it.

        Raises:
            UnusablePattern: it does not compile.
        """
        self._states = cost.states
        try:
            self._validator = SchemaValidator(core_schema.str_schema(pattern=text, regex_engine="rust-regex"))
        except SchemaError as error:
            raise UnusablePattern(_reason(error)) from None

    def price(self, text: str) -> int:
        """Steps of about a microsecond that matching this text takes at most."""
        # At most some 20 ns for each state and byte, where the engine's quick automaton gives up.
        size = len(text) if text.isascii() else 4 * len(text)
        return 1 + self._states * size // 50

    def found_in(self, text: str) -> bool:
        """Whether it matches anywhere in the text."""
        return self._validator.isinstance_python(text)


def cost_of(text: str) -> Cost:
    """The cost of a pattern, from its text alone.

    Counted repetitions multiply: `(a{100}){100}` has 10,000 states in 13 characters.

    Raises:
        UnusablePattern: it is too long, or its cost cannot be told.
    """
    if len(text) > LONGEST:
        raise UnusablePattern(f"it is longer than {LONGEST} characters")
    return _Estimate(text).cost()


class _Estimate:
    """Walks a pattern once; what it does not understand the engine refuses as well."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        # For each open group: its total so far, and its last atom, which a repetition multiplies.
        self._groups: list[list[Cost]] = [[_NOTHING, _NOTHING]]

    def cost(self) -> Cost:
        while self._at < len(self._text):
            self._step(self._take())
        total = _NOTHING
        for done, last in self._groups:
            total = _sum(total, done, last)
        return Cost(total.states + 1, total.compiling + _BASE)

    def _step(self, letter: str) -> None:
        group = self._groups[-1]
        match letter:
            case "\\":
                self._atom(self._escape())
            case "[":
                self._atom(self._class())
            case "(":
                self._open()
            case ")":
                if len(self._groups) > 1:
                    done, last = self._groups.pop()
                    self._atom(_sum(done, last))
            case "{":
                counts = [int(number) for number in _NUMBERS.findall(self._until("}"))]
                times = max([1, *counts])
                # An unbounded repetition, x{n,}, has one copy more.
                group[1] = Cost(group[1].states * (times + 1), group[1].compiling * (times + 1))
            case "*" | "+" | "?":
                pass
            case ".":
                self._atom(_LIGHT)
            case _:
                self._atom(1)

    def _atom(self, cost: Cost | int) -> None:
        group = self._groups[-1]
        group[0] = _sum(*group)
        group[1] = cost if isinstance(cost, Cost) else Cost(1, cost)

    def _open(self) -> None:
        if opening := _OPENING.match(self._text, self._at):
            self._at = opening.end()
            flags, end = opening.groups()
            if flags is not None and "x" in flags:
                # It lets white space stand between an atom and its repetition.
                raise UnusablePattern("the flag x is not supported")
            if end == ")":
                return
        self._groups.append([_NOTHING, _NOTHING])

    def _escape(self) -> int:
        """The cost of an escape whose backslash was taken."""
        letter = self._take()
        if letter in "pPux" and self._text.startswith("{", self._at):
            self._until("}")
        if letter in "wWpPbB":
            return _HEAVY
        return _MEDIUM if letter in "dDsS" else 1

    def _class(self) -> int:
        """The cost of a character class whose bracket was taken; classes nest."""
        cost, depth, first = 2, 1, True
        while depth and self._at < len(self._text):
            letter = self._take()
            if letter == "^" and first:
                cost += _LIGHT
                continue  # A bracket after it is still the first.
            if letter == "\\":
                cost += self._escape()
            elif letter == "[":
                depth, first = depth + 1, True
                continue
            elif letter == "]" and not first:
                depth -= 1
            else:
                cost += 1 if letter.isascii() else _LIGHT
            first = False
        return cost

    def _take(self) -> str:
        letter = self._text[self._at : self._at + 1]
        self._at += 1
        return letter

    def _until(self, end: str) -> str:
        found = self._text.find(end, self._at)
        taken = self._text[self._at : found] if found >= 0 else ""
        self._at = found + 1 if found >= 0 else len(self._text)
        return taken


_NOTHING = Cost(0, 0)


def _sum(*costs: Cost) -> Cost:
    return Cost(sum(cost.states for cost in costs), sum(cost.compiling for cost in costs))


def _reason(error: SchemaError) -> str:
    """The engine's own last line, such as `look-around … is not supported`."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in lines:
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    return lines[-1].removeprefix("SchemaError: ") if lines else "it does not compile"
