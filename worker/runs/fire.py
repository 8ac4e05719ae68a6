"""Fire: which scheduled times are due, spread, missed or skipped; and a preview of the next ones. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, time, timedelta
from hashlib import blake2b
from itertools import islice
from typing import Any, Literal

from worker.definitions.definition import Definition, Spread, from_spec
from worker.definitions.policies import LEAST_PATIENCE, MisfirePolicy
from worker.definitions.triggers import EveryTrigger, Trigger
from worker.definitions.units import format_duration
from worker.ids import DefinitionId, OrgId, RunId, new_id
from worker.runs.run import Decision, DueDefinition, Isolation, NewRun, NewSkip, NextFire

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


# However long the period, a spread of its own accord delays by less than this.
WIDEST = timedelta(hours=1)
_NONE = timedelta(0)


def spread_of(
    org_code: str, name: str, schedule: str, trigger: Trigger, setting: Spread = "auto"
) -> timedelta:
    """The delay of a definition, the same on every machine and after every restart.

    `auto` spreads `every` and `@…` over their period, at most an hour, and leaves
    crontab lines and `at` alone; a duration spreads any schedule over that long.
    """
    window = window_of(schedule, trigger, setting)
    if not window:
        return _NONE
    digest = blake2b(f"{org_code}\0{name}".encode(), digest_size=8).digest()
    return timedelta(milliseconds=window // timedelta(milliseconds=1) * int.from_bytes(digest) >> 64)


def window_of(schedule: str, trigger: Trigger, setting: Spread = "auto") -> timedelta:
    """Over how long the orgs' delays are spread; zero where all fire at the instant itself."""
    if setting != "auto":
        return _NONE if setting == "off" else setting
    if isinstance(trigger, EveryTrigger):
        return min(trigger.interval, WIDEST)
    return WIDEST if schedule.strip().startswith("@") else _NONE


IsolationOf = Callable[[str], Isolation]


def decide(due: DueDefinition, now: datetime, isolation_of: IsolationOf) -> Decision:
    """Decide every instant of a definition that has come by `now`.

    `isolation_of` says where a handler wants to run when the definition does not say.

    Raises:
        DefinitionError: the stored spec or zone is not understood by this version.
    """
    definition = from_spec(due.org_code, due.name, due.spec)
    trigger = definition.trigger(due.org_timezone)
    spread = spread_of(due.org_code, due.name, definition.schedule, trigger, definition.spread)
    what = decide_due(
        trigger, definition.misfire_policy, first=due.next_scheduled_for, now=now, spread=spread
    )
    return Decision(
        runs=[_run(due, definition, trigger, instant, spread, now, isolation_of) for instant in what.runs],
        skips=[
            NewSkip(
                due.org_id,
                due.definition_id,
                due.revision,
                span.skipped_from,
                span.skipped_until,
                span.count,
                span.reason,
            )
            for span in what.skipped
        ],
        next=next_fire(due, what.next, spread),
    )


def next_fire(due: DueDefinition, instant: datetime | None, spread: timedelta) -> NextFire:
    """When the definition fires for its next instant."""
    return NextFire(due.definition_id, instant, None if instant is None else instant + spread)


def _run(
    due: DueDefinition,
    definition: Definition,
    trigger: Trigger,
    instant: datetime,
    spread: timedelta,
    now: datetime,
    isolation_of: IsolationOf,
) -> NewRun:
    run_id = RunId(new_id())
    available_at = instant + spread
    patience = start_deadline(trigger, instant, definition.start_deadline)
    return NewRun(
        id=run_id,
        org_id=due.org_id,
        definition_id=due.definition_id,
        revision=due.revision,
        handler=definition.handler,
        origin="schedule",
        scheduled_for=instant,
        available_at=available_at,
        idempotency_key=run_id,
        isolation=definition.isolation or isolation_of(definition.handler),
        serial=definition.serial,
        overlap=definition.overlap,
        priority=definition.priority,
        variant_handlers=definition.handlers if definition.variants else (),
        max_concurrent=definition.max_concurrent,
        # A missed instant that runs all the same is patient from now on, not from when it was missed.
        start_by=None if patience is None else max(available_at, now) + patience,
    )


Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Upcoming:
    """An instant, and what is particular about it; `note` is empty where it simply runs then."""

    scheduled_for: datetime
    note: str


class Preview:
    """Of a row of `definitions show`, with its `unfinished` serial runs (id and state), as of `now`."""

    def __init__(self, row: Row, unfinished: Sequence[Row], now: datetime) -> None:
        self._row = row
        self._now = now
        self._definition = from_spec(row["org"], row["name"], row["spec"])
        self._trigger = self._definition.trigger(row["timezone"])
        self._spread = spread_of(
            row["org"], row["name"], self._definition.schedule, self._trigger, self._definition.spread
        )
        self._overdue = self._decided()
        self._meets = _Overlaps(self._definition, unfinished)

    def instants(self, start: datetime | None, count: int) -> list[Upcoming]:
        """The first `count` instants from `start` on; without it from what is due, or from now."""
        first = self._row["next_scheduled_for"]
        if start is None:
            start = self._now if first is None else min(first, self._now)
        return [
            Upcoming(instant, self._note(instant)) for instant in islice(self._trigger.instants(start), count)
        ]

    def _note(self, instant: datetime) -> str:
        stopped = stopped_by(self._row)
        if stopped:
            return stopped
        first = self._row["next_scheduled_for"]
        if instant <= self._now and (first is None or instant < first):
            return "decided already"
        if self._overdue is not None:
            for skip in self._overdue.skips:
                if skip.skipped_from <= instant <= skip.skipped_until:
                    return f"would be skipped: {skip.reason}"
        late = self._overdue is not None and any(run.scheduled_for == instant for run in self._overdue.runs)
        when = "late: as soon as a worker fires it" if late else ""
        if not late and self._spread:
            when = f"fires {format_duration(self._spread)} later"
        return "; ".join(filter(None, (when, self._meets.note())))

    def _decided(self) -> Decision | None:
        """What a worker that fires now would make of the instants that have come."""
        first = self._row["next_scheduled_for"]
        if first is None or first > self._now:
            return None
        due = DueDefinition(
            DefinitionId(self._row["id"]),
            OrgId(""),
            self._row["org"],
            self._row["timezone"],
            self._row["name"],
            self._row["revision"],
            first,
            self._row["spec"],
        )
        return decide(due, self._now, lambda handler: "child")


class _Overlaps:
    """What the next run to come meets; those behind it, nobody can know."""

    def __init__(self, definition: Definition, unfinished: Sequence[Row]) -> None:
        self._overlap = definition.overlap
        self._others = list(unfinished) if definition.serial else []

    def note(self) -> str:
        if not self._others:
            return ""
        others, self._others = self._others, []
        on, held = others[0]["id"], [other for other in others if other["state"] == "held"]
        if self._overlap == "replace":
            return f"replaces run {on} if that is still on"
        if self._overlap == "queue_one" and not held:
            return f"held behind run {on} if that is still on"
        return f"would be skipped: overlap, if run {on} is still on"


def stopped_by(row: Row) -> str:
    """Why nothing of this definition is due; empty where it is."""
    if row["org_state"] != "active":
        return f"not due: the org is {row['org_state']}"
    return "" if row["state"] == "active" else f"not due: the definition is {row['state']}"
