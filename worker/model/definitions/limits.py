"""Limits of calls to other services, as a file for `apply` has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from worker.model.definitions import fields
from worker.model.definitions.fields import Fields, refusal
from worker.model.definitions.origins import parse_origin
from worker.model.definitions.units import format_duration, parse_duration
from worker.model.limits import MAX_WAIT, PERS, Limit, Per, origin_text, parse_rate

MAX_CONCURRENT = 100_000
LONGEST_WAIT = timedelta(hours=1)
_KEYS = ("origin", "per", "rate", "burst", "concurrent", "max_wait")
# The columns that a change of a file sets.
COLUMNS = ("rate", "burst", "concurrent", "max_wait")


@dataclass(frozen=True, slots=True)
class LimitEntry:
    """A table `[[limit]]` of a file for `apply`; operators only. It has `rate`, `concurrent` or both."""

    origin: str
    """The service: scheme, host and port, such as `https://api.openai.com`."""
    per: Per
    """`org`: each org has the whole limit for itself; `all`: all orgs share it. An origin may have both."""
    rate: str | None = None
    """Requests in a time: `40/s`, `100/m` or `1000/h`."""
    burst: int | None = None
    """How many may be sent at once after a pause; default what the rate allows in a second, at least 1."""
    concurrent: int | None = None
    """How many may be under way at once, over all workers."""
    max_wait: timedelta = timedelta(seconds=MAX_WAIT)
    """How long a request waits; if it would wait longer, `RateLimited` is raised in the handler."""

    @property
    def values(self) -> dict[str, Any]:
        """What of it changes, as its row has it."""
        wait = format_duration(self.max_wait)
        return dict(zip(COLUMNS, (self.rate, self.burst, self.concurrent, wait), strict=True))


def parse_limit(values: Any, entry: str) -> LimitEntry:
    """The limit of an entry of a file; raises DefinitionError."""
    reader = Fields(values, entry)
    reader.only(_KEYS)
    if not reader.given(("rate", "concurrent")):
        raise refusal("it limits nothing", entry, "rate", fix='write rate = "40/s", or concurrent = 8')
    rate = reader.take("rate", _rate, None)
    if rate is None and reader.given(("burst",)):
        raise refusal("burst belongs to a rate", entry, "burst", fix='add rate = "40/s", or leave it out')
    burst = None if rate is None else math.ceil(parse_rate(rate))
    return LimitEntry(
        origin=reader.take("origin", _origin),
        per=reader.take("per", fields.one_of(PERS)),
        rate=rate,
        burst=reader.take("burst", fields.integer(1), burst),
        concurrent=reader.take("concurrent", _concurrent, None),
        max_wait=reader.take("max_wait", _max_wait, timedelta(seconds=MAX_WAIT)),
    )


def limit_of(row: Mapping[str, Any]) -> Limit:
    """The limit of a row of `limits`."""
    rate = row["rate"]
    return Limit(
        row["id"],
        row["origin"],
        row["per"],
        None if rate is None else parse_rate(rate),
        row["burst"] or 1,
        row["concurrent"],
        parse_duration(row["max_wait"]).total_seconds(),
    )


def shown(values: Mapping[str, Any]) -> str:
    """A limit in a few words, from its row: `https://api.openai.com per org`."""
    return f"{values['origin']} per {values['per']}"


def _origin(value: Any) -> str:
    text = fields.text(value)
    if "*" in text:
        raise ValueError(f"{text[:60]!r} is not an origin: a limit has no wildcard; write each origin")
    return origin_text(parse_origin(text))


def _rate(value: Any) -> str:
    text = fields.text(value)
    parse_rate(text)
    return text


def _concurrent(value: Any) -> int:
    number = fields.integer(1)(value)
    if number > MAX_CONCURRENT:
        raise ValueError(f"{number} is not between 1 and {MAX_CONCURRENT}")
    return number


def _max_wait(value: Any) -> timedelta:
    found = fields.duration()(value)
    if found > LONGEST_WAIT:
        raise ValueError(f"{value!r} is longer than {format_duration(LONGEST_WAIT)}")
    return found
