"""What both dialects offer and share: the statements, their arguments and results, and their pure parts."""

from __future__ import annotations

import functools
import heapq
import json
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

from sqlalchemy import Connection

from worker.ids import DefinitionId, OrgId, RunId, WorkerId
from worker.model.definitions import CALENDAR_DATES
from worker.model.runs.outcome import UNENDED, EndedAttempt
from worker.model.runs.run import (
    AdmittedRun,
    DueDefinition,
    Isolation,
    LogLine,
    NewRun,
    NewSkip,
    NextFire,
    OwnedRun,
    RunStep,
)
from worker.model.runs.waits import NewWait, WaitState

Progress = tuple[RunId, int, Mapping[str, Any]]
Specs = MutableMapping[tuple[DefinitionId, int], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Taker:
    """Whom runs are admitted for: its handlers with their limits, if any, its pools and its free slots."""

    worker_id: WorkerId
    offered: Mapping[str, int | None]
    pools: Sequence[str]
    free: Mapping[Isolation, int]


@dataclass(frozen=True, slots=True)
class Walk:
    """A walk around the ring from after `cursor`, until it has found `want` orgs or passed `hops`.

    It also looks for that many orgs with the `newest` waiting runs, among the last ids only.
    """

    cursor: OrgId
    want: int
    hops: int
    newest: int = 0


@dataclass(frozen=True, slots=True)
class RingStep:
    """Orgs that seem to have something to admit, and the org after which the walk goes on.

    Each org comes with the number of its runs that the free slots can reach if all queues are
    long; `partial`: some queues are longer. `hops` is the number of orgs passed; `complete`: the
    walk came full circle. `newest` are orgs with the newest runs that wait.
    """

    orgs: Mapping[OrgId, int]
    partial: bool
    cursor: OrgId
    hops: int
    complete: bool
    newest: Sequence[OrgId] = ()


@dataclass(frozen=True, slots=True)
class AbandonedRun:
    """A running run whose worker is gone, locked by this transaction."""

    id: RunId
    org_id: OrgId
    definition_id: DefinitionId
    revision: int
    handler: str
    worker_id: WorkerId
    fencing_token: int
    attempt: int
    failures: int
    recoveries: int
    parent_id: RunId | None
    started_at: datetime


@dataclass(frozen=True, slots=True)
class Fired:
    """Runs inserted, runs that overlap an unfinished one, and the earliest next fire time of all."""

    inserted: Sequence[NewRun]
    overlapped: Sequence[NewRun]
    next_fire_at: datetime | None
    now: datetime


# Not frozen: a run may start thousands.
@dataclass(slots=True)
class ChildRow:
    """A child to insert, below a run that is locked; `held` until its `ctx.map_runs` has room for it."""

    id: RunId
    handler: str
    isolation: Isolation
    idempotency_key: str
    params_json: str
    held: bool
    place: int
    key: str
    occurrence: int
    map: int | None


class OrgQueue(NamedTuple):
    """What ranks an org's waiting runs: its running runs, their limit, and its weight."""

    running: int
    most: int
    weight: int

    @property
    def room(self) -> int:
        return self.most - self.running

    def rank(self, place: int) -> float:
        return (self.running + place) / self.weight


# Waiting runs that are read for each of the newest orgs wanted, and rows that are passed for them at most:
# one org may have many, and others may have started already.
PER_ORG = 4
WINDOW = 2000


def distinct(orgs: Iterable[OrgId], count: int) -> list[OrgId]:
    """The first `count` orgs, each once."""
    return list(dict.fromkeys(orgs))[:count]


def reach(queues: Sequence[OrgQueue], free: int) -> list[int]:
    """For each queue, how many of its runs are among the best `free` runs if all queues are long.

    Runs of equal rank count together. If queues are short, slots stay free, and the rest of the
    other queues must be read.
    """
    counts = [0] * len(queues)
    heap = [(queue.rank(1), n) for n, queue in enumerate(queues) if queue.room > 0]
    heapq.heapify(heap)
    taken, last_rank = 0, 0.0
    while heap and (taken < free or heap[0][0] <= last_rank):
        last_rank, n = heap[0]
        counts[n] += 1
        taken += 1
        if counts[n] < queues[n].room:
            heapq.heapreplace(heap, (queues[n].rank(counts[n] + 1), n))
        else:
            heapq.heappop(heap)
    return counts


# Whether a run with a row of `parents` has ended in a way that ends its children that wait.
ENDS_CHILDREN = "(runs.state = 'cancelled' OR (runs.state <> 'succeeded' AND NOT parents.keep))"
# Whether a running run `l` is cancelled instead of waiting again, and why: as requested, or with its parent.
STOPPED = f"""
l.cancel_requested_at IS NOT NULL OR (l.parent_id IS NOT NULL AND EXISTS (
  SELECT 1 FROM runs JOIN parents ON parents.run_id = runs.id
  WHERE runs.id = l.parent_id AND {ENDS_CHILDREN})),
CASE WHEN l.cancel_requested_at IS NULL THEN 'parent' ELSE l.cancel_reason END
"""


# Not frozen: each run needs one, and freezing takes three times as long.
@dataclass(slots=True)
class LockedRun:
    """A running row of this worker, as it was locked; see `STOPPED`."""

    fencing_token: int
    stopped: bool
    cancel_reason: str | None


@dataclass(slots=True)
class Ending:
    """An ended attempt that this worker still owns, and its run's next state."""

    attempt: EndedAttempt
    state: str
    reason: str | None
    ended_at: datetime

    @property
    def final(self) -> bool:
        return self.state not in UNENDED


@dataclass(frozen=True, slots=True)
class OpenWaits:
    """The waits of one attempt: whether one of them is over already, and their first deadline."""

    over: bool
    until: datetime | None


@dataclass(frozen=True, slots=True)
class Rollups:
    """Sums in the order of their keys, so that two writers cannot deadlock."""

    days: Sequence[tuple[date, OrgId, int, int, int]]
    hours: Sequence[tuple[datetime, OrgId, str, int]]


def end_runs(
    ended: Iterable[EndedAttempt], locked: Mapping[RunId, LockedRun], now: datetime
) -> tuple[list[Ending], list[EndedAttempt]]:
    """Separate the attempts that are still ours from those fenced out, each in the order of run ids.

    A run that would wait again is cancelled if it is stopped.
    """
    endings: dict[RunId, Ending] = {}
    fenced: list[EndedAttempt] = []
    for attempt in sorted(ended, key=attrgetter("run_id")):
        row = locked.get(attempt.run_id)
        if row is None or row.fencing_token != attempt.fencing_token or attempt.run_id in endings:
            fenced.append(attempt)
            continue
        state, reason = attempt.state, attempt.reason
        if state in UNENDED and row.stopped:
            state, reason = "cancelled", row.cancel_reason or "requested"
        # The worker's clock may differ from the database's: keep the end between start and now.
        ended_at = max(attempt.started_at, min(attempt.ended_at, now))
        endings[attempt.run_id] = Ending(attempt, state, reason, ended_at)
    return list(endings.values()), fenced


def wake(
    parked: Iterable[Ending], waits: Mapping[RunId, OpenWaits], now: datetime
) -> tuple[list[Ending], list[tuple[Ending, datetime | None]]]:
    """Separate the parked runs that go on at once from those that wait on, each with its first deadline.

    `waits` was read after the rows were locked. An answer locks the row of its run first, so it is
    either in `waits` or finds the run parked. A run without waits goes on.
    """
    awake: list[Ending] = []
    asleep: list[tuple[Ending, datetime | None]] = []
    for ending in parked:
        found = waits.get(ending.attempt.run_id)
        if found is None or found.over or (found.until is not None and found.until <= now):
            awake.append(replace(ending, state="waiting", reason="resumed"))
        else:
            asleep.append((ending, found.until))
    return awake, asleep


def sum_up(endings: Iterable[Ending], now: datetime) -> Rollups:
    """Runs, attempts and handler time by day and org; runs by hour, org and final state.

    The hours have no runs that other runs started.
    """
    today = now.astimezone(UTC).date()
    hour = now.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    attempts: dict[OrgId, int] = {}
    seconds: dict[OrgId, float] = {}
    ended: dict[OrgId, int] = {}
    runs: dict[tuple[OrgId, str], int] = {}
    for ending in endings:
        attempt, state = ending.attempt, ending.state
        org_id, began_at = attempt.org_id, attempt.trail.handler_started_at
        attempts[org_id] = attempts.get(org_id, 0) + 1
        if began_at is not None and ending.ended_at > began_at:
            took = (ending.ended_at - began_at).total_seconds()
            seconds[org_id] = seconds.get(org_id, 0.0) + took
        if ending.final:
            ended[org_id] = ended.get(org_id, 0) + 1
            if not attempt.is_child:
                runs[org_id, state] = runs.get((org_id, state), 0) + 1
    return Rollups(
        [
            (today, org_id, ended.get(org_id, 0), count, round(seconds.get(org_id, 0.0)))
            for org_id, count in sorted(attempts.items())
        ],
        [(hour, org_id, state, count) for (org_id, state), count in sorted(runs.items())],
    )


@functools.lru_cache(maxsize=256)
def shared_spec(text: str) -> Mapping[str, Any]:
    """A spec from its JSON text. The definitions of a template share one, which must not be changed."""
    spec: dict[str, Any] = json.loads(text)
    if CALENDAR_DATES in spec:
        spec[CALENDAR_DATES] = _shared_dates(tuple(spec[CALENDAR_DATES]))
    return spec


@functools.lru_cache(maxsize=256)
def _shared_dates(dates: tuple[str, ...]) -> tuple[str, ...]:
    """The dates of a calendar once, however many specs that are kept have them."""
    return dates


def shares(limit: int) -> tuple[int, int]:
    """How many definitions one fire takes that have been due longest, and how many that became due last."""
    newest = limit // 10
    return limit - newest, newest


def in_order(steps: Iterable[RunStep]) -> list[RunStep]:
    """Steps in the order of run ids, so that two batches cannot deadlock."""
    return sorted(steps, key=lambda step: (step.run.id, step.step.seq))


# Columns of a `NewRun` in `runs`, besides `created_at`, and in `live_runs`, besides its state; of an attempt,
# and of a step.
OF_RUN = """id, org_id, definition_id, revision, handler, origin, scheduled_for, created_by, request_key,
  backfill_id, retry_of, idempotency_key, params, pool"""
OF_LIVE_RUN = """id, org_id, definition_id, revision, handler, variant_handlers, isolation, origin,
  scheduled_for, idempotency_key, params, backfill_id, max_concurrent, priority, serial, available_at,
  start_by, pool"""

OF_ATTEMPT = """run_id, attempt, org_id, worker_id, fencing_token, handler, started_at, token_ready_at,
  handler_started_at, ended_at, outcome, error, error_cause, claims, flags, jti, claims_hash, peak_memory"""
OF_STEP = """run_id, org_id, fencing_token, attempt, handler, seq, name, key, occurrence, started_at,
  ended_at, size, result"""

# What a child has of its parent, in `live_runs`, which is `p`, and `parents`, which is `f`; `n` is its own.
CHILD_OF_RUN = """id, org_id, definition_id, revision, handler, origin, scheduled_for, created_at,
  idempotency_key, params, pool"""
CHILD_OF_LIVE = """id, org_id, definition_id, revision, handler, isolation, origin, scheduled_for,
  idempotency_key, params, max_concurrent, priority, serial, state, reason, available_at, pool, parent_id,
  place"""
CHILD_LINK = "parent_id, place, run_id, org_id, root_id, depth, handler, key, occurrence, map"

# The ends of statements that add to the sums.
ADD_TO_DAY = """ON CONFLICT (day, org_id) DO UPDATE SET runs = rollup_days.runs + excluded.runs,
  attempts = rollup_days.attempts + excluded.attempts,
  handler_seconds = rollup_days.handler_seconds + excluded.handler_seconds"""
ADD_TO_HOUR = "ON CONFLICT (hour, org_id, state) DO UPDATE SET runs = rollup_hours.runs + excluded.runs"


class Statements(Protocol):
    """The hot statements of a dialect; the dialects have the SQL."""

    def fire_first(self, connection: Connection) -> tuple[datetime, datetime | None]:
        """The database's time, and the earliest fire time; takes no lock."""

    def fire_lock(
        self, connection: Connection, *, limit: int, specs: Specs
    ) -> tuple[datetime, list[DueDefinition]]:
        """Lock `limit` due definitions; also returns the database's time.

        They are those that have been due longest and, if more are due, a tenth that became due last: at a
        full hour one that is due every second does not wait for thousands of others.

        `specs` caches specs by definition and revision.
        """

    def fire_write(
        self, connection: Connection, runs: Sequence[NewRun], next_fires: Sequence[NextFire]
    ) -> Fired:
        """Insert runs and set the next fire times, under the definitions' locks.

        A serial run that overlaps an unfinished one is returned, not inserted; an existing one is ignored.
        """

    def put_children(self, connection: Connection, parent_id: RunId, rows: Sequence[ChildRow]) -> None:
        """Insert children of a running run whose row, and that of `parents`, this transaction has locked."""

    def fire_skips(self, connection: Connection, skips: Sequence[NewSkip]) -> None:
        """Write skips; consecutive ones extend their definition's last row."""

    def admit_ring(self, connection: Connection, taker: Taker, walk: Walk) -> RingStep:
        """Walk the ring; takes no lock."""

    def admit_choose(
        self,
        connection: Connection,
        taker: Taker,
        orgs: Mapping[OrgId, int],
        *,
        first: Collection[OrgId] = (),
        placing: bool = False,
    ) -> list[AdmittedRun]:
        """Become the only admitter, then count, rank and mark runs of these orgs and pools as running.

        `orgs` says how many runs of each queue to read. Of equal ranks the runs of the orgs in `first` go
        first. With `placing` no more than the free slots of the pools' hosts. The transaction must contain
        nothing else: on PostgreSQL it commits before the answer is read.
        """

    def admit_crowd(
        self,
        connection: Connection,
        taker: Taker,
        walk: Walk,
        *,
        passed: Collection[OrgId] = (),
        whole: bool = False,
    ) -> tuple[RingStep, list[AdmittedRun]]:
        """As `admit_ring` and `admit_choose`, but walk under the lock too: no other admitter is in between.

        Of each org in `passed`, one run may start as well; `whole` reads whole queues. The orgs of the
        returned step are those whose turn it was while the newest went first.
        """

    def finish(
        self, connection: Connection, worker_id: WorkerId, ended: Sequence[EndedAttempt]
    ) -> set[RunId]:
        """Write ended attempts, each fenced, and return the runs whose attempt is stored as given.

        Can be repeated: the same attempt is accepted again.
        """

    def add_rollups(self, connection: Connection, rollups: Rollups) -> None:
        """Add to the stored sums."""

    def promote(self, connection: Connection, definitions: Sequence[DefinitionId] | None) -> int:
        """Let held runs wait if their definition has no other unfinished run; None means all definitions."""

    def save_checkpoint(
        self, connection: Connection, run: AdmittedRun, handler: str, data_json: str, *, number: int = 0
    ) -> bool:
        """Store a run's checkpoint, fenced; False if the run is no longer ours.

        The handler of its first checkpoint stays. One that differs from the last sets `recoveries` back to 0.
        `number` counts the saves of the attempt: one that arrives after a later one changes nothing.
        """

    def open_wait(
        self, connection: Connection, run_id: RunId, fencing_token: int, *, attempt: int, wait: NewWait
    ) -> WaitState | None:
        """Store what a run waits for, fenced, and return how that stands; None if the run is no longer ours.

        The deadline counts from the first call. The database's clock decides whether it has passed.
        """

    def wake_due(self, connection: Connection, *, limit: int) -> int:
        """Let parked runs wait for a slot whose first deadline has passed; returns how many."""

    def store_steps(
        self, connection: Connection, steps: Sequence[RunStep], *, commit: bool = True
    ) -> set[tuple[RunId, int]]:
        """Store steps, fenced; returns the runs, with their fencing tokens, that still run.

        A new step sets `recoveries` back to 0. Can be repeated: the same step is accepted again. With
        `commit` the transaction must contain nothing else: on PostgreSQL it commits before the answer is
        read. Without it the rows of the runs stay locked, so that their spends can be counted.
        """

    def write_progress(self, connection: Connection, rows: Sequence[Progress]) -> None:
        """Set the progress of running rows, fenced."""

    def append_logs(self, connection: Connection, rows: Sequence[LogLine]) -> None:
        """Append lines to runs' logs; existing ones stay as they are."""

    def renew(
        self, connection: Connection, worker_id: WorkerId, lease: timedelta
    ) -> tuple[bool, list[OwnedRun]]:
        """Extend the lease and return the runs it covers; False if the incarnation was ended."""

    def renew_as_json(
        self, connection: Connection, worker_id: WorkerId, lease: timedelta
    ) -> tuple[bool, str]:
        """The same with the runs as JSON, `[id, fencing_token, cancel_reason]` each: cheaper for many."""

    def recover_lock(
        self, connection: Connection, *, by: WorkerId | None, others_than: WorkerId | None, limit: int
    ) -> list[AbandonedRun]:
        """End the workers whose lease has passed and lock running rows of ended ones.

        `by` is the worker that does so. With `others_than`, every other worker counts as dead.
        """
