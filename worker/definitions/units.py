"""How deeply values nest: read without recursion, so that no depth is too much for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

MAX_DEPTH = 64
"""Levels that params, and the schema of a handler, nest at most."""
TOO_DEEP = f"it nests more than {MAX_DEPTH} levels"


def depth_of(value: Any) -> int:
    """Levels of tables and lists within each other: 0 for a text, 1 for a table of texts."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, Mapping | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, Mapping) else item)]
    return depth


_MICROSECONDS = {
    "w": 604_800_000_000,
    "d": 86_400_000_000,
    "h": 3_600_000_000,
    "m": 60_000_000,
    "s": 1_000_000,
    "ms": 1_000,
    "us": 1,
}
_PART = re.compile(r"(\d+)(?:\.(\d{1,6}))?(ms|us|[wdhms])")
_DURATION = re.compile(rf"(?:{_PART.pattern})+")
LONGEST = timedelta(days=36_500)
_LONGEST = LONGEST // timedelta(microseconds=1)

_BYTES = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
# No duration within a hundred years is longer.
_MOST_LETTERS = 100
_SIZE = re.compile(r"(\d{1,15})\s*([KMGT]i?B|B)")


def parse_duration(text: str) -> timedelta:
    """The duration that a text such as `30s`, `15m`, `2h`, `1d`, `1h30m` or `0.5s` names.

    Raises:
        ValueError: the text is none, or longer than a hundred years.
    """
    if not isinstance(text, str) or len(text) > _MOST_LETTERS or _DURATION.fullmatch(text) is None:
        shown = text[:_MOST_LETTERS] if isinstance(text, str) else text
        raise ValueError(f"{shown!r} is no duration; write it as text, such as 30s, 15m, 2h or 1d")
    total = 0
    for whole, fraction, unit in _PART.findall(text):
        size = _MICROSECONDS[unit]
        total += int(whole) * size + int(fraction.ljust(6, "0")) * size // 1_000_000
        if total > _LONGEST:
            raise ValueError(f"{text!r} is longer than a hundred years")
    return timedelta(microseconds=total)


def format_duration(duration: timedelta) -> str:
    """The one canonical text of a duration of 0 or more; `parse_duration` gives it back exactly."""
    left = duration // timedelta(microseconds=1)
    parts = []
    for unit in ("d", "h", "m", "s", "ms", "us"):
        whole, left = divmod(left, _MICROSECONDS[unit])
        if whole:
            parts.append(f"{whole}{unit}")
    return "".join(parts) or "0s"


def parse_memory(text: str) -> int:
    """The bytes that a text such as `512MiB` or `1GiB` names.

    Raises:
        ValueError: the text is none.
    """
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"{text!r} is no size; write it as text, such as 512MiB or 1GiB")
    return int(match[1]) * _BYTES[match[2]]


def format_memory(size: int) -> str:
    """The shortest exact text of a size in bytes, in powers of 1024."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size and size % _BYTES[unit] == 0:
            return f"{size // _BYTES[unit]}{unit}"
    return f"{size}B"
