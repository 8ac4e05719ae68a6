"""What becomes of instants that came while no worker was up, and of those that met a run."""

from __future__ import annotations

from datetime import timedelta

import pytest

from tests.fakes.clock import utc
from tests.fakes.timeline import Timeline, days

HOUR = timedelta(hours=1)


@pytest.fixture
def stopped(timeline: Timeline) -> Timeline:
    """A worker stops at 09:55:30 and is up again at 12:55:30: eighteen instants of `*/10` later."""
    timeline.clock.set(utc("2030-01-01T09:55:30"))
    return timeline


def away(timeline: Timeline, hours: int = 3) -> None:
    timeline.clock.advance(hours * HOUR)


def test_once_runs_the_newest_instant_late_and_counts_the_others(stopped: Timeline) -> None:
    stopped.define(schedule="*/10 * * * *")
    away(stopped)
    stopped.fire()

    (run,) = stopped.runs()
    (skip,) = stopped.skips()
    assert run["scheduled_for"] == utc("2030-01-01T12:50")
    assert run["created_at"] == utc("2030-01-01T12:55:30")
    assert (skip["count"], skip["reason"]) == (17, "missed")
    assert (skip["skipped_from"], skip["skipped_until"]) == (
        utc("2030-01-01T10:00"),
        utc("2030-01-01T12:40"),
    )


def test_all_with_a_limit_runs_the_newest_so_many(stopped: Timeline) -> None:
    stopped.define(
        schedule="*/10 * * * *", misfire="all", misfire_limit=5, misfire_within=3 * HOUR, overlap="allow"
    )
    away(stopped)
    stopped.fire()

    assert len(stopped.runs()) == 5
    assert stopped.instants()[0] == utc("2030-01-01T12:10")
    assert stopped.skipped() == {"missed": 13}


def test_all_runs_none_that_is_older_than_within(stopped: Timeline) -> None:
    stopped.define(schedule="*/10 * * * *", misfire="all", overlap="allow")
    away(stopped)
    stopped.fire()

    assert stopped.instants()[0] == utc("2030-01-01T12:00")
    assert (len(stopped.runs()), stopped.skipped()) == (6, {"missed": 12})


def test_skip_runs_none(stopped: Timeline) -> None:
    stopped.define(schedule="*/10 * * * *", misfire="skip")
    away(stopped)
    stopped.fire()

    assert stopped.runs() == []
    assert stopped.skipped() == {"missed": 18}


def test_an_edit_at_hour_two_loses_nothing(stopped: Timeline) -> None:
    """Twelve instants of the old revision until the edit, and those of the new one after it."""
    stopped.define(schedule="*/10 * * * *")
    away(stopped, 2)
    stopped.define(schedule="*/15 * * * *")
    away(stopped, 1)
    stopped.fire()

    (run,) = stopped.runs()
    assert (run["scheduled_for"], run["revision"]) == (utc("2030-01-01T11:50"), 1)
    # The run of 11:50 still waits when that of 12:45 comes.
    assert [(skip["count"], skip["reason"], skip["revision"]) for skip in stopped.skips()] == [
        (11, "missed", 1),
        (3, "missed", 2),
        (1, "overlap", 2),
    ]
    assert stopped.accounted() == {utc("2030-01-01").date(): 12 + 4}


def test_a_pause_replays_nothing(stopped: Timeline) -> None:
    stopped.define(schedule="*/10 * * * *")
    stopped.fire_until(utc("2030-01-01T10:25"))
    stopped.define(schedule="*/10 * * * *", enabled=False)
    away(stopped)
    stopped.fire()
    stopped.define(schedule="*/10 * * * *")
    stopped.fire_until(utc("2030-01-01T13:35"))

    assert stopped.accounted() == {utc("2030-01-01").date(): 3 + 1}


def test_a_week_of_missed_seconds_is_counted_and_not_walked(timeline: Timeline) -> None:
    timeline.clock.set(utc("2030-01-01T12:00:00.5"))
    timeline.define(schedule="every 1s", spread="off")
    timeline.clock.advance(timedelta(days=7))
    timeline.fire()

    # One row a day; those of the last minute are on time, and met the first of them.
    assert [skip["reason"] for skip in timeline.skips()] == ["missed"] * 8 + ["overlap"]
    assert sum(timeline.accounted().values()) == 7 * 86400
    assert len(timeline.runs()) == 1


@pytest.fixture
def each_second(timeline: Timeline) -> Timeline:
    timeline.clock.set(utc("2030-01-01T11:59:59.5"))
    return timeline


def hour_long_job(timeline: Timeline, overlap: str, *, watched: timedelta = HOUR) -> None:
    """The first run starts, and goes on while instants come."""
    timeline.define(schedule="every 1s", spread="off", overlap=overlap)
    timeline.fire_until(utc("2030-01-01T12:00:00.2"))
    timeline.start()
    timeline.fire_until(utc("2030-01-01T11:59:59.9") + watched)


def test_minutes_of_skipped_seconds_are_one_row_that_grows(each_second: Timeline) -> None:
    hour_long_job(each_second, "skip", watched=timedelta(minutes=10))

    assert [run["scheduled_for"] for run in each_second.runs()] == [utc("2030-01-01T12:00")]
    (skip,) = each_second.skips()
    assert (skip["count"], skip["reason"]) == (599, "overlap")


def test_queue_one_holds_exactly_one(each_second: Timeline) -> None:
    hour_long_job(each_second, "queue_one", watched=timedelta(minutes=5))

    assert each_second.instants() == [utc("2030-01-01T12:00"), utc("2030-01-01T12:00:01")]
    assert each_second.skipped() == {"overlap": 298}
    assert each_second.start() == []
    (first,) = each_second.running
    each_second.end(first)
    assert [run.scheduled_for for run in each_second.start()] == [utc("2030-01-01T12:00:01")]


def test_replace_ends_the_old_one_before_the_newest_starts(each_second: Timeline) -> None:
    each_second.define(schedule="every 1s", spread="off", overlap="replace")
    each_second.fire_until(utc("2030-01-01T12:00:00.2"))
    each_second.start()
    each_second.fire_until(utc("2030-01-01T12:00:10.2"))

    assert each_second.start() == []
    (first,) = each_second.running
    each_second.end(first, "cancelled", reason="replaced", result=None)
    assert [run.scheduled_for for run in each_second.start()] == [utc("2030-01-01T12:00:10")]
    assert each_second.skips() == []
    states = [(run["state"], run["reason"]) for run in each_second.runs()]
    assert states == [("cancelled", "replaced")] * 10 + [(None, None)]


@pytest.mark.parametrize("overlap", ["allow", "skip"])
def test_a_clock_that_goes_back_decides_nothing_twice(timeline: Timeline, overlap: str) -> None:
    """Nor does an edit while it is back: runs and skips of the hour that comes again stay as they are."""
    timeline.clock.set(utc("2030-01-01T10:00:30"))
    timeline.define(schedule="*/10 * * * *", overlap=overlap)
    timeline.fire_until(utc("2030-01-01T12:05"))
    decided = timeline.instants(), timeline.skipped()

    timeline.clock.set(utc("2030-01-01T11:05"))
    timeline.fire()
    timeline.define(schedule="*/10 * * * *", overlap=overlap, priority=1)
    timeline.fire_until(utc("2030-01-01T12:09"))
    assert (timeline.instants(), timeline.skipped()) == decided

    timeline.fire_until(utc("2030-01-01T12:30"))
    assert timeline.accounted() == {utc("2030-01-01").date(): 15}


def test_a_clock_that_goes_forward_is_a_downtime(timeline: Timeline) -> None:
    timeline.clock.set(utc("2030-01-01T10:00:30"))
    timeline.define(schedule="*/10 * * * *", overlap="allow")
    timeline.fire_until(utc("2030-01-01T10:35"))

    timeline.clock.set(utc("2030-01-01T12:35"))
    timeline.fire()

    assert timeline.instants()[-2:] == [utc("2030-01-01T10:30"), utc("2030-01-01T12:30")]
    assert timeline.skipped() == {"missed": 11}
    assert timeline.accounted() == dict(days(utc(f"2030-01-01T{h}:{m}0") for h, m in tens("10:1", "12:3")))


def tens(first: str, last: str) -> list[tuple[str, str]]:
    """Hours and tens of minutes from `first` to `last`, both included."""
    start, end = (int(text[:2]) * 6 + int(text[3]) for text in (first, last))
    return [(f"{at // 6:02}", str(at % 6)) for at in range(start, end + 1)]
