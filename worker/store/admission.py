"""Admission: walks the ring of orgs with waiting runs and fills this worker's free slots."""

from __future__ import annotations

from collections.abc import Mapping

from worker.ids import OrgId, WorkerId
from worker.runs.run import AdmittedRun, Isolation
from worker.store.database import Database
from worker.store.sql import statements

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

    def admit(
        self, offered: Mapping[str, int | None], free: Mapping[Isolation, int]
    ) -> list[AdmittedRun]:
        """Mark waiting runs running, best first, within the limits of org, definition and handler.

        `offered` maps each handler that this worker has to its cluster-wide limit, or
        None; `free` each isolation to its free slots. Each step is a transaction of
        its own. Fewer runs than free slots may come back although more could start:
        call again after a call that gave some.

        Raises:
            StoreUnavailable: the database did not answer. Runs that were admitted all
                the same are handed back by the renewal that finds them.
        """
        left: dict[Isolation, int] = {isolation: n for isolation, n in free.items() if n > 0}
        admitted: list[AdmittedRun] = []
        seen: set[OrgId] = set()
        hops = HOPS
        while offered and left and hops > 0:
            want = max(WIDTH, sum(left.values()))
            with self._database.autocommit() as connection:
                step = statements(connection).admit_ring(
                    connection,
                    self._cursor,
                    want=want,
                    hops=hops,
                    handlers=list(offered),
                    isolations=list(left),
                )
            self._cursor = step.cursor
            hops -= step.hops
            orgs = [org_id for org_id in step.orgs if org_id not in seen]
            seen.update(orgs)
            if orgs:
                with self._database.transaction() as connection:
                    picked = statements(connection).admit_choose(
                        connection, self._worker_id, orgs, offered=offered, free=left
                    )
                admitted += picked
                for run in picked:
                    left[run.isolation] -= 1
                left = {isolation: n for isolation, n in left.items() if n > 0}
            if step.complete or not orgs:
                break
        return admitted
