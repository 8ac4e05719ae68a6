"""Capacity: starts, slots and memory that definitions need, against what workers and machine have."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from sqlalchemy import Connection

from worker.clock import to_text
from worker.diagnosis.load import DAY, MINUTE, Load, Peak, Stream
from worker.diagnosis.requirements import OrgDefinitions, load_all_orgs
from worker.ids import DefinitionId
from worker.model.definitions.definition import Definition
from worker.model.definitions.pools import DEFAULT_POOL
from worker.model.definitions.triggers import Trigger
from worker.model.definitions.units import format_duration
from worker.model.runs.fire import window_of
from worker.operations.handlers import Handlers
from worker.settings.sections import ExecutionSettings
from worker.store import health, pools
from worker.store.database import Database
from worker.store.dialect import Row
from worker.store.history import last_attempts, newest_attempts

# Runs that are read of each definition if there are few, else the newest one of each.
FEW = 100
RUNS = 10
# A wait for a slot that is too long: an org would ask where its report is.
MAX_WAIT = timedelta(minutes=15)
# Assumed for a handler that has not run yet.
SECONDS = 10.0
MEMORY = 64 * 2**20
# Processor seconds of a run's start and end, of worker, zygote and child together: docs/benchmarks.md.
CHILD_COST = 0.011
INLINE_COST = 0.0005
# Measures printed of slow definitions, and of limits that are too low.
MAX_NAMED = 10
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Measure:
    """What the definitions need of one resource at the worst time (`at`) and on average, and what there is.

    `wait` is how long runs wait for it at the worst time, None if forever. `change` is the advice if it
    is not enough on average or the wait is too long (not `ok`), or if there is a shorter one.
    """

    what: str
    needs: float
    mean: float
    has: float
    unit: str
    at: datetime | None
    ok: bool
    change: str | None
    wait: timedelta | None = timedelta(0)

    def as_row(self) -> dict[str, Any]:
        return asdict(self) | {name: round(getattr(self, name), 2) for name in ("needs", "mean", "has")}


@dataclass(slots=True)
class Capacity:
    """The measures, and the assumptions behind them."""

    measures: list[Measure]
    assumed: list[str]


@dataclass(frozen=True, slots=True)
class Machine:
    """The processors of a machine, and its memory in bytes."""

    processors: float
    memory: int

    @classmethod
    def here(cls) -> Machine:
        """This machine, or the part of it that a container can use."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = _control_group("memory.max")
        quota, _, period = _control_group("cpu.max").partition(" ")
        processors = float(len(os.sched_getaffinity(0)))
        if quota.isdigit() and period.isdigit():
            processors = min(processors, int(quota) / int(period))
        return cls(processors, min(memory, int(limit)) if limit.isdigit() else memory)


def _control_group(name: str) -> str:
    try:
        return Path("/sys/fs/cgroup", name).read_text(encoding="ascii").strip()
    except OSError:
        # Not in a container, or no control groups: the machine itself is the limit.
        return ""


def capacity(database: Database, execution: ExecutionSettings, machine: Machine) -> Capacity:
    """What the definitions of all orgs need in the 24 hours from now; paused ones are left out."""
    with database.autocommit() as connection:
        now = database.now(connection).replace(second=0, microsecond=0)
        workers = health.live_workers(connection)
        demand = _Demand(connection, now, list(load_all_orgs(connection)))
        demand.add_up()
    slots = {"children": execution.max_children, "inline": execution.max_inline}
    of_pools = dict.fromkeys(execution.pools, sum(slots.values()))
    if workers:
        capacities = [row["capacity"] or {} for row in workers]
        slots = {kind: sum(int(each.get(kind, 0)) for each in capacities) for kind in slots}
        of_pools = pools.slots_of(workers)
    machines = len({row["host"] for row in workers}) or 1
    there = Machine(machine.processors * machines, machine.memory * machines)
    measures = [
        *demand.of_workers(slots, there),
        *demand.of_pools(of_pools),
        *demand.slow_definitions(),
        *demand.low_limits(),
    ]
    assumed = demand.assumed()
    if not workers:
        assumed.append("no worker is up: one with these settings is assumed, on this machine")
    elif machines > 1:
        assumed.append(f"the {machines} machines of the workers are assumed to be like this one")
    return Capacity(measures, assumed)


class _History(NamedTuple):
    """The mean length of a run in seconds, and the most memory of one in bytes; `known`, or assumed."""

    seconds: float
    memory: int
    known: bool


def _history_of(rows: Sequence[Row]) -> _History:
    """The history that these attempts are, or the assumed one."""
    peaks = [row["peak_memory"] for row in rows if row["peak_memory"]]
    # To three digits, so that similar definitions are counted together.
    seconds = float(f"{fmean(row['seconds'] for row in rows):.3g}") if rows else SECONDS
    return _History(seconds, max(peaks, default=MEMORY), known=bool(rows))


class _Demand:
    """What all definitions need together. Equal ones are computed once."""

    def __init__(self, connection: Connection, start: datetime, orgs: list[OrgDefinitions]) -> None:
        self._connection = connection
        self._orgs = orgs
        self._start = start
        self._children, self._inline, self._memory = Load(start), Load(start), Load(start)
        # The part with a known history.
        self._known: dict[str, Load] = {"child": Load(start), "inline": Load(start)}
        # The runs of each pool, and those of them with a known history.
        self._of_pools: dict[str, tuple[Load, Load]] = {}
        # Mean concurrent runs by ("org" | "handler", name), of known histories only: an
        # assumption never fails the check.
        self._means: dict[tuple[str, str], float] = defaultdict(float)
        # Definitions that are due again before they end: (runs per period, name, seconds, period).
        self._slow: list[tuple[float, str, float, float]] = []
        self._handlers = Handlers(connection)
        # Of the definitions with a handler and a name, such as those of a template; of a handler by None.
        self._histories: dict[tuple[str, str | None], _History] = {}

    def add_up(self) -> None:
        """Count all definitions that are due."""
        self._read_histories()
        streams: Counter[tuple[Trigger, timedelta, _History, bool, str, str]] = Counter()
        for org in self._orgs:
            for definition in org.due:
                streams[self._stream(org, definition)] += 1
        for (trigger, window, history, serial, isolation, pool), count in streams.items():
            stream = Stream(trigger, count, window, history.seconds, serial)
            if pool not in self._of_pools:
                self._of_pools[pool] = Load(self._start), Load(self._start)
            self._of_pools[pool][0].add(stream)
            if history.known:
                self._known[isolation].add(stream)
                self._of_pools[pool][1].add(stream)
            if isolation == "inline":
                self._inline.add(stream)
            else:
                self._children.add(stream)
                self._memory.add(stream, history.memory)

    def _stream(
        self, org: OrgDefinitions, definition: Definition
    ) -> tuple[Trigger, timedelta, _History, bool, str, str]:
        trigger = definition.trigger(org.timezone)
        of_handler = self._histories[definition.handler, None]
        history = self._histories.get((definition.handler, definition.name), of_handler)
        pool = self._handlers.pool_of(definition, org.pool)
        isolation = self._handlers.isolation_of(definition, pool)
        window = window_of(definition.schedule, trigger, definition.spread)
        count = trigger.count(self._start, self._children.end)
        if count and history.known:
            lasting = history.seconds
            if definition.serial and history.seconds * count > DAY:
                lasting = DAY / count
                name = f"definition {definition.org} {definition.name}"
                self._slow.append((history.seconds / lasting, name, history.seconds, lasting))
            for key in ("org", org.org.code), ("handler", definition.handler):
                self._means[key] += count * lasting / DAY
        return trigger, window, history, definition.serial, isolation, pool

    def _read_histories(self) -> None:
        named: dict[str, dict[DefinitionId, str]] = defaultdict(dict)
        for org in self._orgs:
            for definition in org.definitions:
                named[definition.handler][org.ids[definition.name]] = definition.name
        few = sum(map(len, named.values())) <= FEW
        for handler, names in named.items():
            if few:
                rows = [
                    row for id_ in names for row in last_attempts(self._connection, id_, handler, limit=RUNS)
                ]
            else:
                rows = newest_attempts(self._connection, handler, list(names))
            by_name: dict[str | None, list[Row]] = defaultdict(list)
            for row in rows:
                by_name[names[row["definition_id"]]].append(row)
            # One that has not run yet is taken to be like the others of its handler.
            by_name[None] = rows
            for name, known in by_name.items():
                self._histories[handler, name] = _history_of(known)

    def assumed(self) -> list[str]:
        """The assumption about handlers that have not run."""
        histories = self._histories.items()
        unknown = sorted(handler for (handler, name), each in histories if name is None and not each.known)
        if not unknown:
            return []
        named = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        return [
            f"{named}: no run is known yet; {SECONDS:.0f} s and {MEMORY // MIB} MiB are assumed for each run"
        ]

    def of_workers(self, slots: Mapping[str, int], machine: Machine) -> Iterator[Measure]:
        """Starts a second, slots and memory."""
        children, inline = self._children, self._inline
        total = children.starts + inline.starts
        cost = (children.starts * CHILD_COST + inline.starts * INLINE_COST) / total if total else CHILD_COST
        peaks = (children.starts_a_second(), inline.starts_a_second())
        starts = Peak(sum(peak.amount for peak in peaks), max(peaks, key=lambda peak: peak.amount).second)
        # Of the runs that start in the worst minute, the last one.
        has = machine.processors / cost
        seconds = max(0.0, starts.amount / has - 1) * MINUTE
        more = "`spread` definitions that fire together, or give the workers more processors"
        wait, change = self._wait(starts, has, seconds, more)
        ok = seconds <= MAX_WAIT.total_seconds()
        yield Measure(
            "starts", starts.amount, total / DAY, has, "a second", self._at(starts), ok, change, wait
        )
        # Bytes of the mean child.
        memory = self._memory.mean / children.mean if children.mean else 0.0
        most = int(machine.memory / memory) if memory else None
        room = "" if most is None else f" (the memory here has room for {most})"
        advice = {
            "children": f"raise execution.max_children{room}, add a worker,"
            " or `spread` definitions that fire together",
            "inline": "raise execution.max_inline, or add a worker",
        }
        for kind, isolation, load in ("children", "child", children), ("inline", "inline", inline):
            if load is children or load.starts:
                yield self._slots(kind, load, self._known[isolation], slots[kind], advice[kind])
        peak = self._memory.at_once()
        # Slots limit it: if all are taken, then by mean children.
        most_used = slots["children"] * memory
        needed = min(peak.amount, most_used)
        fits = needed <= machine.memory
        yield Measure(
            "memory",
            needed / MIB,
            min(self._memory.mean, most_used) / MIB,
            machine.memory / MIB,
            "MiB",
            self._at(Peak(needed, peak.second)),
            fits or not all(history.known for history in self._histories.values()),
            None if fits else f"lower execution.max_children to {max(most or 1, 1)} in all, or add memory",
        )

    def of_pools(self, slots: Mapping[str, int]) -> Iterator[Measure]:
        """The slots of each pool, if there is another one than the default."""
        if self._of_pools.keys() | slots.keys() == {DEFAULT_POOL}:
            return
        for pool, (load, known) in sorted(self._of_pools.items()):
            if pool not in slots:
                advice = f"no worker or host serves it: add a host of {pool}, or {pool} to [execution] pools"
                peak = load.at_once()
                needs, at = (peak.amount, load.mean), self._at(peak)
                yield Measure(f"pool {pool}", *needs, 0, "runs at once", at, False, advice, None)
                continue
            advice = "add slots to a worker or host of the pool, or another one"
            yield self._slots(f"pool {pool}", load, known, slots[pool], advice)

    def _slots(self, what: str, load: Load, known: Load, has: float, advice: str) -> Measure:
        """The slots for these runs. Only those of them with a known history can exceed them."""
        peak = load.at_once()
        wait, change = self._wait(peak, has, load.longest_wait(has).amount, advice)
        ok = known.longest_wait(has).amount <= MAX_WAIT.total_seconds()
        return Measure(what, peak.amount, load.mean, has, "runs at once", self._at(peak), ok, change, wait)

    def _wait(
        self, peak: Peak, has: float, seconds: float, advice: str
    ) -> tuple[timedelta | None, str | None]:
        """How long runs wait for what they need at its peak, and what to change then."""
        if math.isinf(seconds):
            return None, f"runs wait ever longer: it is never enough, at any time of the day; {advice}"
        wait, at = timedelta(seconds=round(seconds)), self._at(peak)
        if at is None or peak.amount <= has:
            return wait, None
        lasting = f", up to {format_duration(wait)}" if wait else ""
        return wait, f"runs wait for a while at {to_text(at)}{lasting}; {advice}"

    def _at(self, peak: Peak) -> datetime | None:
        return self._start + timedelta(seconds=peak.second) if peak.amount else None

    def slow_definitions(self) -> Iterator[Measure]:
        """Definitions that are due again before they end, worst first."""
        for ratio, name, seconds, period in sorted(self._slow, reverse=True)[:MAX_NAMED]:
            lasts, every = (format_duration(timedelta(seconds=round(each))) for each in (seconds, period))
            change = f"a run takes {lasts} and is due every {every}: run it less often, or make it shorter"
            yield Measure(name, ratio, ratio, 1, "runs at once", None, False, change, None)

    def low_limits(self) -> Iterator[Measure]:
        """Orgs and handlers whose limit is below their mean, so that they fall behind; worst first."""
        limits = {("org", org.org.code): org.max_concurrent_runs for org in self._orgs}
        for kind, name in self._means:
            if kind == "handler":
                rows = self._handlers.named(name)
                limit = next((row["max_concurrent"] for row in rows if row["max_concurrent"]), None)
                limits |= {} if limit is None else {(kind, name): limit}
        advice = {
            "org": "raise its max_concurrent_runs, or run its definitions less often",
            "handler": "raise max_concurrent of its @job, or use it less often",
        }
        over = [(self._means[key] - limit, *key, limit) for key, limit in limits.items()]
        for excess, kind, name, limit in sorted(over, reverse=True)[:MAX_NAMED]:
            if excess > 0:
                mean = self._means[kind, name]
                change = advice[kind]
                yield Measure(f"{kind} {name}", mean, mean, limit, "runs at once", None, False, change, None)
