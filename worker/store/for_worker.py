"""The store as the worker's loops see it: each method one piece of work in the database's threads."""

from __future__ import annotations

import os
import socket
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from worker.errors import NotFound
from worker.ids import DefinitionId, RunId, WorkerId
from worker.runs.firing import FireReport, LogLine, Recovered
from worker.runs.outcome import EndedAttempt
from worker.runs.run import AdmittedRun, Isolation, OwnedRun, RunContext
from worker.store import firing, retention, runs, sweeps, workers
from worker.store.admission import Admission
from worker.store.database import Database
from worker.store.gathered import Gathered
from worker.store.hand_back import hand_back
from worker.store.sql import Progress, statements

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
        self._admission = Admission(database, worker_id)
        self._contexts = Gathered(self._read_contexts)
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
        return await self._database.call(workers.forget_ended, older_than=age)

    async def handlers_changed(self, handlers: Sequence[str]) -> None:
        """Say which handlers this worker offers from now on."""
        await self._database.call(workers.update_handlers, self._worker_id, handlers)

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
            workers.register(
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
            workers.unregister(connection, self._worker_id)


class _Newest(OrderedDict[K, V]):
    """A mapping that forgets what was put in first when it is full."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        if len(self) > self._most:
            self.popitem(last=False)
