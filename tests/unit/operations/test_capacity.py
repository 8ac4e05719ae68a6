"""What schedules start and keep running over a day."""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from zoneinfo import ZoneInfo

import pytest

from worker.diagnosis.load import DAY, Load, Stream
from worker.model.definitions.triggers import Trigger, parse_schedule

START = datetime(2030, 1, 1, 12, tzinfo=UTC)
NONE = timedelta()
HOUR = timedelta(hours=1)


def trigger(text: str) -> Trigger:
    return parse_schedule(text, ZoneInfo("UTC"))


def load(*streams: Stream, weight: float = 1.0) -> Load:
    made = Load(START)
    for stream in streams:
        made.add(stream, weight)
    return made


def test_what_starts_together_is_at_once_for_as_long_as_it_runs():
    nightly = load(Stream(trigger("0 3 * * *"), 100, NONE, 600.0))

    assert (nightly.at_once().amount, nightly.at_once().second) == (100.0, 15 * 3600)
    assert nightly.starts == 100
    assert nightly.mean == pytest.approx(100 * 600 / DAY)
    assert nightly.starts_a_second().amount == pytest.approx(100 / 60)


def test_a_serial_definition_has_one_run_at_once_however_long_it_lasts():
    serial = load(Stream(trigger("*/10 * * * *"), 1, NONE, 3600.0))
    free = load(Stream(trigger("*/10 * * * *"), 1, NONE, 3600.0, serial=False))

    assert (serial.at_once().amount, serial.mean) == (1.0, pytest.approx(1.0))
    assert (free.at_once().amount, free.mean) == (6.0, pytest.approx(6.0))


def test_a_stream_too_dense_to_walk_is_even():
    dense = load(Stream(trigger("every 1s"), 10, NONE, 0.1))

    assert dense.starts == 10 * DAY
    assert dense.starts_a_second().amount == pytest.approx(10)
    assert dense.at_once().amount == pytest.approx(1.0)


def test_weights_are_added_up():
    assert load(Stream(trigger("0 3 * * *"), 3, NONE, 60.0), weight=100.0).at_once().amount == 300.0


def test_what_is_never_due_makes_nothing():
    never = load(Stream(trigger("at 2031-01-01T00:00:00Z"), 3, NONE, 60.0))

    assert (never.starts, never.mean, never.at_once().amount) == (0.0, 0.0, 0.0)


def test_runs_that_find_no_slot_wait_until_those_before_them_have_ended():
    together = load(Stream(trigger("0 3 * * *"), 30_000, NONE, 10.0))
    # 50 at a time are 600 rounds of ten seconds; the last round waits for 599.
    assert together.longest_wait(50).amount == pytest.approx(5_990)
    assert together.longest_wait(50).second == 15 * 3600 + 10
    assert together.longest_wait(30_000).amount == 0

    spread = load(Stream(trigger("@hourly"), 1_000, HOUR, 60.0))
    assert spread.longest_wait(17).amount == 0
    assert load(Stream(trigger("*/10 * * * *"), 9, NONE, 3600.0, serial=False)).longest_wait(50) == (
        math.inf,
        0,
    )


def test_a_backlog_of_the_evening_is_still_there_in_the_morning():
    late = load(Stream(trigger("59 11 * * *"), 1_000, NONE, 60.0))

    # It is worked off at 10 a second for 100 minutes, across the boundary of the day.
    assert late.longest_wait(10).amount == pytest.approx(990 * 60 / 10)


@pytest.mark.parametrize("seed", range(3))
def test_the_curves_equal_those_counted_second_by_second(seed: int):
    """The oracle walks every second of two days, as the code once did even for no definitions."""
    chance = random.Random(seed)
    streams = [
        Stream(
            trigger(chance.choice(["7 3 * * *", "*/20 11 * * *", "30 * * * *", "59 11,23 * * *"])),
            chance.randrange(1, 500),
            timedelta(seconds=chance.choice([0, 1, 90, 1200])),
            chance.choice([0.3, 5.0, 70.0, 900.0]),
            serial=False,
        )
        for _ in range(4)
    ]
    made = load(*streams)
    slots = made.mean + 20
    changes, starts = [0.0] * (2 * DAY + 1), [0.0] * (2 * DAY + 1)
    for stream in streams:
        width = max(1, round(stream.window.total_seconds()))
        length, amount = max(1, round(stream.seconds)), stream.definitions * min(1.0, stream.seconds)
        for at in trigger_seconds(stream.trigger):
            for step in range(width):
                for day in (0, DAY):
                    begin, end = (min(day + at + step + late, 2 * DAY) for late in (0, length))
                    changes[begin] += amount / width
                    changes[end] -= amount / width
                    starts[min(day + at + step, 2 * DAY)] += stream.definitions / width
    curve = list(accumulate(changes))[DAY : 2 * DAY]
    minutes = [sum(starts[DAY + at : DAY + at + 60]) / 60 for at in range(0, DAY, 60)]
    left, longest = 0.0, 0.0
    for runs in curve * 2:
        left = max(0.0, left + runs - slots)
        longest = max(longest, left / slots)

    # With a window the curve rises over it, and a second is the start of a step.
    assert made.at_once().amount == pytest.approx(max(curve), rel=0.02)
    assert made.starts_a_second().amount == pytest.approx(max(minutes), rel=0.01)
    assert made.longest_wait(slots).amount == pytest.approx(longest, rel=0.05, abs=3)


def trigger_seconds(fires: Trigger) -> list[int]:
    return [int((at - START).total_seconds()) for at in fires.between(START, START + timedelta(days=1))]
