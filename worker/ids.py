"""Identifiers: one type each, as UUIDv7 (RFC 9562, section 5.7), so that keys sort by age."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import NamedTuple, NewType

OrgId = NewType("OrgId", str)
DefinitionId = NewType("DefinitionId", str)
RunId = NewType("RunId", str)
TemplateId = NewType("TemplateId", str)
WorkerId = NewType("WorkerId", str)


class AllOrgs:
    """The explicit choice to read the rows of every org; see `ALL_ORGS`."""


ALL_ORGS = AllOrgs()
# Whose rows to read or change: those of the org with this id, or all.
Scope = OrgId | AllOrgs
# The same by the org's code.
OrgScope = str | AllOrgs

_lock = threading.Lock()
_last = 0
_nanoseconds: Callable[[], int] = time.time_ns
_random: Callable[[int], bytes] = os.urandom
# Microseconds, in 30 bits of an id of `new_id_at`: almost 18 minutes.
_LATEST = 2**30
# Characters at both ends of a short id: the time that all ids of a millisecond have, and random digits.
MILLISECOND = 13
_TAIL = 4
# At least this much of an id: shorter beginnings are words of orgs.
_LEAST_TIME = 8
_GIVEN = re.compile(
    r"([0-9a-f]{8}-?[0-9a-f]{0,4}-?[0-9a-f]{0,4}-?[0-9a-f]{0,4}-?[0-9a-f]{0,12})"
    r"(?:(?:…|\.{2,3})([0-9a-f-]{2,36}))?"
)


def draw_from(
    nanoseconds: Callable[[], int] = time.time_ns, random: Callable[[int], bytes] = os.urandom
) -> None:
    """Take the time since 1970 and the random bytes of later ids from here: a simulation has its own."""
    global _nanoseconds, _random, _last
    _nanoseconds, _random, _last = nanoseconds, random, 0


def new_id() -> str:
    """A UUIDv7 as text, strictly increasing within a process."""
    global _last
    # 48 bits of milliseconds, then 12 bits of the fraction: RFC 9562, section 6.2, method 3.
    nanoseconds = _nanoseconds()
    moment = (nanoseconds // 1_000_000 << 12) | (nanoseconds % 1_000_000 * 4096 // 1_000_000)
    with _lock:
        _last = moment = max(moment, _last + 1)
    tail = int.from_bytes(_random(8), "big") & 0x3FFF_FFFF_FFFF_FFFF | 0x8000_0000_0000_0000
    head = moment >> 12 << 16 | 0x7000 | moment & 0xFFF
    return _dashed(f"{head:016x}{tail:016x}")


def new_id_at(at: datetime) -> str:
    """A UUIDv7 with the time `at` if that is some minutes ago at most, else as `new_id`.

    Such ids sort by `at`, then by age. RFC 9562, section 6.1, allows a time other than that of its making.
    """
    moment = int(at.timestamp() * 1_000_000)
    late = _nanoseconds() // 1000 - moment
    if not 0 <= late < _LATEST:
        return new_id()
    milliseconds, rest = divmod(moment, 1000)
    head = milliseconds << 16 | 0x7000 | rest * 4096 // 1000
    tail = 0x8000_0000_0000_0000 | late << 32 | int.from_bytes(_random(4), "big")
    return _dashed(f"{head:016x}{tail:016x}")


def lowest_id(since: datetime) -> str:
    """An id lower than all ids made since `since`, with a tolerance of one hour for clock skew.

    A time in the future counts as now: tests set a clock that ids do not follow.
    """
    moment = min(int(since.timestamp() * 1000), _nanoseconds() // 1_000_000) - 3_600_000
    return _id_at(moment)


def highest_id(until: datetime) -> str:
    """An id higher than all ids made before `until`, with a tolerance of one hour for clock skew."""
    return _id_at(int(until.timestamp() * 1000) + 3_600_000)


def _id_at(moment: int) -> str:
    """The first id of a millisecond, or of the first or last one that an id can have."""
    head = f"{min(max(moment, 0), 2**48 - 1):012x}"
    return f"{head[:8]}-{head[8:]}-7000-8000-000000000000"


def _dashed(digits: str) -> str:
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def short_id(id_: str, tail: int = _TAIL) -> str:
    """An id as people read it: `TIME…TAIL`, its millisecond and the last characters, such as
    `01a22a45-2bd0…c8fb`.

    Ids of runs that are due together begin alike, so a beginning alone names none of them.
    """
    return id_ if MILLISECOND + tail >= len(id_) - 1 else f"{id_[:MILLISECOND]}…{id_[-tail:].lstrip('-')}"


def short_ids(ids: Iterable[str]) -> Mapping[str, str]:
    """The short form of each id; those that would look the same have a longer tail."""
    short: dict[str, str] = {}
    left, tail = set(ids), _TAIL
    while left:
        alike: defaultdict[str, list[str]] = defaultdict(list)
        for id_ in left:
            alike[short_id(id_, tail)].append(id_)
        short |= {same[0]: text for text, same in alike.items() if len(same) == 1}
        left, tail = left - short.keys(), tail + 1
    return short


class GivenId(NamedTuple):
    """What a person gave of an id: it is between `first` and `last`, and ends with `tail`."""

    first: str
    last: str
    tail: str = ""

    @property
    def is_whole(self) -> bool:
        return self.first == self.last


def given_id(text: str) -> GivenId | None:
    """What a text says of an id: its beginning of at least 8 digits, or `TIME…TAIL`; None for other texts.

    `..` and `...` are as good as `…`, and upper case as lower case.
    """
    found = _GIVEN.fullmatch(text.lower())
    if found is None:
        return None
    begin, end = (part.replace("-", "") for part in (found[1], found[2] or ""))
    if not _LEAST_TIME <= len(begin) <= 32 or (found[2] and not 2 <= len(end) <= 32):
        return None
    # The last digits, with the dashes that an id has between them.
    dashes = sum(len(end) > before for before in (12, 16, 20, 24))
    tail = _dashed(end.rjust(32, "0"))[36 - len(end) - dashes :]
    return GivenId(_dashed(begin.ljust(32, "0")), _dashed(begin.ljust(32, "f")), tail)
