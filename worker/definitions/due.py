"""Due: which instants of a definition become runs now, which are skipped, and which comes next. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, time, timedelta
from typing import Literal

from worker.definitions.policies import LEAST_PATIENCE, MisfirePolicy
from worker.definitions.triggers import Trigger

# More runs than this are left to the next call, which comes at once.
MOST_RUNS = 1000
_DAY = timedelta(days=1)
_INSTANT = timedelta(microseconds=1)
_NO_TIME = timedelta(0)


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive instants that do not become runs: both ends inclusive, within one UTC day."""

    skipped_from: datetime
    skipped_until: datetime
    count: int
    reason: Literal["missed"] = "missed"


@dataclass(frozen=True, slots=True)
class Due:
    """What is due: instants that run, oldest first; spans before them that do not; the next, or None."""

    runs: list[datetime] = field(default_factory=list)
    skipped: list[Span] = field(default_factory=list)
    next: datetime | None = None


def decide_due(
    trigger: Trigger, policy: MisfirePolicy, *, first: datetime, now: datetime, spread: timedelta = _NO_TIME
) -> Due:
    """Decide every instant from `first`, inclusive, that has come by `now`.

    An instant comes `spread` after it is named, and its lateness counts from then.
    Ranges are counted, never walked: a week of missed seconds costs no more than an
    hour. `next` is the first instant not decided here.
    """
    newest = trigger.last(first, now - spread)
    if newest is None:
        return Due(next=trigger.after(first, inclusive=True))
    run_from = _first_to_run(trigger, policy, first, newest, now - spread)
    skipped = _spans(trigger, first, newest if run_from is None else run_from - _INSTANT)
    if run_from is None:
        return Due(skipped=skipped, next=trigger.after(newest))
    runs: list[datetime] = []
    for instant in trigger.instants(run_from):
        if instant > newest or len(runs) == MOST_RUNS:
            return Due(runs, skipped, instant)
        runs.append(instant)
    return Due(runs, skipped)


def start_deadline(trigger: Trigger, instant: datetime, setting: timedelta | None) -> timedelta | None:
    """How long after it became available the run of `instant` may start: the setting, else the
    distance to the schedule's next instant, at least an hour; None, for ever, where there is no next."""
    if setting is not None:
        return setting
    period = trigger.period(instant)
    return None if period is None else max(period, LEAST_PATIENCE)


def _first_to_run(
    trigger: Trigger, policy: MisfirePolicy, first: datetime, newest: datetime, until: datetime
) -> datetime | None:
    """The oldest instant that runs; all after it run too. `until` is now, less the spread."""
    on_time = trigger.after(max(first, until - policy.grace), inclusive=True)
    if on_time is not None and on_time > newest:
        on_time = None
    if policy.mode == "skip" or (policy.mode == "once" and on_time is not None):
        return on_time
    missed = newest if on_time is None else trigger.last(first, on_time - _INSTANT)
    if missed is None:
        return on_time
    within = policy.within
    if within is None:
        period = trigger.period(missed)
        within = until - first if period is None else max(period, LEAST_PATIENCE)
    oldest = trigger.newest(max(first, until - within), missed, 1 if policy.mode == "once" else policy.limit)
    return oldest or on_time


def _spans(trigger: Trigger, first: datetime, until: datetime) -> list[Span]:
    spans = []
    start = trigger.after(first, inclusive=True)
    while start is not None and start <= until:
        midnight = datetime.combine(start.date(), time(), tzinfo=start.tzinfo) + _DAY
        last = trigger.last(start, min(until, midnight - _INSTANT)) or start
        spans.append(Span(start, last, trigger.count(start, last)))
        start = trigger.after(last)
    return spans
