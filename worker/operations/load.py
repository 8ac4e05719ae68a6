"""Load: how much schedules start and keep running over a day, second by second. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from itertools import accumulate

from worker.definitions.triggers import Trigger

DAY = 86_400
# Instants a day above which a schedule is taken as an even stream: it is walked no further.
MOST_INSTANTS = 1_440


@dataclass(frozen=True, slots=True)
class Stream:
    """So many `definitions` with one trigger, each firing within `window` of it and running for `seconds`.

    Of a `serial` one no run begins before the last has ended.
    """

    trigger: Trigger
    definitions: int
    window: timedelta
    seconds: float
    serial: bool = True


@dataclass(frozen=True, slots=True)
class Peak:
    """The most there is of something, and the second of the day at which that begins."""

    amount: float
    second: int


@dataclass(slots=True)
class Load:
    """Starts and runs at once of the day that begins at `start`; a run may weigh more than 1: its bytes."""

    start: datetime
    mean: float = 0.0
    starts: float = 0.0
    # What happens to the two curves at a second: a jump, or a change of the slope. Two days, the same
    # twice, so that the second one has what is left of the first one's runs.
    _jumps: list[float] = field(default_factory=lambda: [0.0] * (2 * DAY + 1))
    _bends: list[float] = field(default_factory=lambda: [0.0] * (2 * DAY + 1))
    _rates: list[float] = field(default_factory=lambda: [0.0] * (DAY + 1))
    _even: float = 0.0
    _even_rate: float = 0.0

    def add(self, stream: Stream, weight: float = 1.0) -> None:
        """Count a stream in, each of its runs as `weight`."""
        count = stream.trigger.count(self.start, self.end)
        if not count:
            return
        self.starts += count * stream.definitions
        if count > MOST_INSTANTS:
            lasting = min(stream.seconds, DAY / count) if stream.serial else stream.seconds
            self._even_rate += stream.definitions * count / DAY
            self._even += weight * stream.definitions * count / DAY * lasting
            self.mean += weight * stream.definitions * count / DAY * lasting
            return
        for second, gap in _with_gaps(_seconds(stream.trigger, self.start, self.end)):
            lasting = min(stream.seconds, gap) if stream.serial else stream.seconds
            self.mean += weight * stream.definitions * lasting / DAY
            self._put(second, stream.definitions, stream.window.total_seconds(), lasting, weight)

    def at_once(self) -> Peak:
        """The most at once, by weight."""
        slopes = accumulate(self._bends)
        curve = accumulate(jump + slope for jump, slope in zip(self._jumps, [0.0, *slopes], strict=False))
        day = list(curve)[DAY : 2 * DAY]
        second = max(range(DAY), key=day.__getitem__)
        return Peak(day[second] + self._even, second)

    def starts_a_second(self) -> Peak:
        """The most starts a second, of the mean of a minute."""
        rates = list(accumulate(self._rates[:DAY]))
        minutes = [sum(rates[begin : begin + 60]) / 60 for begin in range(0, DAY, 60)]
        minute = max(range(len(minutes)), key=minutes.__getitem__)
        return Peak(minutes[minute] + self._even_rate, minute * 60)

    @property
    def end(self) -> datetime:
        """The last instant of the day, which counts still."""
        return self.start + timedelta(days=1) - timedelta(microseconds=1)

    def _put(self, second: int, count: int, window: float, lasting: float, weight: float) -> None:
        # Whole seconds: a run that is shorter takes the part of one that it needs.
        width, length = round(window), max(1, round(lasting))
        amount = weight * count * min(1.0, lasting)
        for begin in (second, second + DAY):
            if width <= 1:
                _add(self._jumps, begin, amount)
                _add(self._jumps, begin + length, -amount)
                continue
            slope = amount / width
            for at, change in ((0, slope), (width, -slope), (length, -slope), (width + length, slope)):
                _add(self._bends, begin + at, change)
        rate = count / max(width, 1)
        for at, change in ((second, rate), (second + max(width, 1), -rate)):
            _add(self._rates, at, change)
        if second + width > DAY:
            # What spills over midnight stands at the beginning: every day is like this one.
            self._rates[0] += rate
            _add(self._rates, second + width - DAY, -rate)


@lru_cache(maxsize=8)
def _seconds(trigger: Trigger, start: datetime, until: datetime) -> tuple[int, ...]:
    """At which seconds after `start` the instants are; one stream is counted in by several loads."""
    return tuple(int((at - start).total_seconds()) for at in trigger.between(start, until))


def _add(values: list[float], at: int, change: float) -> None:
    if at < len(values):
        values[at] += change


def _with_gaps(seconds: tuple[int, ...]) -> Iterable[tuple[int, float]]:
    """Each instant with the time to the next one; the last one's next is the first of the day after."""
    following = [*seconds[1:], seconds[0] + DAY]
    return ((at, float(max(after - at, 1))) for at, after in zip(seconds, following, strict=True))
