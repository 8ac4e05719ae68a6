"""Fire: which scheduled times are due, spread, missed or skipped; and a preview of the next ones. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, time, timedelta
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from typing import Any, Literal

from worker.ids import DefinitionId, OrgId, RunId, new_id_at
from worker.model.definitions import LEAST_PATIENCE, MisfirePolicy
from worker.model.definitions.deadline import Deadline
from worker.model.definitions.definition import Definition, Spread, from_spec
from worker.model.definitions.pools import pool_of
from worker.model.definitions.triggers import EveryTrigger, Trigger
from worker.model.definitions.units import format_duration
from worker.model.runs.run import (
    Decision,
    Declared,
    DueDefinition,
    NewDeadline,
    NewRun,
    NewSkip,
    NextFire,
)

# More runs than this are left to the next call, which follows at once.
MAX_RUNS = 1000
# The automatic spread is at most this long.
WIDEST = timedelta(hours=1)
_DAY = timedelta(days=1)
_TICK = timedelta(microseconds=1)
_ZERO = timedelta(0)

# Decisions that are kept for the definitions of a template: they are due together, with one spec.
SHARED = 64
# Specs that are kept as they were read, each for one time zone.
SPECS_KEPT = 1000

DeclaredBy = Callable[[str], Declared]
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive scheduled times that do not become runs: both ends inclusive, within one UTC day."""

    skipped_from: datetime
    skipped_until: datetime
    count: int
    reason: Literal["missed", "calendar"] = "missed"


@dataclass(frozen=True, slots=True)
class Due:
    """Scheduled times that run, oldest first; earlier ones that do not; and the next one or None."""

    runs: list[datetime] = field(default_factory=list)
    skipped: list[Span] = field(default_factory=list)
    next: datetime | None = None


def decide_due(
    trigger: Trigger, policy: MisfirePolicy, *, first: datetime, now: datetime, spread: timedelta = _ZERO
) -> Due:
    """Decide every scheduled time from `first`, inclusive, that is due at `now`.

    A time is due `spread` after its nominal time; its lateness counts from then. Those on the dates of
    a calendar are skips, and the misfire policy does not see them. Missed ranges are counted, not
    walked: a week of missed seconds costs as much as an hour. `next` is the first time that is not
    decided.
    """
    nominal = trigger.nominal
    due = nominal.last(first, now - spread)
    if due is None:
        return Due(next=nominal.after(first, inclusive=True))
    newest = due if trigger is nominal else trigger.last(first, due)
    run_from = None if newest is None else _first_to_run(trigger, policy, first, newest, now - spread)
    runs: list[datetime] = []
    following: datetime | None = None
    if run_from is not None and newest is not None:
        for scheduled_for in trigger.occurrences(run_from):
            if scheduled_for > newest or len(runs) == MAX_RUNS:
                following = scheduled_for
                break
            runs.append(scheduled_for)
    decided = due
    if following is not None and following <= due:
        decided = following - _TICK
    elif trigger is not nominal or run_from is None:
        following = nominal.after(due)
    return Due(runs, _skipped(trigger, first, decided, run_from), following)


def is_closed(trigger: Trigger, at: datetime) -> bool:
    """Whether this time is on a date of the trigger's calendar."""
    return any(piece.closed for piece in trigger.pieces(at, at))


def start_deadline(trigger: Trigger, scheduled_for: datetime, setting: timedelta | None) -> timedelta | None:
    """How long after it became available a run may start; None means indefinitely.

    By default until the next scheduled time, at least an hour; indefinitely if there is no next time.
    """
    if setting is not None:
        return setting
    period = trigger.period(scheduled_for)
    return None if period is None else max(period, LEAST_PATIENCE)


def _first_to_run(
    trigger: Trigger, policy: MisfirePolicy, first: datetime, newest: datetime, until: datetime
) -> datetime | None:
    """The oldest scheduled time that runs, with all later ones; `until` is now minus the spread."""
    on_time = trigger.after(max(first, until - policy.grace), inclusive=True)
    if on_time is not None and on_time > newest:
        on_time = None
    if policy.mode == "skip" or (policy.mode == "once" and on_time is not None):
        return on_time
    missed = newest if on_time is None else trigger.last(first, on_time - _TICK)
    if missed is None:
        return on_time
    within = policy.within
    if within is None:
        period = trigger.period(missed)
        within = until - first if period is None else max(period, LEAST_PATIENCE)
    oldest = trigger.newest(max(first, until - within), missed, 1 if policy.mode == "once" else policy.limit)
    return oldest or on_time


def _skipped(trigger: Trigger, first: datetime, until: datetime, run_from: datetime | None) -> list[Span]:
    """What is decided and does not run: missed before `run_from`, or on the dates of the calendar."""
    spans: list[Span] = []
    missed_until = until if run_from is None else run_from - _TICK
    for start, end, closed in trigger.pieces(first, until):
        if closed:
            spans += _spans(trigger.nominal, start, end, "calendar")
        else:
            spans += _spans(trigger.nominal, start, min(end, missed_until), "missed")
    return spans


def _spans(
    trigger: Trigger, first: datetime, until: datetime, reason: Literal["missed", "calendar"]
) -> list[Span]:
    spans = []
    start = trigger.after(first, inclusive=True) if first <= until else None
    while start is not None and start <= until:
        midnight = datetime.combine(start.date(), time(), tzinfo=start.tzinfo) + _DAY
        last = trigger.last(start, min(until, midnight - _TICK)) or start
        spans.append(Span(start, last, trigger.count(start, last), reason))
        start = trigger.after(last)
    return spans


def spread_of(
    org_code: str, name: str, schedule: str, trigger: Trigger, setting: Spread = "auto"
) -> timedelta:
    """The delay of a definition, the same on every machine and after every restart.

    `auto` spreads `every` and `@…` over their period, at most an hour, and does not delay crontab
    lines and `at`; a duration spreads any schedule over that time.
    """
    return _spread_within(window_of(schedule, trigger, setting), org_code, name)


def _spread_within(window: timedelta, org_code: str, name: str) -> timedelta:
    if not window:
        return _ZERO
    digest = blake2b(f"{org_code}\0{name}".encode(), digest_size=8).digest()
    return timedelta(milliseconds=window // timedelta(milliseconds=1) * int.from_bytes(digest) >> 64)


def window_of(schedule: str, trigger: Trigger, setting: Spread = "auto") -> timedelta:
    """The time over which the delays of the orgs are spread; zero if there is no spread."""
    if setting != "auto":
        return _ZERO if setting == "off" else setting
    nominal = trigger.nominal
    if isinstance(nominal, EveryTrigger):
        return min(nominal.interval, WIDEST)
    return WIDEST if schedule.strip().startswith("@") else _ZERO


def decide(due: DueDefinition, now: datetime, declared: DeclaredBy) -> Decision:
    """Decide every scheduled time of a definition that is due at `now`.

    `declared` says where a handler asks to run, for definitions that do not.

    Raises:
        DefinitionError: this version does not understand the stored spec or time zone.
    """
    read = _read(due)
    definition = read.definition
    decided = _decide(read, due.next_scheduled_for, now, _spread_within(read.window, due.org_code, due.name))
    wants = declared(definition.handler)
    pool = pool_of(definition.pool, wants.pool, due.org_pool)
    isolation = definition.isolation or wants.isolation_in(pool)

    def run_of(scheduled_for: datetime, available_at: datetime, start_by: datetime | None) -> NewRun:
        # Admission finds the newest that are due by their ids.
        run_id = RunId(new_id_at(available_at))
        return NewRun(
            id=run_id,
            org_id=due.org_id,
            definition_id=due.definition_id,
            revision=due.revision,
            handler=definition.handler,
            origin="schedule",
            scheduled_for=scheduled_for,
            available_at=available_at,
            idempotency_key=run_id,
            isolation=isolation,
            serial=definition.serial,
            overlap=definition.overlap,
            priority=definition.priority,
            variant_handlers=definition.handlers if definition.variants else (),
            max_concurrent=definition.max_concurrent,
            start_by=start_by,
            pool=pool,
        )

    def skip_of(span: Span) -> NewSkip:
        until, count, reason = span.skipped_until, span.count, span.reason
        return NewSkip(due.org_id, due.definition_id, due.revision, span.skipped_from, until, count, reason)

    return Decision(
        runs=[run_of(*times) for times in decided.runs],
        skips=[skip_of(span) for span in decided.skipped],
        next=NextFire(due.definition_id, decided.next, decided.next_fire_at),
        deadlines=[
            NewDeadline(due.definition_id, due.org_id, at, deadline_at)
            for at, deadline_at in decided.deadlines
        ],
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """What a spec says in one time zone, for all definitions that have it; without their org and name."""

    spec: Mapping[str, Any]
    definition: Definition
    trigger: Trigger
    window: timedelta
    deadline: Deadline | None


_known: dict[tuple[int, str | None], _Read] = {}


def _read(due: DueDefinition) -> _Read:
    """What the spec of a definition says. Raises DefinitionError."""
    key = id(due.spec), due.org_timezone
    known = _known.get(key)
    if known is not None and known.spec is due.spec:
        return known
    definition = from_spec(due.org_code, due.name, due.spec)
    trigger = definition.trigger(due.org_timezone)
    window = window_of(definition.schedule, trigger, definition.spread)
    if len(_known) >= SPECS_KEPT:
        _known.clear()
    deadline = definition.deadline(due.org_timezone)
    read = _known[key] = _Read(due.spec, definition, trigger, window, deadline)
    return read


@dataclass(frozen=True, slots=True)
class _Decided:
    """Of each run when it is due, when it may start and until when; and what comes next.

    `deadlines` has scheduled times, each with the time until which it must be done.
    """

    runs: list[tuple[datetime, datetime, datetime | None]]
    skipped: list[Span]
    next: datetime | None
    next_fire_at: datetime | None
    deadlines: Sequence[tuple[datetime, datetime]]


# The definitions of one fire have the same `now`.
@lru_cache(maxsize=SHARED)
def _decide(read: _Read, first: datetime, now: datetime, spread: timedelta) -> _Decided:
    definition, trigger = read.definition, read.trigger
    due = decide_due(trigger, definition.misfire_policy, first=first, now=now, spread=spread)

    def start_by(scheduled_for: datetime) -> datetime | None:
        patience = start_deadline(trigger, scheduled_for, definition.start_deadline)
        # For a missed time that still runs, the deadline counts from now.
        return None if patience is None else max(scheduled_for + spread, now) + patience

    return _Decided(
        [(at, at + spread, start_by(at)) for at in due.runs],
        due.skipped,
        due.next,
        None if due.next is None else due.next + spread,
        () if read.deadline is None else _deadlines(read.deadline, due),
    )


def _deadlines(deadline: Deadline, due: Due) -> list[tuple[datetime, datetime]]:
    """The deadlines of the runs, and of what was missed: not of what is on the dates of a calendar.

    Of a range of missed times the first, whose deadline passes first, and the last, with which all are done.
    """
    missed = [span for span in due.skipped if span.reason == "missed"]
    times = [at for span in missed for at in (span.skipped_from, span.skipped_until)]
    return deadline.of_each([*times, *due.runs])


def preview(
    row: Row, unfinished: Sequence[Row], now: datetime, *, start: datetime | None, count: int
) -> Iterator[tuple[datetime, datetime | None, str]]:
    """The first `count` scheduled times from `start` on, each with its deadline and a note.

    The deadline is None without one and where nothing runs, the note empty if it simply runs. `row` is that
    of `definitions show`, `unfinished` the id and state of its unfinished serial runs. By default it starts
    with what is due, else now.
    """
    definition = from_spec(row["org"], row["name"], row["spec"])
    trigger, deadline = definition.trigger(row["timezone"]), definition.deadline(row["timezone"])
    spread = spread_of(row["org"], row["name"], definition.schedule, trigger, definition.spread)
    first = row["next_scheduled_for"]
    if start is None:
        start = now if first is None else min(first, now)
    due = _due_now(row, now)
    late = set() if due is None else {run.scheduled_for for run in due.runs}
    skips = () if due is None else due.skips
    overlap = _overlap_note(definition, unfinished)
    for scheduled_for in islice(trigger.nominal.occurrences(start), count):
        skipped = [skip for skip in skips if skip.skipped_from <= scheduled_for <= skip.skipped_until]
        if row["org_state"] != "active":
            note = f"not due: the org is {row['org_state']}"
        elif row["state"] != "active":
            note = f"not due: the definition is {row['state']}"
        elif scheduled_for <= now and (first is None or scheduled_for < first):
            note = "decided already"
        elif is_closed(trigger, scheduled_for):
            note = f"would be skipped: calendar {definition.calendar}"
        elif skipped:
            note = f"would be skipped: {skipped[0].reason}"
        else:
            when = f"fires {format_duration(spread)} later" if spread else ""
            when = "late: as soon as a worker fires it" if scheduled_for in late else when
            # Later overlaps cannot be known.
            note, overlap = "; ".join(filter(None, (when, overlap))), ""
        has_deadline = deadline is not None and not is_closed(trigger, scheduled_for)
        yield scheduled_for, deadline.of(scheduled_for) if deadline and has_deadline else None, note


def _due_now(row: Row, now: datetime) -> Decision | None:
    """What a worker that fires now would decide."""
    first = row["next_scheduled_for"]
    if first is None or first > now:
        return None
    due = DueDefinition(
        DefinitionId(row["id"]),
        OrgId(""),
        row["org"],
        row["timezone"],
        row["name"],
        row["revision"],
        first,
        row["spec"],
    )
    return decide(due, now, lambda handler: Declared())


def _overlap_note(definition: Definition, unfinished: Sequence[Row]) -> str:
    """What happens to the next run if a run is still unfinished."""
    if not unfinished or not definition.serial:
        return ""
    run = unfinished[0]["id"]
    if definition.overlap == "replace":
        return f"replaces run {run} if that is still unfinished"
    if definition.overlap == "queue_one" and all(other["state"] != "held" for other in unfinished):
        return f"held behind run {run} if that is still unfinished"
    return f"would be skipped: overlap, if run {run} is still unfinished"
