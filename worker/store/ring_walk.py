"""Admission as one worker walks it: around the ring of orgs, from where its last call stopped."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice

from sqlalchemy import Connection

from worker.errors import StoreUnavailable
from worker.ids import OrgId, WorkerId
from worker.model.definitions.pools import DEFAULT_POOL
from worker.model.runs.run import AdmittedRun, Isolation
from worker.store.database import Database
from worker.store.sql import statements
from worker.store.sql.contract import RingStep, Taker, Walk

# Orgs that one call passes; 10,000 orgs at their limit must not make one call slow.
HOPS = 2048
# Orgs that one transaction chooses from, at least; more if more slots are free.
WIDTH = 16
# The share of each admission that goes to the newest runs, of equal rank, while more orgs wait than it takes.
NEWEST = 0.1
# Lower than every id.
BEFORE_ALL = OrgId("00000000-0000-0000-0000-000000000000")


@dataclass(slots=True)
class _Call:
    """What one call may still do, and what it has admitted."""

    offered: Mapping[str, int | None]
    left: dict[Isolation, int]
    within: Connection | None
    hops: int = HOPS
    admitted: list[AdmittedRun] = field(default_factory=list)
    seen: set[OrgId] = field(default_factory=set)

    @property
    def free(self) -> int:
        return sum(self.left.values())

    def take(self, picked: Sequence[AdmittedRun]) -> None:
        self.admitted += picked
        for run in picked:
            self.left[run.isolation] -= 1


class RingWalk:
    """One worker's position in the ring of orgs; the next call continues where the last one stopped."""

    def __init__(
        self,
        database: Database,
        worker_id: WorkerId,
        *,
        pools: Sequence[str] = (DEFAULT_POOL,),
        placing: bool = False,
    ) -> None:
        self._database = database
        self._worker_id = worker_id
        # Those that the worker takes runs of; with `placing` for their hosts, within what these can take.
        self.pools = pools
        self._placing = placing
        self._cursor = BEFORE_ALL
        self._complete = False
        # Runs that may go newest first; with few slots it takes several calls until one may.
        self._newest = 0.0
        # Orgs whose turn it was when others went first.
        self._passed: list[OrgId] = []
        # Other workers took what this one had found: walk under the lock.
        self.crowded = False

    def admit(
        self,
        offered: Mapping[str, int | None],
        free: Mapping[Isolation, int],
        within: Connection | None = None,
    ) -> list[AdmittedRun]:
        """Mark waiting runs of `pools` running, best first, within the limits of org, definition and handler.

        `offered` maps this worker's handlers to their cluster-wide limit, or None; `free` maps
        isolations to their free slots. Each step is a separate transaction, or on SQLite part of the
        transaction `within`. It may return fewer runs than could start: call again after a call that
        returned some.

        Raises:
            StoreUnavailable: the database did not answer. If it admitted runs anyway, the renewal
                that finds them hands them back.
        """
        left: dict[Isolation, int] = {isolation: max(0, slots) for isolation, slots in free.items()}
        call = _Call(offered, left, within)
        try:
            while offered and self.pools and any(left.values()) and call.hops > 0:
                if self._fill_locked(call) if self.crowded else self._fill_found(call):
                    break
        except StoreUnavailable:
            # Runs admitted before the error are ours, and must start.
            if not call.admitted:
                raise
        return call.admitted

    def _fill_found(self, call: _Call) -> bool:
        """Walk, then take the lock if that found something; returns whether to stop."""
        step = self._walk(call)
        orgs = {org_id: reach for org_id, reach in step.orgs.items() if org_id not in call.seen}
        call.seen.update(orgs)
        others = dict.fromkeys((*step.newest, *self._passed), 1)
        if orgs or others:
            wanted = min(len(orgs), call.free)
            picked = self._fill(call, others | orgs, first=step.newest)
            in_turn, self._passed = (*self._passed, *orgs), []
            if not call.free:
                # The newest went before them, and the ring comes round again only after all others.
                taken = {run.org_id for run in picked}
                passed = (org_id for org_id in in_turn if org_id not in taken)
                self._passed = list(islice(passed, len(step.newest)))
            self.crowded = not self._placing and len(picked) < wanted
        if orgs and step.partial and call.free and not self.crowded:
            # Some queues were short: read the rest of the others.
            self._fill(call, dict.fromkeys(orgs, call.free))
        return not self.crowded and (step.complete or not orgs)

    def _fill_locked(self, call: _Call) -> bool:
        """Take the lock and walk: so no other worker takes what this one finds. Returns whether to stop."""
        free, before = call.free, len(call.admitted)
        passed, self._passed = self._passed, []
        walk = Walk(self._cursor, max(WIDTH, free - len(passed)), call.hops, self._newest_of(free))
        for whole in (False, True):
            with self._transaction(call) as connection:
                step, picked = statements(connection).admit_crowd(
                    connection, self._taker(call), walk, passed=passed, whole=whole
                )
            call.take(picked)
            if not step.partial or not call.free:
                break
        if not call.free:
            self._passed = list(step.orgs)
        self._move(call, step)
        # With nothing to admit, the next call looks before it takes the lock.
        self.crowded = len(call.admitted) > before
        return step.complete

    def _newest_of(self, free: int) -> int:
        """How many of these free slots the newest runs get, if they have no lower rank."""
        if self._complete:
            return 0
        self._newest = min(self._newest, 1.0) + NEWEST * free
        newest = int(self._newest)
        self._newest -= newest
        return newest

    def _walk(self, call: _Call) -> RingStep:
        free, within = call.free, call.within
        walk = Walk(self._cursor, max(WIDTH, free - len(self._passed)), call.hops, self._newest_of(free))
        with nullcontext(within) if within is not None else self._database.autocommit() as connection:
            step = statements(connection).admit_ring(connection, self._taker(call), walk)
        self._move(call, step)
        return step

    def _move(self, call: _Call, step: RingStep) -> None:
        self._cursor, self._complete = step.cursor, step.complete
        call.hops -= step.hops

    def _fill(
        self, call: _Call, orgs: Mapping[OrgId, int], first: Collection[OrgId] = ()
    ) -> list[AdmittedRun]:
        with self._transaction(call) as connection:
            picked = statements(connection).admit_choose(
                connection, self._taker(call), orgs, first=first, placing=self._placing
            )
        call.take(picked)
        return picked

    def _taker(self, call: _Call) -> Taker:
        return Taker(self._worker_id, call.offered, self.pools, call.left)

    def _transaction(self, call: _Call) -> AbstractContextManager[Connection]:
        return self._database.transaction() if call.within is None else nullcontext(call.within)
