"""Regular expressions from a plug-in's schema, matched in linear time at a known price.

Python's `re` backtracks: one bad pattern can hold the interpreter indefinitely. These use
pydantic's Rust engine, as a model's `pattern` does in the run's own process. It supports
neither look-around nor back-references.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from pydantic_core import SchemaError, SchemaValidator, core_schema

LONGEST = 1_000
"""Maximum length of a pattern, in characters."""

# Compile cost of an atom. Unicode classes are automata over UTF-8 bytes: `\w` alone takes 300
# times as long as a letter.
_HEAVY = 300
_MEDIUM = 60
_LIGHT = 10
_BASE = 50
_NUMBERS = re.compile(r"[0-9]+")
_ESCAPE = r"\\(?:[pPux]\{[^}]*\}?|.?)"
_CLASS_TOKEN = re.compile(rf"{_ESCAPE}|.", re.DOTALL)
# After a parenthesis: a group's name, or flags that end with it or open a group.
_OPENING = r"\((?:\?(?:P?<\w+>|(?P<flags>[A-Za-z-]*)(?P<end>[:)])))?"
_TOKEN = re.compile(rf"{_ESCAPE}|{_OPENING}|\{{[^}}]*\}}?|.", re.DOTALL)


class UnusablePattern(Exception):
    """A pattern that the linear engine does not support; the message says why."""


class Cost(NamedTuple):
    """Upper bounds: the engine's states, and the steps of about a microsecond to compile them."""

    states: int
    compiling: int

    def plus(self, other: Cost) -> Cost:
        return Cost(self.states + other.states, self.compiling + other.compiling)

    def times(self, count: int) -> Cost:
        return Cost(self.states * count, self.compiling * count)


class Pattern:
    """A compiled pattern. Its cost is known before it is compiled."""

    def __init__(self, text: str, cost: Cost) -> None:
        """Compile the pattern; raises UnusablePattern if that fails."""
        self._states = cost.states
        try:
            self._validator = SchemaValidator(core_schema.str_schema(pattern=text, regex_engine="rust-regex"))
        except SchemaError as error:
            raise UnusablePattern(_reason(error)) from None

    def price(self, text: str) -> int:
        """Maximum steps of about a microsecond to match this text."""
        # At most some 20 ns for each state and byte, once the engine's fast automaton gives up.
        size = len(text) if text.isascii() else 4 * len(text)
        return 1 + self._states * size // 50

    def found_in(self, text: str) -> bool:
        """Whether the pattern matches anywhere in the text."""
        return self._validator.isinstance_python(text)


def cost_of(text: str) -> Cost:
    """Estimate the cost of a pattern that the engine accepts; raises UnusablePattern.

    Counted repetitions multiply: `(a{100}){100}` has 10,000 states in 13 characters.
    """
    if len(text) > LONGEST:
        raise UnusablePattern(f"it is longer than {LONGEST} characters")
    # For each open group: its total so far, and its last atom, which a repetition multiplies.
    groups = [(_NOTHING, _NOTHING)]
    at = 0
    while token := _TOKEN.match(text, at):
        at = token.end()
        atom: Cost | None = None
        match token[0][0]:
            case "\\":
                atom = Cost(1, _escape_cost(token[0]))
            case "[":
                cost, at = _class_cost(text, at)
                atom = Cost(1, cost)
            case "(":
                if "x" in (token["flags"] or ""):
                    # It allows white space between an atom and its repetition.
                    raise UnusablePattern("the flag x is not supported")
                if token["end"] != ")":
                    groups.append((_NOTHING, _NOTHING))
            case ")":
                if len(groups) > 1:
                    done, last = groups.pop()
                    atom = done.plus(last)
            case "{":
                done, last = groups[-1]
                counts = [int(number) for number in _NUMBERS.findall(token[0])] if token[0][-1] == "}" else []
                # An unbounded repetition, x{n,}, has one more copy.
                groups[-1] = done, last.times(max([1, *counts]) + 1)
            case "*" | "+" | "?":
                pass
            case ".":
                atom = Cost(1, _LIGHT)
            case _:
                atom = Cost(1, 1)
        if atom is not None:
            done, last = groups[-1]
            groups[-1] = done.plus(last), atom
    total = Cost(1, _BASE)
    for done, last in groups:
        total = total.plus(done).plus(last)
    return total


_NOTHING = Cost(0, 0)


def _escape_cost(escape: str) -> int:
    letter = escape[1:2]
    if letter in "wWpPbB":
        return _HEAVY
    return _MEDIUM if letter in "dDsS" else 1


def _class_cost(text: str, at: int) -> tuple[int, int]:
    """The compile cost of the character class whose bracket ends at `at`, and where it ends; classes nest."""
    cost, depth, first = 2, 1, True
    while depth and (found := _CLASS_TOKEN.match(text, at)):
        at, part = found.end(), found[0]
        if part == "^" and first:
            cost += _LIGHT
            continue  # A bracket after it is still the first.
        if part == "[":
            depth, first = depth + 1, True
            continue
        if part == "]" and not first:
            depth -= 1
        elif part[0] == "\\":
            cost += _escape_cost(part)
        else:
            cost += 1 if part.isascii() else _LIGHT
        first = False
    return cost, at


def _reason(error: SchemaError) -> str:
    """The last line of the engine's message, such as `look-around … is not supported`."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else "it does not compile"
    said = next((line for line in lines if line.startswith("error: ")), last)
    return said.removeprefix("error: ").removeprefix("SchemaError: ")
