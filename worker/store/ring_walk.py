"""Admission as one worker walks it: around the ring of orgs, from where its last call stopped."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice

from sqlalchemy import Connection

from worker.definitions.pools import DEFAULT_POOL
from worker.errors import StoreUnavailable
from worker.ids import OrgId, WorkerId
from worker.runs.run import AdmittedRun, Isolation
from worker.store.database import Database
from worker.store.sql import statements
from worker.store.sql.contract import RingStep

# Orgs that one call passes; 10,000 orgs at their limit must not make one call slow.
HOPS = 2048
# Orgs that one transaction chooses from, at least; more if more slots are free.
WIDTH = 16
# The share of each admission that goes to the newest runs, of equal rank, while more orgs wait than it takes.
NEWEST = 0.1
# Lower than every id.
BEFORE_ALL = OrgId("00000000-0000-0000-0000-000000000000")


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
        admitted: list[AdmittedRun] = []
        seen: set[OrgId] = set()
        hops = HOPS
        try:
            while offered and self.pools and any(left.values()) and hops > 0:
                step = self._walk(offered, left, hops, within)
                hops -= step.hops
                orgs = {org_id: reach for org_id, reach in step.orgs.items() if org_id not in seen}
                seen.update(orgs)
                others = dict.fromkeys((*step.newest, *self._passed), 1)
                if orgs or others:
                    picked = self._fill(others | orgs, offered, left, within, first=step.newest)
                    admitted += picked
                    in_turn, self._passed = (*self._passed, *orgs), []
                    if not any(left.values()):
                        # The newest went before them, and the ring comes round again only after all others.
                        taken = {run.org_id for run in picked}
                        passed = (org_id for org_id in in_turn if org_id not in taken)
                        self._passed = list(islice(passed, len(step.newest)))
                if orgs and step.partial and any(left.values()):
                    # Some queues were short: read the rest of the others.
                    admitted += self._fill(dict.fromkeys(orgs, sum(left.values())), offered, left, within)
                if step.complete or not orgs:
                    break
        except StoreUnavailable:
            # Runs admitted before the error are ours, and must start.
            if not admitted:
                raise
        return admitted

    def _walk(
        self,
        offered: Mapping[str, int | None],
        left: Mapping[Isolation, int],
        hops: int,
        within: Connection | None,
    ) -> RingStep:
        free = sum(left.values())
        newest = 0
        if not self._complete:
            self._newest = min(self._newest, 1.0) + NEWEST * free
            newest = int(self._newest)
        with nullcontext(within) if within is not None else self._database.autocommit() as connection:
            step = statements(connection).admit_ring(
                connection,
                self._cursor,
                want=max(WIDTH, free - len(self._passed)),
                hops=hops,
                handlers=list(offered),
                pools=self.pools,
                free=left,
                newest=newest,
            )
        self._newest -= newest
        self._cursor, self._complete = step.cursor, step.complete
        return step

    def _fill(
        self,
        orgs: Mapping[OrgId, int],
        offered: Mapping[str, int | None],
        left: dict[Isolation, int],
        within: Connection | None,
        first: Collection[OrgId] = (),
    ) -> list[AdmittedRun]:
        with nullcontext(within) if within is not None else self._database.transaction() as connection:
            picked = statements(connection).admit_choose(
                connection,
                self._worker_id,
                orgs,
                offered=offered,
                pools=self.pools,
                free=left,
                first=first,
                placing=self._placing,
            )
        for run in picked:
            left[run.isolation] -= 1
        return picked
