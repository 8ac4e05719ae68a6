"""Capacity: starts, children and memory that definitions imply, against what workers and machine can do."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

from sqlalchemy import Connection

from worker.clock import to_text
from worker.definitions.definition import Definition
from worker.definitions.units import format_duration
from worker.ids import DefinitionId, OrgId
from worker.operations.handlers import Handlers
from worker.operations.load import DAY, Load, Peak, Stream
from worker.operations.requirements import OrgNeeds, of_all_orgs
from worker.runs.fire import window_of
from worker.settings.sections import ExecutionSettings
from worker.store import requirements
from worker.store.database import Database

# Definitions of a handler that are looked at, and runs of each.
DEFINITIONS = 20
RUNS = 10
# What is taken of a handler that has not run yet.
SECONDS = 10.0
MEMORY = 64 * 2**20


@dataclass(frozen=True, slots=True)
class History:
    """The mean length of a run in seconds, and the most memory of one in bytes; `known`, or assumed."""

    seconds: float
    memory: int
    known: bool = True


class Histories:
    """Of the handlers of these orgs' definitions, each read at first need."""

    def __init__(self, connection: Connection, orgs: Iterable[OrgNeeds]) -> None:
        self._connection = connection
        self._known: dict[str, History] = {}
        self._unknown: set[str] = set()
        self._places: dict[str, list[tuple[OrgId, DefinitionId]]] = defaultdict(list)
        for org in orgs:
            for definition in org.definitions:
                places = self._places[definition.handler]
                if len(places) < DEFINITIONS:
                    places.append((org.org.id, org.ids[definition.name]))

    def of(self, handler: str) -> History:
        if handler not in self._known:
            self._known[handler] = self._read(handler)
        return self._known[handler]

    def assumed(self) -> list[str]:
        """What was taken for granted, in words."""
        if not self._unknown:
            return []
        few = sorted(self._unknown)
        named = ", ".join(few[:5]) + (f" and {len(few) - 5} more" if len(few) > 5 else "")
        return [f"{named}: no run is known yet; {SECONDS:.0f} s and {MEMORY // 2**20} MiB are assumed of one"]

    def _read(self, handler: str) -> History:
        rows = [
            row
            for org_id, definition_id in self._places.get(handler, ())
            for row in requirements.last_attempts(self._connection, org_id, definition_id, limit=RUNS)
            if row["handler"] == handler
        ]
        if not rows:
            self._unknown.add(handler)
        peaks = [row["peak_memory"] for row in rows if row["peak_memory"]]
        # To three digits, so that handlers alike are counted together.
        seconds = float(f"{fmean(row['seconds'] for row in rows):.3g}") if rows else SECONDS
        return History(seconds, max(peaks) if peaks else MEMORY, known=bool(rows))


Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Machine:
    """What one machine has: processors, and bytes of memory."""

    processors: float
    memory: int

    @classmethod
    def here(cls) -> Machine:
        """This one, or the part of it that a container may use."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = _control_group("memory.max")
        quota, _, period = _control_group("cpu.max").partition(" ")
        processors = float(len(os.sched_getaffinity(0)))
        if quota.isdigit() and period.isdigit():
            processors = min(processors, int(quota) / int(period))
        return cls(processors, min(memory, int(limit)) if limit.isdigit() else memory)


@dataclass(frozen=True, slots=True)
class Has:
    """What there is for runs: slots and machines of the workers that are up, else of one that would be."""

    children: int
    inline: int
    machines: int
    up: bool

    @classmethod
    def of(cls, workers: list[Row], execution: ExecutionSettings) -> Has:
        if not workers:
            return cls(execution.max_children, execution.max_inline, 1, up=False)
        slots = [row["capacity"] or {} for row in workers]
        return cls(
            sum(int(each.get("children", 0)) for each in slots),
            sum(int(each.get("inline", 0)) for each in slots),
            len({row["host"] for row in workers}),
            up=True,
        )


def _control_group(name: str) -> str:
    try:
        return Path("/sys/fs/cgroup", name).read_text(encoding="ascii").strip()
    except OSError:
        # Not in a container, or on a system without control groups: the machine itself is the limit.
        return ""


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
        workers = requirements.live_workers(connection)
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
