"""Strict JSON from untrusted peers: no duplicate members (RFC 8725, section 2.4), bounded depth and size."""

from __future__ import annotations

import json
import math
import re
from typing import Any

MAX_DEPTH = 12
MAX_MEMBERS = 2_000
MAX_DIGITS = 20
# A string, or all that follows an unclosed quote: it matches at every quote, so the scan is linear.
_STRINGS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)


class MalformedJson(Exception):
    """Rejected JSON; `code` is one of json, duplicate_member, depth, members, number, text."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def loads(raw: bytes, *, max_members: int = MAX_MEMBERS) -> Any:
    """The value of a JSON text in UTF-8 (RFC 8259) of about that many members; raises MalformedJson."""
    try:
        text = raw.decode("utf-8")
        _check_size(text, max_members)
        value = _decode(text)
        if "\\u" in text:
            # Half a surrogate pair or a NUL, written as an escape, would fail later, in a database.
            shown = json.dumps(value, ensure_ascii=False)
            if "\\u0000" in shown:
                raise MalformedJson("text")
            shown.encode("utf-8")
    except UnicodeError:
        raise MalformedJson("text") from None
    except (ValueError, RecursionError):
        raise MalformedJson("json") from None
    return value


def _check_size(text: str, max_members: int) -> None:
    if text.count(",") > max_members:
        raise MalformedJson("members")
    if text.count("{") + text.count("[") <= MAX_DEPTH:
        return
    depth = 0
    for letter in _STRINGS.sub("", text):
        if letter in "{[":
            depth += 1
            if depth > MAX_DEPTH:
                raise MalformedJson("depth")
        elif letter in "}]":
            depth -= 1


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise MalformedJson("duplicate_member")
    return members


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise MalformedJson("number")
    return int(digits)


def _float(text: str) -> float:
    number = float(text)  # of NaN and Infinity too
    if not math.isfinite(number):
        raise MalformedJson("number")
    return number


# Made once: building it costs as much as reading a token.
_decode = json.JSONDecoder(
    object_pairs_hook=_members, parse_int=_integer, parse_float=_float, parse_constant=_float
).decode
