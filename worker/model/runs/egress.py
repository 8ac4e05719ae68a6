"""The record of what a run sent: totals by origin, without paths and bodies. Pure.

What a broker counts is a claim, above all that of a host's: origins and numbers have limits here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from worker.model.definitions.units import took

# The row of all origins beyond `MAX_ORIGINS`, and the key of all statuses beyond `MAX_STATUSES`.
OTHERS = "others"
MAX_ORIGINS = 100
MAX_STATUSES = 20
# Characters of an origin, and of why it was denied: what is cut from a secret would not be masked.
MAX_ORIGIN = 300
MAX_REASON = 400
# The largest number, which JSON has exactly, and the most seconds of waiting.
MAX_TOTAL = 2**53 - 1
MAX_WAITED = 1e9
_COUNTS = ("requests", "bytes_out", "bytes_in", "denied")
# Origins that a sentence names.
NAMED = 3
# The class of requests that got no response.
NO_STATUS = "none"


@dataclass(frozen=True, slots=True)
class EgressRow:
    """What was sent to one origin, such as `https://api.example.com`.

    `requests` were sent, `denied` ones were not, for the `reason`, which is not stored. `statuses` counts
    responses by status. `waited_seconds` is the time that requests waited for a limit.
    """

    origin: str
    requests: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    statuses: Mapping[str, int] = field(default_factory=dict)
    denied: int = 0
    waited_seconds: float = 0.0
    reason: str = field(default="", compare=False)

    def by_class(self) -> dict[str, int]:
        """The requests by class of status, such as `2xx`; `none` for those without a response."""
        found: dict[str, int] = {}
        for status, count in self.statuses.items():
            name = OTHERS if status == OTHERS else f"{status[0]}xx"
            found[name] = found.get(name, 0) + count
        if (unanswered := self.requests - sum(self.statuses.values())) > 0:
            found[NO_STATUS] = unanswered
        return found


def row_of(value: Mapping[str, Any]) -> EgressRow:
    """A row of JSON that is not trusted. Raises ValueError, TypeError or KeyError."""
    origin, statuses, waited = value["origin"], value["statuses"], value["waited_seconds"]
    reason = value.get("reason", "")
    if not isinstance(reason, str) or len(reason) > MAX_REASON:
        raise ValueError(f"reason: not a text of at most {MAX_REASON} characters")
    if not isinstance(origin, str) or shown_origin(origin) != origin:
        raise ValueError(f"origin: not a text of 1 to {MAX_ORIGIN} printable characters")
    if isinstance(waited, bool) or not isinstance(waited, int | float) or not 0 <= waited <= MAX_WAITED:
        raise ValueError(f"waited_seconds: not a number from 0 to {MAX_WAITED:g}")
    if not isinstance(statuses, dict):
        raise TypeError("statuses: not an object")
    counts = {status: _count(number, "statuses") for status, number in statuses.items()}
    numbers = {name: _count(value[name], name) for name in _COUNTS}
    return EgressRow(origin, statuses=counts, waited_seconds=float(waited), reason=reason, **numbers)


def _count(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_TOTAL:
        raise ValueError(f"{name}: not a whole number from 0 to {MAX_TOTAL}")
    return value


def busiest(rows: Sequence[EgressRow], most: int) -> Sequence[EgressRow]:
    """The rows with the most requests, sent or denied; the rest is added up under `OTHERS`."""
    if len(rows) <= most:
        return rows
    return merge(sorted(rows, key=lambda row: -row.requests - row.denied), most)


def merge(rows: Iterable[EgressRow], most: int = MAX_ORIGINS) -> tuple[EgressRow, ...]:
    """The rows with those of one origin added up, in the order in which the origins first appear.

    Origins after the first `most` are added up under `OTHERS`, which comes last. Numbers are cut to
    their limits.
    """
    found: dict[str, EgressRow] = {}
    others: EgressRow | None = None
    for row in rows:
        origin = shown_origin(row.origin)
        if origin != OTHERS and (origin in found or len(found) < most):
            found[origin] = _sum(found.get(origin) or EgressRow(origin), row)
        else:
            others = _sum(others or EgressRow(OTHERS), row)
    return (*found.values(), others) if others is not None else tuple(found.values())


def waited_for(rows: Iterable[Mapping[str, Any]]) -> str | None:
    """`waited 12 s for https://api.example.com`, the longest wait first; None if no request waited.

    The rows have `origin` and `waited_seconds`.
    """
    waits = sorted(((row["waited_seconds"], row["origin"]) for row in rows), reverse=True)
    parts = [f"{took(timedelta(seconds=seconds))} for {origin}" for seconds, origin in waits if seconds > 0]
    if len(parts) > NAMED:
        parts[NAMED:] = [f"and for {len(parts) - NAMED} more"]
    return "waited " + ", ".join(parts) if parts else None


def statuses_in_words(statuses: Mapping[str, int]) -> str:
    """`200: 12, 429: 1`, in the order of statuses."""
    return ", ".join(f"{status}: {statuses[status]:,}" for status in sorted(statuses))


def shown_origin(origin: str) -> str:
    """The origin as it is recorded: `OTHERS` for one that is too long or not printable."""
    return origin if 0 < len(origin) <= MAX_ORIGIN and origin.isprintable() else OTHERS


def _sum(row: EgressRow, more: EgressRow) -> EgressRow:
    statuses = dict(row.statuses)
    for status, count in more.statuses.items():
        known = status in statuses or (_is_status(status) and len(statuses) < MAX_STATUSES)
        name = status if known else OTHERS
        statuses[name] = _capped(statuses.get(name, 0) + _capped(count))
    return EgressRow(
        row.origin,
        requests=_capped(row.requests + _capped(more.requests)),
        bytes_out=_capped(row.bytes_out + _capped(more.bytes_out)),
        bytes_in=_capped(row.bytes_in + _capped(more.bytes_in)),
        statuses=statuses,
        denied=_capped(row.denied + _capped(more.denied)),
        waited_seconds=_waited(row.waited_seconds + _waited(more.waited_seconds)),
        reason=more.reason or row.reason,
    )


def _is_status(text: str) -> bool:
    return len(text) == 3 and text.isascii() and text.isdigit() and text[0] in "12345"


def _capped(number: int) -> int:
    return max(0, min(number, MAX_TOTAL))


def _waited(seconds: float) -> float:
    # No number is not above 0 either.
    return round(min(seconds, MAX_WAITED), 3) if seconds > 0 else 0.0
