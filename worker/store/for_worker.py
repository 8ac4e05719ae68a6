"""The store as the worker's loops use it: each method is one piece of work in the database's threads."""

from __future__ import annotations

import os
import socket
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from sqlalchemy import Connection, delete, insert, select, update

from worker.errors import NotFound, StoreUnavailable
from worker.ids import DefinitionId, OrgId, RunId, WorkerId
from worker.runs.outcome import EndedAttempt, Trail
from worker.runs.run import AdmittedRun, FireReport, Isolation, LogLine, OwnedRun, Recovered, RunContext
from worker.store import firing, retention, runs, sweeps, tables
from worker.store.batch_loader import BatchLoader
from worker.store.connection import database_now
from worker.store.database import Database
from worker.store.sql import Progress, RingStep, statements

# Orgs looked at by one call; 10,000 orgs at their limit must not make one call slow.
HOPS = 2048
# Orgs that one transaction chooses from, where fewer slots than that are free.
WIDTH = 16
_BEFORE_ALL = OrgId("00000000-0000-0000-0000-000000000000")


class RingWalk:
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


_live = tables.live_runs


def hand_back(connection: Connection, worker_id: WorkerId, owned: Sequence[OwnedRun]) -> set[RunId]:
    """End the attempts of these runs, whose admission's answer was lost, as handed back; fenced."""
    fences = {run.id: run.fencing_token for run in owned}
    rows = connection.execute(
        select(_live).where(
            _live.c.id.in_(sorted(fences)), _live.c.worker_id == worker_id, _live.c.state == "running"
        )
    ).all()
    now = database_now(connection)
    ended = [
        EndedAttempt(
            run_id=row.id,
            org_id=row.org_id,
            definition_id=row.definition_id,
            fencing_token=fences[row.id],
            attempt=row.attempt,
            started_at=row.started_at,
            ended_at=now,
            outcome="handed_back",
            state="waiting",
            reason="handed_back",
            trail=Trail(row.handler),
            detail="the answer to its admission was lost",
            failures=row.failures,
            recoveries=row.recoveries,
            keep_start_by=True,
        )
        for row in rows
    ]
    return statements(connection).finish(connection, worker_id, ended) if ended else set()


_workers = tables.workers


def register(
    connection: Connection,
    worker_id: WorkerId,
    *,
    host: str,
    pid: int,
    version: str,
    lease: timedelta,
    handlers: Sequence[str],
    capacity: Mapping[str, Any],
) -> None:
    """Begin an incarnation; its lease counts from the database's now."""
    now = database_now(connection)
    connection.execute(
        insert(_workers).values(
            id=worker_id,
            host=host,
            pid=pid,
            version=version,
            started_at=now,
            renewed_at=now,
            lease_until=now + lease,
            handlers=sorted(handlers),
            capacity=dict(capacity),
        )
    )


def update_handlers(connection: Connection, worker_id: WorkerId, handlers: Sequence[str]) -> None:
    """Say which handlers the worker offers from now on."""
    connection.execute(update(_workers).where(_workers.c.id == worker_id).values(handlers=sorted(handlers)))


def unregister(connection: Connection, worker_id: WorkerId) -> None:
    """End an incarnation; what it still owns is recovered by whoever looks next."""
    connection.execute(
        update(_workers)
        .where(_workers.c.id == worker_id, _workers.c.ended_at.is_(None))
        .values(ended_at=database_now(connection))
    )


def forget_ended(connection: Connection, *, older_than: timedelta) -> int:
    """Delete the rows of workers that ended long ago and own nothing; returns how many."""
    owned = select(_live.c.worker_id).where(_live.c.state == "running")
    result = connection.execute(
        delete(_workers).where(
            _workers.c.ended_at < database_now(connection) - older_than, _workers.c.id.not_in(owned)
        )
    )
    return result.rowcount


K = TypeVar("K")
V = TypeVar("V")

SPECS_KEPT = 20_000
# The share of the lease that a renewal waits for its answer: two tries fit in before the runs freeze.
PATIENCE = 0.3


def beside_the_work(database: Database, lease: timedelta) -> Database:
    """The database over the heartbeat's connection, which no loop ever keeps waiting."""
    # A connection that has fallen silent is given up while there is time for another.
    return database.hurried(PATIENCE * lease.total_seconds())


class WorkerStore:
    """One incarnation's view of the database.

    The async methods run in the database's threads. `register`, `renew` and
    `unregister` serve the calling thread, `renew` on a connection beside the work's.
    """

    def __init__(self, database: Database, worker_id: WorkerId, lease: timedelta) -> None:
        self._database = database
        self._renewing = beside_the_work(database, lease)
        self._worker_id = worker_id
        self._lease = lease
        self._admission = RingWalk(database, worker_id)
        self._contexts = BatchLoader(self._read_contexts)
        self._nothing_was_due = False
        self._marked_until: RunId | None = None
        self._specs: _Newest[tuple[DefinitionId, int], Mapping[str, Any]] = _Newest(SPECS_KEPT)

    async def fire(self, decide: firing.Decide, *, limit: int = 100) -> FireReport:
        """Turn what is due into runs and skips; `decide` is called for each definition and never raises."""
        if self._nothing_was_due:
            # A look without a transaction, again and again while nothing is due.
            now, first = await self._database.call_autocommit(firing.first_due)
            if first is None or first > now:
                return FireReport(next_fire_at=first, now=now)
        report = await self._database.call(firing.fire, decide, limit=limit, specs=self._specs)
        self._nothing_was_due = not (report.inserted or report.skips)
        return report

    async def admit(
        self, offered: Mapping[str, int | None], free: Mapping[Isolation, int]
    ) -> list[AdmittedRun]:
        """Mark waiting runs running; see `Admission.admit`."""
        return await self._database.run(self._admission.admit, offered, free)

    async def finish(self, ended: Sequence[EndedAttempt]) -> set[RunId]:
        """Write what ended; returns the runs whose attempt stands as given."""
        return await self._database.call(
            lambda connection: statements(connection).finish(connection, self._worker_id, ended)
        )

    async def save_checkpoint(self, run: AdmittedRun, data_json: str) -> bool:
        """Keep a run's checkpoint; False if the run is no longer ours."""
        return await self._database.call(
            lambda connection: statements(connection).save_checkpoint(
                connection,
                run.id,
                run.fencing_token,
                attempt=run.attempt,
                org_id=run.org_id,
                data_json=data_json,
            )
        )

    async def load_checkpoint(self, run_id: RunId) -> Any | None:
        """What the run saved last, or None."""
        return await self._database.call_autocommit(runs.load_checkpoint, run_id)

    async def write_progress(self, rows: Sequence[Progress]) -> None:
        """Set the progress of running runs, fenced."""
        await self._database.call(lambda connection: statements(connection).write_progress(connection, rows))

    async def append_logs(self, rows: Sequence[LogLine]) -> None:
        """Append lines to runs' logs."""
        await self._database.call(lambda connection: statements(connection).append_logs(connection, rows))

    async def recover(self, still: Callable[[], bool], *, max_recoveries: int = 3) -> list[Recovered]:
        """Take the runs of workers that are gone, if `still` says so once the database has answered."""
        return await self._database.call(runs.recover, max_recoveries=max_recoveries, still=still)

    async def recover_all_others(self, *, max_recoveries: int = 3) -> list[Recovered]:
        """Take the runs of every other worker: at the start of the one worker of a SQLite file."""
        recovered: list[Recovered] = []
        while part := await self._database.call(
            runs.recover_all_others, self._worker_id, max_recoveries=max_recoveries
        ):
            recovered += part
        return recovered

    async def hand_back(self, owned: Sequence[OwnedRun]) -> set[RunId]:
        """Let runs wait again that this worker owns and does not hold."""
        return await self._database.call(hand_back, self._worker_id, owned)

    async def sweep(self) -> list[sweeps.Swept]:
        """Promote held runs and skip expired ones; gives the expired ones."""
        await self._database.call(sweeps.promote_held)
        return await self._database.call(sweeps.expire_overdue)

    async def mark_no_handler(self) -> None:
        """Say of waiting runs that no worker offers their handler, or does again; some at each call."""
        _, self._marked_until = await self._database.call(sweeps.mark_no_handler, self._marked_until)

    async def forget_runs(self, state: str, age: timedelta, *, limit: int) -> int:
        """Delete runs that ended in this state longer than `age` ago, with all that is theirs."""
        return await self._database.call(retention.forget_runs, state, age, limit=limit)

    async def forget_parts(self, state: str, age: timedelta, *, runs: int, limit: int) -> int:
        """Delete lines and attempts of the runs that `forget_runs` takes next."""
        return await self._database.call(retention.forget_parts, state, age, runs=runs, limit=limit)

    async def forget_skips(self, age: timedelta, *, limit: int) -> int:
        """Delete skips older than `age`."""
        return await self._database.call(retention.forget_skips, age, limit=limit)

    async def forget_logs(self, age: timedelta, *, limit: int) -> int:
        """Delete lines of runs' logs older than `age`."""
        return await self._database.call(retention.forget_logs, age, limit=limit)

    async def forget_workers(self, age: timedelta) -> int:
        """Delete workers that ended longer than `age` ago."""
        return await self._database.call(forget_ended, older_than=age)

    async def handlers_changed(self, handlers: Sequence[str]) -> None:
        """Say which handlers this worker offers from now on."""
        await self._database.call(update_handlers, self._worker_id, handlers)

    async def org_and_definition(self, run: AdmittedRun) -> RunContext:
        """What an attempt must know of its run's org and definition.

        Raises:
            NotFound: one of them is gone.
        """
        context = await self._contexts.of((run.definition_id, run.revision))
        if context is None:
            raise NotFound(f"the org, the definition or the revision of run {run.id} is gone")
        return context

    async def _read_contexts(
        self, wanted: Sequence[tuple[DefinitionId, int]]
    ) -> Mapping[tuple[DefinitionId, int], RunContext]:
        return await self._database.call_autocommit(runs.run_contexts, wanted)

    def register(self, *, version: str, handlers: Sequence[str], capacity: Mapping[str, Any]) -> None:
        """Begin this incarnation."""
        with self._database.transaction() as connection:
            register(
                connection,
                self._worker_id,
                host=socket.gethostname(),
                pid=os.getpid(),
                version=version,
                lease=self._lease,
                handlers=handlers,
                capacity=capacity,
            )

    def renew(self) -> tuple[bool, list[OwnedRun]]:
        """Extend the lease; False if this incarnation was given up. Returns what it owns."""
        with self._renewing.transaction() as connection:
            return statements(connection).renew(connection, self._worker_id, self._lease)

    def unregister(self) -> None:
        """End this incarnation."""
        with self._database.transaction() as connection:
            unregister(connection, self._worker_id)


class _Newest(OrderedDict[K, V]):
    """A mapping that forgets what was put in first when it is full."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        if len(self) > self._most:
            self.popitem(last=False)
