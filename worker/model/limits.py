"""Limits of calls to other services: how workers share a rate, and slots for concurrent requests. Pure.

A key is a limit, and an org if the limit is by org. It has one bucket of tokens, one for each request, which
fills at the rate of the limit. Workers take tokens in advance and use them within `LIFE`, measured from
before they asked. So over any window of w seconds a service sees at most the tokens that left the bucket
within w + `LIFE`: `burst + rate * AHEAD + rate * (w + LIFE)`, which is `rate * (w + 1) + burst`.

Tokens that come back unused count as if they had never been taken: what the bucket gained since then may have
been lost to an overflow without them, so as much is deducted. Otherwise a token could be given twice, and
the bound would not hold.

Imports nothing but the standard library: the broker of a worker reads it too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from worker.guard.urls import DEFAULT_PORTS, Origin

Per = Literal["org", "all"]
PERS: tuple[Per, ...] = ("org", "all")

# Seconds that a token can be used, and seconds of the rate that a bucket collects besides the burst: workers
# ask at most every `SPACING` seconds, and a bucket that is full loses what it would gain. Both make up the
# second of the bound.
LIFE = 0.6
AHEAD = 0.4
# Seconds that slots are leased, unless they are renewed.
SLOT_LIFE = 1.0
# Seconds between two questions of a worker, and seconds in which those of all keys are gathered.
SPACING = 0.2
GATHERING = 0.05
# Seconds after which the slots that cannot be divided evenly go to other workers.
TURN = 2.0
# The longest pause that a response can ask for, in seconds.
MAX_PAUSE = 3600.0
# The longest wait for a limit that is not in the file, as for the end of a pause, in seconds.
MAX_WAIT = 10.0

MAX_RATE = 1_000_000
_RATE = re.compile(r"([0-9]{1,7})/(s|m|h)")
_UNITS = {"s": 1, "m": 60, "h": 3600}


def parse_rate(text: str) -> float:
    """Requests a second of a text such as `40/s`, `100/m` or `1000/h`; raises ValueError."""
    found = _RATE.fullmatch(text) if isinstance(text, str) else None
    if found is None or not 1 <= int(found[1]) <= MAX_RATE:
        raise ValueError(f"{str(text)[:60]!r} is not a rate; write 40/s, 100/m or 1000/h (1 to {MAX_RATE})")
    return int(found[1]) / _UNITS[found[2]]


def origin_text(origin: Origin) -> str:
    """The one text of an origin: without the default port, a slash or capitals."""
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    port = "" if origin.port == DEFAULT_PORTS.get(origin.scheme) else f":{origin.port}"
    return f"{origin.scheme}://{host}{port}"


class BucketKey(NamedTuple):
    """What has a bucket of its own: a limit, and the org if the limit is by org."""

    limit_id: str
    org_id: str | None


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit as workers and brokers use it. `rate` is in requests a second, `max_wait` in seconds."""

    id: str
    origin: str
    per: Per
    rate: float | None = None
    burst: int = 1
    concurrent: int | None = None
    max_wait: float = MAX_WAIT

    def key(self, org_id: str) -> BucketKey:
        return BucketKey(self.id, org_id if self.per == "org" else None)

    @property
    def capacity(self) -> float:
        """The most tokens in its bucket."""
        return self.burst + (self.rate or 0.0) * AHEAD

    def as_json(self) -> list[Any]:
        return [self.id, self.origin, self.per, self.rate, self.burst, self.concurrent, self.max_wait]

    @classmethod
    def from_json(cls, values: list[Any]) -> Limit:
        return cls(*values)


class Ask(NamedTuple):
    """What a worker asks for a key: tokens for requests, and slots for concurrent ones.

    `returned` tokens of earlier grants will not be used; the oldest of these grants is from `granted_at`.
    `slots` are all that it can use, those of the `in_use` requests included.
    """

    key: BucketKey
    want: int = 0
    returned: int = 0
    granted_at: float = 0.0
    slots: int = 0
    in_use: int = 0


class Share(NamedTuple):
    """What a worker may use of a key: tokens, each for one request, and slots for concurrent requests.

    Both end on their own: tokens at `until`, slots at `slots_until`, on CLOCK_MONOTONIC of the worker's
    machine. `granted_at` is the database's time. `wait` is when to ask again for what is missing, in
    seconds, `pace` the tokens a second that the worker can expect.
    """

    tokens: int
    slots: int
    granted_at: float
    wait: float = 0.0
    pace: float = 0.0
    until: float = 0.0
    slots_until: float = 0.0


class BucketUser(NamedTuple):
    """What one worker has of a key, and waits for, until `until`. `served_at` is of its last token."""

    slots: int = 0
    slots_wanted: int = 0
    unmet: int = 0
    served_at: float = 0.0
    until: float = 0.0


@dataclass(slots=True)
class Bucket:
    """The state of a key: tokens at a time of the database, in seconds since 1970, and its workers."""

    tokens: float
    at: float
    holders: dict[str, BucketUser] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "at": self.at, "holders": self.holders}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Bucket:
        holders = {worker: BucketUser(*each) for worker, each in values["holders"].items()}
        return cls(values["tokens"], values["at"], holders)

    def idle_at(self, limit: Limit) -> float:
        """When it will be as a new one, unless somebody asks: its row is of no use then."""
        full_in = (limit.capacity - self.tokens) / limit.rate if limit.rate else 0.0
        return max(self.at + full_in, *(holder.until for holder in self.holders.values()), self.at)


def new_bucket(limit: Limit, now: float) -> Bucket:
    return Bucket(limit.capacity, now)


def answer(limit: Limit, bucket: Bucket, worker: str, ask: Ask, now: float) -> Share:
    """Change the bucket by one question of a worker at the database's time `now`; returns its share.

    `until` and `slots_until` are left to the caller, who knows when the question was sent.
    """
    others = {
        name: holder for name, holder in bucket.holders.items() if name != worker and holder.until > now
    }
    mine = bucket.holders.get(worker, BucketUser())
    given, wait, pace = ask.want, 0.0, 0.0
    if limit.rate is not None:
        _fill(limit, bucket, now)
        age = max(now - ask.granted_at, 0.0)
        bucket.tokens = min(limit.capacity, bucket.tokens + max(ask.returned - limit.rate * age, 0.0))
        given, wait, pace = _tokens(limit.rate, bucket.tokens, others, mine, ask.want)
        bucket.tokens -= given
    else:
        bucket.at = now
    slots, held = _slots(limit, worker, others, ask, now)
    served_at = now if given else mine.served_at
    unmet = ask.want - given
    bucket.holders = others
    if held or unmet or ask.slots or given:
        bucket.holders[worker] = BucketUser(held, ask.slots, unmet, served_at, now + SLOT_LIFE)
    return Share(given, slots, now, wait, pace)


def _fill(limit: Limit, bucket: Bucket, now: float) -> None:
    """Add what the bucket gained. A clock that was set back gives nothing twice, but for one step."""
    elapsed = now - bucket.at
    if elapsed >= 0 or elapsed < -1:
        bucket.at = now
    bucket.tokens = min(limit.capacity, bucket.tokens + (limit.rate or 0.0) * max(elapsed, 0.0))


def _tokens(
    rate: float, tokens: float, others: Mapping[str, BucketUser], mine: BucketUser, want: int
) -> tuple[int, float, float]:
    """The tokens that a worker gets, when to ask again, and its pace.

    Workers that wait share what there is by what they want; one that was served longer ago finds at
    least one token.
    """
    if not want:
        return 0, 0.0, rate
    available = math.floor(tokens + 1e-9)
    rivals = [holder for holder in others.values() if holder.unmet]
    unmet = sum(holder.unmet for holder in rivals)
    reserved = sum(holder.served_at < mine.served_at for holder in rivals)
    part = math.ceil(available * want / (want + unmet))
    given = max(0, min(want, part, available - reserved))
    missing = (1 if given else 1 + reserved) - (tokens - given)
    wait = max(missing / rate, 0.0) if given < want else 0.0
    return given, wait, rate * want / (want + unmet)


def _slots(
    limit: Limit, worker: str, others: Mapping[str, BucketUser], ask: Ask, now: float
) -> tuple[int, int]:
    """The slots that a worker may use from now on, and those that it has until its requests end."""
    if limit.concurrent is None:
        return 0, 0
    free = max(limit.concurrent - sum(holder.slots for holder in others.values()), 0)
    slots = min(ask.slots, free)
    if any(holder.slots_wanted > holder.slots for holder in others.values()):
        wanted = {name: holder.slots_wanted for name, holder in others.items()} | {worker: ask.slots}
        slots = min(slots, divided(limit.concurrent, wanted, int(now / TURN))[worker])
    # What is under way is a claim: it takes no more than there is.
    return slots, max(slots, min(ask.in_use, limit.concurrent))


def divided(total: int, wanted: Mapping[str, int], turn: int) -> dict[str, int]:
    """Slots by worker: none gets more than it wants, and the others the same number.

    Those that are left over go to a worker each, to others in each turn.
    """
    found: dict[str, int] = {}
    left = total
    names = sorted(wanted, key=lambda name: wanted[name])
    for place, name in enumerate(names):
        even = left // (len(names) - place)
        if wanted[name] > even:
            # So do all that follow.
            found |= dict.fromkeys(names[place:], even)
            left -= even * (len(names) - place)
            break
        found[name] = wanted[name]
        left -= wanted[name]
    hungry = sorted(name for name in wanted if found[name] < wanted[name])
    for place in range(min(left, len(hungry))):
        found[hungry[(turn + place) % len(hungry)]] += 1
    return found


class BucketLevel(NamedTuple):
    """What is left of a key, and what its workers wait for and hold."""

    tokens: float
    waiting: int
    slots: int


def level(limit: Limit, bucket: Bucket, now: float) -> BucketLevel:
    """The state of a key at a time of the database; changes nothing."""
    gained = (limit.rate or 0.0) * max(now - bucket.at, 0.0)
    current = [holder for holder in bucket.holders.values() if holder.until > now]
    waiting = sum(max(holder.unmet, holder.slots_wanted - holder.slots) for holder in current)
    return BucketLevel(
        min(limit.capacity, bucket.tokens + gained), waiting, sum(holder.slots for holder in current)
    )
