"""Capacity: starts, children and memory that definitions imply, against what workers and machine can."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from worker.clock import to_text
from worker.definitions.definition import Definition
from worker.definitions.spread import window_of
from worker.definitions.units import format_duration
from worker.operations.handlers import Handlers
from worker.operations.histories import Histories
from worker.operations.load import DAY, Load, Peak, Stream
from worker.operations.machine import Has, Machine
from worker.operations.needs import OrgNeeds, of_all_orgs
from worker.settings.sections import ExecutionSettings
from worker.store import needs
from worker.store.database import Database

Row = dict[str, Any]

# Processor seconds of a run's start and end, of worker, zygote and child together: docs/benchmarks.md.
CHILD_COST = 0.011
INLINE_COST = 0.0005
# Of what is full without end, at most so many are named.
MOST_NAMED = 10
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Measure:
    """One thing that the definitions need and that there is so much of, in `unit`.

    `change` says what to do about it where it is not enough (`ok` false), or not at
    the worst time of the day (`at`), so that runs wait a while.
    """

    what: str
    needs: float
    mean: float
    has: float
    unit: str
    ok: bool
    at: datetime | None = None
    change: str | None = None

    def as_row(self) -> Row:
        return {
            "what": self.what,
            "needs": round(self.needs, 2),
            "mean": round(self.mean, 2),
            "has": round(self.has, 2),
            "unit": self.unit,
            "at": self.at,
            "ok": self.ok,
            "change": self.change,
        }


@dataclass(slots=True)
class Capacity:
    """The measures, and what had to be assumed for them."""

    measures: list[Measure]
    assumed: list[str]


def capacity(database: Database, execution: ExecutionSettings, machine: Machine) -> Capacity:
    """What the definitions of all orgs imply for a day as from now; paused ones are left out."""
    with database.autocommit() as connection:
        now = database.now(connection).replace(second=0, microsecond=0)
        workers = needs.live_workers(connection)
        handlers = Handlers(connection)
        orgs = list(of_all_orgs(connection))
        histories = Histories(connection, orgs)
        counted = _Counted(now, handlers, histories)
        for org in orgs:
            for definition in org.due:
                counted.take(org, definition)
    has = Has.of(workers, execution)
    counted.add_up()
    measures = list(_of_machine(counted, has, machine))
    measures += _too_slow(counted)
    measures += _over_limit(counted, orgs, handlers)
    assumed = histories.assumed()
    if not has.up:
        assumed.append("no worker is up: one with these settings is assumed, on this machine")
    elif has.machines > 1:
        assumed.append(f"the {has.machines} machines of the workers are taken to be like this one")
    return Capacity(measures, assumed)


class _Counted:
    """What all definitions make together; equal ones are counted once, as many times as there are."""

    def __init__(self, start: datetime, handlers: Handlers, histories: Histories) -> None:
        self.start = start
        self.children, self.inline, self.memory = Load(start), Load(start), Load(start)
        # Runs at once in the mean, of what has run before: nobody is told to change something on a guess.
        self.by_org: dict[str, float] = defaultdict(float)
        self.by_handler: dict[str, float] = defaultdict(float)
        self.by_isolation: dict[str, float] = defaultdict(float)
        self.guessed = False
        # Definitions whose run lasts longer than their period: how many periods it takes, and both.
        self.slow: list[tuple[float, str, float, float]] = []
        self._handlers = handlers
        self._histories = histories
        self._streams: dict[tuple[Any, ...], int] = defaultdict(int)

    def take(self, org: OrgNeeds, definition: Definition) -> None:
        trigger = definition.trigger(org.timezone)
        history = self._histories.of(definition.handler)
        isolation = definition.isolation or self._handlers.isolation_of(definition.handler)
        window = window_of(definition.schedule, trigger, definition.spread)
        self._streams[(trigger, window, history, definition.serial, isolation)] += 1
        count = trigger.count(self.start, self.children.end)
        self.guessed |= not history.known
        if not (count and history.known):
            return
        lasting = history.seconds
        if definition.serial and history.seconds * count > DAY:
            lasting = DAY / count
            place = f"definition {definition.org} {definition.name}"
            self.slow.append((history.seconds / lasting, place, history.seconds, lasting))
        self.by_org[org.org.code] += count * lasting / DAY
        self.by_handler[definition.handler] += count * lasting / DAY
        self.by_isolation[isolation] += count * lasting / DAY

    def add_up(self) -> None:
        for (trigger, window, history, serial, isolation), count in self._streams.items():
            stream = Stream(trigger, count, window, history.seconds, serial)
            if isolation == "inline":
                self.inline.add(stream)
            else:
                self.children.add(stream)
                self.memory.add(stream, history.memory)


def _of_machine(counted: _Counted, has: Has, machine: Machine) -> Iterator[Measure]:
    start, children, inline = counted.start, counted.children, counted.inline
    processors = machine.processors * has.machines
    total = children.starts + inline.starts
    cost = (children.starts * CHILD_COST + inline.starts * INLINE_COST) / total if total else CHILD_COST
    starts = (children.starts_a_second(), inline.starts_a_second())
    busiest = max(starts, key=lambda peak: peak.amount).second
    yield _measure(
        "starts",
        Peak(sum(peak.amount for peak in starts), busiest),
        total / DAY,
        total / DAY,
        processors / cost,
        "a second",
        start,
        "`spread` definitions that fire together, or give the workers more processors",
    )
    memory = _memory_of(counted)
    most = int(machine.memory * has.machines / memory) if memory else None
    room = "" if most is None else f" (the memory here has room for {most})"
    yield _measure(
        "children",
        children.at_once(),
        children.mean,
        counted.by_isolation["child"],
        has.children,
        "runs at once",
        start,
        f"raise execution.max_children{room}, add a worker, or `spread` definitions that fire together",
    )
    if inline.starts:
        yield _measure(
            "inline",
            inline.at_once(),
            inline.mean,
            counted.by_isolation["inline"],
            has.inline,
            "runs at once",
            start,
            "raise execution.max_inline, or add a worker",
        )
    peak = counted.memory.at_once()
    # No more are on than there are slots; where all are taken, they are by the mean run.
    needed = min(peak.amount, has.children * memory)
    here = machine.memory * has.machines
    yield Measure(
        "memory",
        needed / MIB,
        counted.memory.mean / MIB,
        here / MIB,
        "MiB",
        needed <= here or counted.guessed,
        at=_at(start, peak) if needed else None,
        change=None
        if needed <= here
        else f"lower execution.max_children to {max(most or 1, 1)} in all, or add memory",
    )


def _memory_of(counted: _Counted) -> float:
    """Bytes of the mean child that is on."""
    return counted.memory.mean / counted.children.mean if counted.children.mean else 0.0


def _measure(
    what: str, peak: Peak, mean: float, sure: float, has: float, unit: str, start: datetime, change: str
) -> Measure:
    """Of the `mean` so much is `sure`, and not assumed: only that can be too much."""
    ok = sure <= has
    if peak.amount <= has:
        change_now = None
    elif ok:
        change_now = f"runs wait for a while at {to_text(_at(start, peak))}; {change}"
    else:
        change_now = f"it is never enough, whatever the time of day; {change}"
    return Measure(
        what, peak.amount, mean, has, unit, ok, _at(start, peak) if peak.amount else None, change_now
    )


def _at(start: datetime, peak: Peak) -> datetime:
    return start + timedelta(seconds=peak.second)


def _too_slow(counted: _Counted) -> Iterator[Measure]:
    worst = sorted(counted.slow, reverse=True)
    for ratio, place, seconds, period in worst[:MOST_NAMED]:
        lasts = format_duration(timedelta(seconds=round(seconds)))
        every = format_duration(timedelta(seconds=round(period)))
        change = f"a run takes {lasts} and is due every {every}: make it due less often, or its work smaller"
        yield Measure(place, ratio, ratio, 1, "runs at once", False, change=change)


def _over_limit(counted: _Counted, orgs: list[OrgNeeds], handlers: Handlers) -> Iterator[Measure]:
    """Orgs and handlers whose limit is below what is on in the mean: they fall behind without end."""
    limits = {
        f"org {org.org.code}": (
            counted.by_org.get(org.org.code, 0.0),
            org.max_concurrent_runs,
            "raise its max_concurrent_runs, or make its definitions due less often",
        )
        for org in orgs
    }
    for name, mean in counted.by_handler.items():
        limit = next((row["max_concurrent"] for row in handlers.named(name) if row["max_concurrent"]), None)
        if limit is not None:
            limits[f"handler {name}"] = mean, limit, "raise max_concurrent of its @job, or use it less often"
    over = [(mean - limit, what, mean, limit, change) for what, (mean, limit, change) in limits.items()]
    for excess, what, mean, limit, change in sorted(over, reverse=True)[:MOST_NAMED]:
        if excess > 0:
            yield Measure(what, mean, mean, limit, "runs at once", False, change=change)
