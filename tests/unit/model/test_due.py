"""Due: what runs, what is skipped and what is next, after any downtime, under every misfire rule."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from itertools import takewhile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.clock import utc
from worker.model.definitions import MisfirePolicy
from worker.model.definitions.triggers import Trigger, parse_schedule, without_dates
from worker.model.definitions.zones import parse_zone
from worker.model.runs import fire as due_module
from worker.model.runs.fire import Due, Span, decide_due, start_deadline

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
SECOND = timedelta(seconds=1)
MIDNIGHT = utc("2030-01-01")


def schedule(text: str, zone: str = "UTC", **bounds: datetime) -> Trigger:
    return parse_schedule(text, parse_zone(zone), **bounds)


def decide(text: str, *, first: str, now: str, spread: timedelta = timedelta(0), **policy: Any) -> Due:
    return decide_due(schedule(text), MisfirePolicy(**policy), first=utc(first), now=utc(now), spread=spread)


# Schedule, next instant and now, in January 2030; the policy; what runs, the skips, and what is next.
QUARTER = {"spread": timedelta(minutes=15), "mode": "skip"}
DECISIONS: dict[str, tuple[str, str, str, dict[str, Any], list[str], list[tuple[str, str, int]], str]] = {
    "just come": ("0 * * * *", "01T01:00", "01T01:00:00.2", {}, ["01T01:00"], [], "01T02:00"),
    "not yet": ("0 * * * *", "01T01:00", "01T00:59:59.999999", {}, [], [], "01T01:00"),
    "three hours down": (
        *("0 * * * *", "01T01:00", "01T03:30", {}),
        *(["01T03:00"], [("01T01:00", "01T02:00", 2)], "01T04:00"),
    ),
    "one on time stands for the missed": (
        *("0 * * * *", "01T01:00", "01T03:00:10", {}),
        *(["01T03:00"], [("01T01:00", "01T02:00", 2)], "01T04:00"),
    ),
    "skip runs what is on time": (
        *("* * * * *", "01T00:00", "01T00:05:30", {"mode": "skip", "grace": timedelta(seconds=60)}),
        *(["01T00:05"], [("01T00:00", "01T00:04", 5)], "01T00:06"),
    ),
    "late by the grace": ("0 0 * * *", "02", "02T00:01:00", {"mode": "skip"}, ["02"], [], "03"),
    "later": ("0 0 * * *", "02", "02T00:01:00.000001", {"mode": "skip"}, [], [("02", "02", 1)], "03"),
    "a day is within a daily period": ("0 3 * * *", "01T03:00", "02T02:59", {}, ["01T03:00"], [], "02T03:00"),
    "not within": (
        *("0 3 * * *", "01T03:00", "01T05:00", {"within": HOUR}),
        *([], [("01T03:00", "01T03:00", 1)], "02T03:00"),
    ),
    # Nothing comes after it that could stand for it.
    "single": ("at 2030-01-01T03:00:00Z", "01T03:00", "20T00:00", {}, ["01T03:00"], [], ""),
    "spread, early": ("0 * * * *", "01T01:00", "01T01:14:59", QUARTER, [], [], "01T01:00"),
    "spread, on time": ("0 * * * *", "01T01:00", "01T01:16:00", QUARTER, ["01T01:00"], [], "01T02:00"),
    "spread, late": (
        *("0 * * * *", "01T01:00", "01T01:16:01", QUARTER),
        *([], [("01T01:00", "01T01:00", 1)], "01T02:00"),
    ),
    "spans end at midnight": (
        *("0 */6 * * *", "01T12:00", "03T07:00", {"mode": "skip"}, []),
        [("01T12:00", "01T18:00", 2), ("02T00:00", "02T18:00", 4), ("03T00:00", "03T06:00", 2)],
        "03T12:00",
    ),
    "a clock set back": ("0 * * * *", "01T05:00", "01T03:30", {}, [], [], "01T05:00"),
    # New zone data moved 03:00 local; the instant stored under the old data does not exist any more.
    "changed rules": ("0 3 * * *", "01T02:00", "01T02:00:01", {}, [], [], "01T03:00"),
}


@pytest.mark.parametrize("case", DECISIONS)
def test_what_runs_what_is_skipped_and_what_is_next(case: str):
    text, first, now, policy, runs, skipped, following = DECISIONS[case]

    due = decide(text, first=f"2030-01-{first}", now=f"2030-01-{now}", **policy)

    assert due.runs == [utc(f"2030-01-{run}") for run in runs]
    assert due.skipped == [
        Span(utc(f"2030-01-{begin}"), utc(f"2030-01-{end}"), count) for begin, end, count in skipped
    ]
    assert due.next == (utc(f"2030-01-{following}") if following else None)


@pytest.mark.parametrize(
    ("policy", "runs", "skips"),
    [
        ({"mode": "once"}, 1, 17),
        ({"mode": "all", "limit": 5}, 5, 13),
        ({"mode": "all"}, 6, 12),
        ({"mode": "all", "within": timedelta(hours=3)}, 18, 0),
        ({"mode": "skip"}, 0, 18),
    ],
)
def test_three_hours_without_a_worker(policy, runs, skips):
    """`*/10`, stopped from 00:05 to 03:05: 18 instants, by default none older than an hour runs."""
    due = decide("*/10 * * * *", first="2030-01-01T00:10", now="2030-01-01T03:05", **policy)

    assert len(due.runs) == runs
    assert sum(span.count for span in due.skipped) == skips
    assert due.next == utc("2030-01-01T03:10")


@pytest.mark.parametrize("text", ["* * * * * *", "every 1s"])
def test_a_week_of_missed_seconds_is_counted_and_not_walked(text, monkeypatch):
    """604,800 instants become eight rows, by asking the trigger a few dozen times."""
    asked = 0
    after = Trigger.after

    def counted(self: Trigger, *args: Any, **kw: Any) -> datetime | None:
        nonlocal asked
        asked += 1
        return after(self, *args, **kw)

    monkeypatch.setattr(Trigger, "after", counted)

    due = decide(text, first="2030-01-01T12:00", now="2030-01-08T12:00", grace=timedelta(0))

    assert due.runs == [utc("2030-01-08T12:00")]
    assert len(due.skipped) == 8
    assert sum(span.count for span in due.skipped) == 604_800
    assert due.skipped[1] == Span(utc("2030-01-02"), utc("2030-01-02T23:59:59"), 86_400)
    assert asked < 40


def test_more_runs_than_one_call_takes_are_left_to_the_next():
    """An enormous backlog never wedges: each call takes its part, oldest first, and comes back at once."""
    policy: dict[str, Any] = {"mode": "all", "limit": 2500, "within": timedelta(days=1)}
    first = decide("* * * * * *", first="2030-01-01T00:00", now="2030-01-01T01:00", **policy)

    assert first.next is not None
    second = decide("* * * * * *", first=first.next.isoformat(), now="2030-01-01T01:00:01", **policy)

    assert [len(first.runs), len(second.runs)] == [1000, 1000]
    assert first.runs[0] == utc("2030-01-01T00:17:20")
    assert second.runs[0] == first.next == first.runs[-1] + SECOND
    assert second.skipped == []


def test_nothing_more_is_due_after_ends_at():
    trigger = schedule("0 * * * *", ends_at=utc("2030-01-01T02:00"))

    due = decide_due(trigger, MisfirePolicy(), first=utc("2030-01-01T01:00"), now=utc("2030-01-01T05:00"))

    assert due == Due([], [Span(utc("2030-01-01T01:00"), utc("2030-01-01T01:00"), 1)], None)


def without(text: str, *dates: str, zone: str = "UTC") -> Trigger:
    return without_dates(schedule(text, zone), tuple(map(date.fromisoformat, dates)), parse_zone(zone))


def test_what_is_due_on_a_date_of_the_calendar_is_a_skip_of_its_own():
    trigger = without("0 3 * * *", "2030-01-01")
    first = utc("2030-01-01T03:00")

    due = decide_due(trigger, MisfirePolicy(), first=first, now=first)

    assert due == Due([], [Span(first, first, 1, "calendar")], utc("2030-01-02T03:00"))


def test_the_next_instant_is_decided_when_it_comes_though_the_calendar_will_skip_it():
    """Else nothing would count it: a skip is written when its time has come, not before."""
    trigger = without("0 3 * * *", "2030-01-02", "2030-01-03")

    due = decide_due(trigger, MisfirePolicy(), first=utc("2030-01-01T03:00"), now=utc("2030-01-01T03:00"))

    assert due == Due([utc("2030-01-01T03:00")], [], utc("2030-01-02T03:00"))


def test_a_missed_instant_before_a_holiday_still_runs_after_it():
    """The misfire policy does not see the holiday: nothing that runs has come since."""
    trigger = without("0 3 * * *", "2030-01-02", "2030-01-03")

    due = decide_due(trigger, MisfirePolicy(), first=utc("2030-01-01T03:00"), now=utc("2030-01-03T12:00"))

    assert due.runs == [utc("2030-01-01T03:00")]
    assert due.skipped == [
        Span(utc("2030-01-02T03:00"), utc("2030-01-02T03:00"), 1, "calendar"),
        Span(utc("2030-01-03T03:00"), utc("2030-01-03T03:00"), 1, "calendar"),
    ]
    assert due.next == utc("2030-01-04T03:00")


def test_spans_end_where_the_local_date_does():
    """Berlin's New Year's Day is from 23:00 to 23:00 UTC."""
    trigger = without("0 * * * *", "2030-01-01", zone="Europe/Berlin")

    due = decide_due(
        trigger, MisfirePolicy("skip"), first=utc("2029-12-31T21:00"), now=utc("2030-01-02T00:30")
    )

    assert due.skipped == [
        Span(utc("2029-12-31T21:00"), utc("2029-12-31T22:00"), 2, "missed"),
        Span(utc("2029-12-31T23:00"), utc("2029-12-31T23:00"), 1, "calendar"),
        Span(utc("2030-01-01T00:00"), utc("2030-01-01T22:00"), 23, "calendar"),
        Span(utc("2030-01-01T23:00"), utc("2030-01-01T23:00"), 1, "missed"),
        Span(utc("2030-01-02T00:00"), utc("2030-01-02T00:00"), 1, "missed"),
    ]


def test_a_call_that_leaves_runs_to_the_next_decides_no_later_holiday():
    trigger = without("* * * * *", "2030-01-02")
    policy = MisfirePolicy("all", within=timedelta(days=9), limit=9000)

    due = decide_due(trigger, policy, first=utc("2030-01-01T00:00"), now=utc("2030-01-04T00:00:30"))

    assert (len(due.runs), due.skipped, due.next) == (1000, [], utc("2030-01-01T16:40"))


def test_a_run_before_a_holiday_may_start_until_the_next_one_that_runs():
    assert start_deadline(without("0 3 * * *", "2030-01-02"), utc("2030-01-01T03:00"), None) == 2 * DAY


def test_the_start_deadline_reaches_to_the_next_instant_but_at_least_an_hour():
    assert start_deadline(schedule("0 3 * * *"), utc("2030-01-01T03:00"), None) == timedelta(days=1)
    assert start_deadline(schedule("* * * * *"), MIDNIGHT, None) == HOUR
    assert start_deadline(schedule("* * * * *"), MIDNIGHT, SECOND) == SECOND
    assert start_deadline(schedule("at 2030-01-01T00:00:00Z"), MIDNIGHT, None) is None


# --- properties ---

calendars = st.lists(
    st.sampled_from(["2026-03-28", "2026-03-29", "2026-10-24", "2026-10-25", "2026-04-04", "2026-04-05"]),
    max_size=3,
)

schedules = st.sampled_from(
    [
        ("* * * * * *", "UTC"),
        ("*/10 * * * *", "Europe/Berlin"),
        ("0 */6 * * *", "Australia/Lord_Howe"),
        ("30 2 * * *", "Europe/Berlin"),
        ("0 0 1 * *", "America/New_York"),
        ("every 7s", "UTC"),
        ("every 1h30m", "UTC"),
        ("at 2026-03-29T01:10:00Z", "UTC"),
    ]
)
starts = st.sampled_from(["2026-03-28T22:30", "2026-10-24T23:59:50", "2026-04-04T14:00"]).map(utc)
durations = st.one_of(
    st.integers(0, 90).map(lambda n: timedelta(seconds=n)),
    st.integers(0, 90).map(lambda n: timedelta(minutes=n)),
)
policies = st.builds(
    MisfirePolicy,
    mode=st.sampled_from(["once", "skip", "all"]),
    grace=durations,
    within=st.none() | durations,
    limit=st.integers(1, 60),
)
# Now as it moves from call to call: mostly on, sometimes back.
moves = st.lists(st.integers(-600, 3000).map(lambda n: timedelta(seconds=n)), min_size=1, max_size=6)


def local_date(at: datetime, zone: str) -> str:
    return at.astimezone(parse_zone(zone)).date().isoformat()


@settings(deadline=None)
@given(schedules, calendars, starts, policies, durations, moves)
def test_every_instant_due_runs_or_is_counted_once_and_none_early(where, dates, start, policy, spread, steps):
    """Whatever the policy and however the clock moves: instants due = runs + skip counts, per UTC day."""
    text, zone = where
    calendar = without(text, *dates, zone=zone)
    trigger = calendar.nominal
    first = trigger.after(start, inclusive=True)
    begun, now, runs, skipped = first, start, [], []
    for step in steps:
        now += step
        if first is None:
            break
        due = decide_due(calendar, policy, first=first, now=now, spread=spread)
        assert all(instant + spread <= now for instant in due.runs)
        assert not [instant for instant in due.runs if local_date(instant, zone) in dates]
        assert all(span.skipped_until + spread <= now for span in due.skipped)
        runs += due.runs
        skipped += due.skipped
        first = due.next

    for span in skipped:
        assert span.skipped_from.date() == span.skipped_until.date()
        within = list(trigger.between(span.skipped_from, span.skipped_until))
        assert len(within) == span.count
        closed = {local_date(instant, zone) in dates for instant in within}
        assert closed == {span.reason == "calendar"}
    walked = [
        instant for span in skipped for instant in trigger.between(span.skipped_from, span.skipped_until)
    ]
    decided = list(
        takewhile(lambda instant: first is None or instant < first, trigger.occurrences(begun or now))
    )
    assert sorted(runs + walked) == decided


@settings(deadline=None)
@given(
    schedules,
    calendars,
    starts,
    policies,
    durations,
    st.integers(0, 7200).map(lambda n: timedelta(seconds=n)),
)
def test_the_decision_equals_the_rule_applied_to_a_list(where, dates, start, policy, spread, downtime):
    """The counted decision is the one that the written rule gives when every instant is listed."""
    text, zone = where
    trigger, now = without(text, *dates, zone=zone), start + downtime
    first = trigger.nominal.after(start, inclusive=True)
    if first is None:
        return

    due = decide_due(trigger, policy, first=first, now=now, spread=spread)

    listed = [instant for instant in trigger.between(first, now) if instant + spread <= now]
    late = {instant: now - instant - spread for instant in listed}
    missed = [instant for instant in listed if late[instant] > policy.grace]
    on_time = [instant for instant in listed if late[instant] <= policy.grace]
    if policy.within is not None:
        within = policy.within
    elif missed:
        following = trigger.after(missed[-1])
        within = timedelta.max if following is None else max(HOUR, following - missed[-1])
    chosen = {"once": [] if on_time else missed[-1:], "skip": [], "all": missed[-policy.limit :]}[policy.mode]
    expected = [instant for instant in chosen if late[instant] <= within] + on_time
    assert due.runs == expected[: due_module.MAX_RUNS]
    if len(expected) <= due_module.MAX_RUNS:
        missed = [span.count for span in due.skipped if span.reason == "missed"]
        assert sum(missed) == len(listed) - len(expected)
