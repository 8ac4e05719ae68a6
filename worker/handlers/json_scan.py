"""A bounded check of untrusted JSON text: in small steps, and without building the value.

`json.loads` holds the interpreter lock until it is done: 1 MB of `[]` takes some 100 ms, in any thread.
"""

from __future__ import annotations

import re
from enum import Enum

from worker.handlers.json_text import DEEPEST, NotStorable

# Work of one step, three to five milliseconds: each match costs one, and one more for each 64 characters.
STEP = 4_000
# Values that one match reads, and escapes in a string that one match reads.
_RUN = 64
_ESCAPES = 500

_WS = r"[ \t\n\r]*+"
# Without a NUL, and a surrogate only as one of a pair.
_ESCAPE = (
    r'\\(?:["\\/bfnrt]|u(?!0000)(?:[0-9a-ce-fA-CE-F][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2}'
    r"|[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}))"
)
_CHARS = r'[^"\\\x00-\x1f]*+'
_STRING = rf'"{_CHARS}(?:{_ESCAPE}{_CHARS}){{0,{_ESCAPES}}}+"'
# As many digits as Python reads.
_NUMBER = r"-?(?:0|[1-9][0-9]{0,4299}+)(?:\.[0-9]++)?+(?:[eE][+-]?[0-9]++)?+"
_PLAIN = rf"(?:{_STRING}|{_NUMBER}|true|false|null)"


class _Values:
    """Patterns for a place where a value is due."""

    def __init__(self, simple: str) -> None:
        self.items = re.compile(rf"(?:{_WS}{simple}{_WS},){{0,{_RUN}}}+")
        self.pairs = re.compile(rf"(?:{_WS}{_STRING}{_WS}:{_WS}{simple}{_WS},){{0,{_RUN}}}+")
        self.value = re.compile(rf"{_WS}(?:{simple}|([\[{{])|(\"))")


# Where another level is allowed, an empty list or object is read as one value.
_SHALLOW = _Values(rf"(?:{_PLAIN}|\[{_WS}\]|\{{{_WS}\}})")
_DEEPEST = _Values(_PLAIN)
_KEY = re.compile(rf"{_WS}(?:{_STRING}{_WS}:|(\"))")
_REST = re.compile(rf'{_CHARS}(?:{_ESCAPE}{_CHARS}){{0,{_ESCAPES}}}+("?)')
_COLON = re.compile(rf"{_WS}:")
_AFTER = re.compile(rf"{_WS}([,\]}}]?)")


class _Due(Enum):
    """What comes next: a long string, in a value or in a key, is read in pieces."""

    VALUE = 1
    AFTER = 2
    COLON = 3
    MORE_OF_VALUE = 4
    MORE_OF_KEY = 5


class Scan:
    """Reads a JSON text once, from its beginning: `step` until it returns True."""

    def __init__(self, text: str, what: str) -> None:
        self._text = text
        self._what = what
        self._at = 0
        # The marks that close the open lists and objects.
        self._open: list[str] = []
        self._due = _Due.VALUE
        self._keyed = False

    def step(self, work: int = STEP) -> bool:
        """Go on for `work`; True at the end. Raises NotStorable for what databases do not accept."""
        while work > 0:
            before = self._at
            match self._due:
                case _Due.VALUE:
                    self._value()
                case _Due.AFTER:
                    if self._after():
                        return True
                case _Due.COLON:
                    self._match(_COLON)
                    self._keyed, self._due = True, _Due.VALUE
                case _:
                    self._more()
            work -= 1 + (self._at - before) // 64
        return False

    def _value(self) -> None:
        levels = self._open
        values = _SHALLOW if len(levels) < DEEPEST else _DEEPEST
        if levels and not self._keyed:
            if levels[-1] == "}":
                self._match(values.pairs)
                if self._match(_KEY)[1]:
                    self._due = _Due.MORE_OF_KEY
                    return
            else:
                self._match(values.items)
        self._keyed = False
        found = self._match(values.value)
        if found[1]:
            if len(levels) >= DEEPEST:
                raise self._error()
            levels.append("]" if found[1] == "[" else "}")
        else:
            self._due = _Due.MORE_OF_VALUE if found[2] else _Due.AFTER

    def _after(self) -> bool:
        levels, mark = self._open, self._match(_AFTER)[1]
        if not levels:
            if mark or self._at < len(self._text):
                raise self._error()
            return True
        if mark == ",":
            self._due = _Due.VALUE
        elif mark == levels[-1]:
            levels.pop()
        else:
            raise self._error()
        return False

    def _more(self) -> None:
        before = self._at
        if self._match(_REST)[1]:
            self._due = _Due.AFTER if self._due is _Due.MORE_OF_VALUE else _Due.COLON
        elif self._at == before:
            raise self._error()

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str]:
        found = pattern.match(self._text, self._at)
        if found is None:
            raise self._error()
        self._at = found.end()
        return found

    def _error(self) -> NotStorable:
        return NotStorable(f"the {self._what} is not JSON that can be stored")
