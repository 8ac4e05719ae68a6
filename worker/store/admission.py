"""Admission: walks the ring of orgs with waiting runs and fills this worker's free slots."""

from __future__ import annotations

from collections.abc import Mapping

from worker.errors import StoreUnavailable
from worker.ids import OrgId, WorkerId
from worker.runs.run import AdmittedRun, Isolation
from worker.store.database import Database
from worker.store.sql import RingStep, statements

# Orgs looked at by one call; 10,000 orgs at their limit must not make one call slow.
HOPS = 2048
# Orgs that one transaction chooses from, where fewer slots than that are free.
WIDTH = 16
_BEFORE_ALL = OrgId("00000000-0000-0000-0000-000000000000")


class Admission:
    """One worker's place in the ring; the next call goes on where the last one stopped."""

    def __init__(self, database: Database, worker_id: WorkerId) -> None:
        self._database = database
        self._worker_id = worker_id
        self._cursor = _BEFORE_ALL

    def admit(self, offered: Mapping[str, int | None], free: Mapping[Isolation, int]) -> list[AdmittedRun]:
        """Mark waiting runs running, best first, within the limits of org, definition and handler.

        `offered` maps each handler that this worker has to its cluster-wide limit, or
        None; `free` each isolation to its free slots. Each step is a transaction of
        its own. Fewer runs than free slots may come back although more could start:
        call again after a call that gave some.

        Raises:
            StoreUnavailable: the database did not answer. Runs that were admitted all
                the same are handed back by the renewal that finds them.
        """
        left: dict[Isolation, int] = {isolation: max(0, slots) for isolation, slots in free.items()}
        admitted: list[AdmittedRun] = []
        seen: set[OrgId] = set()
        hops = HOPS
        try:
            while offered and any(left.values()) and hops > 0:
                step = self._walk(offered, left, hops)
                hops -= step.hops
                orgs = {org_id: reach for org_id, reach in step.orgs.items() if org_id not in seen}
                seen.update(orgs)
                if orgs:
                    admitted += self._fill(orgs, offered, left)
                if orgs and step.partial and any(left.values()):
                    # Some lines were shorter than they might have been: the rest of the others.
                    admitted += self._fill(dict.fromkeys(orgs, sum(left.values())), offered, left)
                if step.complete or not orgs:
                    break
        except StoreUnavailable:
            # What was admitted before is ours, and must start.
            if not admitted:
                raise
        return admitted

    def _walk(self, offered: Mapping[str, int | None], left: Mapping[Isolation, int], hops: int) -> RingStep:
        want = max(WIDTH, sum(left.values()))
        with self._database.autocommit() as connection:
            step = statements(connection).admit_ring(
                connection, self._cursor, want=want, hops=hops, handlers=list(offered), free=left
            )
        self._cursor = step.cursor
        return step

    def _fill(
        self, orgs: Mapping[OrgId, int], offered: Mapping[str, int | None], left: dict[Isolation, int]
    ) -> list[AdmittedRun]:
        with self._database.transaction() as connection:
            picked = statements(connection).admit_choose(
                connection, self._worker_id, orgs, offered=offered, free=left
            )
        for run in picked:
            left[run.isolation] -= 1
        return picked
