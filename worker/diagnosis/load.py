"""Load: what definitions start and keep running over a day, and how long their runs wait for a slot. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from typing import NamedTuple

from worker.model.definitions.triggers import Trigger

DAY = 86_400
MINUTE = 60
# Scheduled times a day above which a schedule counts as an even stream.
MAX_TIMES = 1_440


@dataclass(frozen=True, slots=True)
class Stream:
    """A number of `definitions` with one trigger; each fires within `window` of it and runs for `seconds`.

    A run of a `serial` one starts only after the last has ended.
    """

    trigger: Trigger
    definitions: int
    window: timedelta
    seconds: float
    serial: bool = True


class Peak(NamedTuple):
    """The highest value, and the second of the day at which it begins."""

    amount: float
    second: int


class _Segment(NamedTuple):
    """A part of a curve between two of its breakpoints, in seconds; it changes by `slope` a second."""

    start: int
    end: int
    value: float
    slope: float


def _curve() -> defaultdict[int, float]:
    # Only seconds at which something changes. Both of two days are the same, so that the second one has
    # what remains of the first.
    return defaultdict(float)


@dataclass(slots=True)
class Load:
    """Starts and concurrent runs of the day from `start`, second by second; runs can weigh bytes."""

    start: datetime
    mean: float = 0.0
    starts: float = 0.0
    # The curve of concurrent runs as its jumps and its changes of slope; starts a second as jumps.
    _jumps: defaultdict[int, float] = field(default_factory=_curve)
    _bends: defaultdict[int, float] = field(default_factory=_curve)
    _rates: defaultdict[int, float] = field(default_factory=_curve)
    _even: float = 0.0
    _even_rate: float = 0.0

    @property
    def end(self) -> datetime:
        """The last moment of the day."""
        return self.start + timedelta(days=1) - timedelta(microseconds=1)

    def add(self, stream: Stream, weight: float = 1.0) -> None:
        """Add a stream, each of its runs with this weight."""
        count = stream.trigger.count(self.start, self.end)
        if not count:
            return
        self.starts += count * stream.definitions
        if count > MAX_TIMES:
            lasting = min(stream.seconds, DAY / count) if stream.serial else stream.seconds
            rate = stream.definitions * count / DAY
            self._even_rate += rate
            self._even += weight * rate * lasting
            self.mean += weight * rate * lasting
            return
        seconds = _seconds(stream.trigger, self.start, self.end)
        for second, following in zip(seconds, [*seconds[1:], seconds[0] + DAY], strict=True):
            gap = float(max(following - second, 1))
            lasting = min(stream.seconds, gap) if stream.serial else stream.seconds
            self.mean += weight * stream.definitions * lasting / DAY
            self._add_runs(second, stream.definitions, round(stream.window.total_seconds()), lasting, weight)

    def at_once(self) -> Peak:
        """The most concurrent runs, by weight."""
        most = Peak(self._even, 0)
        for part in self._parts():
            if part.end > DAY:
                for second in (max(part.start, DAY), part.end - 1):
                    amount = part.value + part.slope * (second - part.start)
                    if amount > most.amount:
                        most = Peak(amount, second - DAY)
        return most

    def starts_a_second(self) -> Peak:
        """The most starts a second, averaged over a minute."""
        minutes: defaultdict[int, float] = defaultdict(float)
        rate, since = 0.0, 0
        for second in sorted({*self._rates, 2 * DAY}):
            self._add_starts(minutes, max(since, DAY), min(second, 2 * DAY), rate)
            rate, since = rate + self._rates.get(second, 0.0), second
        most = Peak(0.0, 0)
        for minute in sorted(minutes):
            if minutes[minute] / MINUTE > most.amount:
                most = Peak(minutes[minute] / MINUTE, minute * MINUTE)
        return Peak(most.amount + self._even_rate, most.second)

    @staticmethod
    def _add_starts(minutes: defaultdict[int, float], start: int, end: int, rate: float) -> None:
        """Add a constant rate from `start` to `end`; of whole minutes, the first stands for all."""
        if rate <= 0 or end <= start:
            return
        start, end = start - DAY, end - DAY
        first, last = start // MINUTE, (end - 1) // MINUTE
        for minute in {first, min(first + 1, last), last}:
            covered = min(end, (minute + 1) * MINUTE) - max(start, minute * MINUTE)
            minutes[minute] += rate * covered

    def longest_wait(self, slots: float) -> Peak:
        """How long runs wait if only `slots` of them run at once: in seconds, and when they wait longest.

        Infinite if the slots are too few on average.
        """
        if self.mean > slots:
            return Peak(math.inf, 0)
        # Seconds of runs that should have been done by then: they are done at `slots` a second.
        left, most = 0.0, Peak(0.0, 0)
        for part in self._parts():
            for end, length, above, slope in _split(part, slots):
                left = max(0.0, left + above * length + slope * length**2 / 2)
                if end > DAY and left > most.amount:
                    most = Peak(left, int(end) % DAY)
        return Peak(most.amount / slots if slots else 0.0, most.second)

    def _parts(self) -> Iterator[_Segment]:
        """The curve of concurrent runs over two days, part by part."""
        value, slope, since = self._even, 0.0, 0
        for second in sorted({*self._jumps, *self._bends, 2 * DAY}):
            if second > since:
                yield _Segment(since, second, value, slope)
            value += slope * (second - since) + self._jumps.get(second, 0.0)
            slope += self._bends.get(second, 0.0)
            since = second

    def _add_runs(self, second: int, count: int, width: int, lasting: float, weight: float) -> None:
        # In whole seconds: a shorter run counts for its part of one.
        length = max(1, round(lasting))
        amount = weight * count * min(1.0, lasting)
        if width <= 1:
            _change(self._jumps, (second, amount), (second + length, -amount))
        else:
            slope = amount / width
            _change(self._bends, (second, slope), (second + width, -slope))
            _change(self._bends, (second + length, -slope), (second + width + length, slope))
        rate = count / max(width, 1)
        _change(self._rates, (second, rate), (second + max(width, 1), -rate))


def _split(part: _Segment, slots: float) -> Iterator[tuple[float, float, float, float]]:
    """A part as (end, length, runs above the slots, slope), split where runs and slots are equal."""
    above, length = part.value - slots, float(part.end - part.start)
    crossing = -above / part.slope if part.slope else 0.0
    if 0.0 < crossing < length:
        yield part.start + crossing, crossing, above, part.slope
        yield part.end, length - crossing, 0.0, part.slope
        return
    yield part.end, length, above, part.slope


def _change(curve: defaultdict[int, float], *changes: tuple[int, float]) -> None:
    for at, change in changes:
        for second in (at, at + DAY):
            if second < 2 * DAY:
                curve[second] += change


@lru_cache(maxsize=8)
def _seconds(trigger: Trigger, start: datetime, until: datetime) -> tuple[int, ...]:
    """The seconds after `start` at which a trigger fires; cached, since several loads take one stream."""
    return tuple(int((at - start).total_seconds()) for at in trigger.between(start, until))
