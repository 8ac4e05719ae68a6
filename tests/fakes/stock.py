"""Makes orgs, definitions, workers and runs in a database, and reads their rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import insert, select, text, update

from tests.fakes.rows import P, T, Work, reading, within
from worker.ids import DefinitionId, OrgId, RunId, WorkerId, new_id
from worker.model.definitions.pools import DEFAULT_POOL
from worker.model.runs.outcome import EndedAttempt, Trail
from worker.model.runs.run import AdmittedRun, FireReport, Isolation, NewRun, NewSkip, NextFire
from worker.model.runs.waits import NewWait
from worker.store import firing, tables, workers
from worker.store.database import Database
from worker.store.ring_walk import RingWalk
from worker.store.sql import statements

HANDLER = "acme.note"
LEASE = timedelta(seconds=30)

Row = dict[str, Any]


class Stock:
    """Makes rows as operations do, and runs as a worker does."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._numbers = itertools.count(1)
        self._admissions: dict[WorkerId, RingWalk] = {}

    def within(self, work: Work[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return within(self.database, work, *args, **kwargs)

    def reading(self, work: Work[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return reading(self.database, work, *args, **kwargs)

    def hot(self, statement: str, *args: Any, **kwargs: Any) -> Any:
        """What a hot statement of the dialect returns in a transaction of its own."""
        with self.database.transaction() as connection:
            return getattr(statements(connection), statement)(connection, *args, **kwargs)

    def now(self) -> datetime:
        return self.reading(self.database.now)

    def org(self, *, limit: int = 10, weight: int = 1, state: str = "active") -> OrgId:
        org_id, at = OrgId(new_id()), self.now()
        self._insert(
            tables.orgs,
            id=org_id,
            code=f"org_{next(self._numbers)}",
            name="Acme",
            issuer="main",
            state=state,
            max_concurrent_runs=limit,
            weight=weight,
            tags=[],
            created_at=at,
            updated_at=at,
        )
        return org_id

    def definition(
        self, org_id: OrgId, *, due_at: datetime | None = None, spec: Mapping[str, Any] | None = None
    ) -> DefinitionId:
        id_, at = DefinitionId(new_id()), self.now()
        name = f"definition-{next(self._numbers)}"
        self._insert(
            tables.definitions,
            id=id_,
            org_id=org_id,
            name=name,
            revision=1,
            enabled=True,
            created_at=at,
            updated_at=at,
        )
        self._insert(
            tables.definition_revisions,
            definition_id=id_,
            revision=1,
            spec=dict(spec or {"handler": HANDLER}),
            at=at,
            by="tester",
        )
        self._insert(
            tables.schedule,
            definition_id=id_,
            org_id=org_id,
            next_scheduled_for=due_at,
            next_fire_at=due_at,
        )
        return id_

    def worker(
        self,
        *,
        lease: timedelta = LEASE,
        handlers: Sequence[str] = (HANDLER,),
        pools: Sequence[str] = (DEFAULT_POOL,),
        children: int = 50,
    ) -> WorkerId:
        worker_id = WorkerId(new_id())
        self.within(
            workers.register,
            worker_id,
            host="here",
            pid=1,
            version="1",
            lease=lease,
            handlers=handlers,
            capacity={"children": children, "inline": 0},
            pools=pools,
        )
        self._admissions[worker_id] = RingWalk(self.database, worker_id, pools=pools)
        return worker_id

    def run(self, org_id: OrgId, definition_id: DefinitionId | None = None, **values: Any) -> NewRun:
        """A run to insert; manual and not serial by default."""
        [run] = self.runs([org_id], definition_id, **values)
        return run

    def runs(
        self, org_ids: Iterable[OrgId], definition_id: DefinitionId | None = None, **values: Any
    ) -> list[NewRun]:
        """The same for each org of the sequence; the database is asked for its time once."""
        at = self.now() - timedelta(seconds=1)
        runs = (
            NewRun(
                id=RunId(new_id()),
                org_id=org_id,
                definition_id=definition_id or DefinitionId(new_id()),
                revision=1,
                handler=HANDLER,
                origin="manual",
                scheduled_for=at,
                available_at=at,
                idempotency_key=new_id(),
                serial=False,
            )
            for org_id in org_ids
        )
        return [replace(run, **values) for run in runs]

    def put(self, *runs: NewRun) -> FireReport:
        return self.within(firing.write, runs)

    def hold(self, run: NewRun) -> None:
        """Insert a run that is held behind an unfinished one."""
        self.put(replace(run, serial=False))
        self.change(tables.live_runs, run.id, state="held", reason="held", serial=True)

    def admit(
        self,
        worker_id: WorkerId,
        free: int = 1000,
        *,
        inline: int = 0,
        offered: Mapping[str, int | None] | None = None,
    ) -> list[AdmittedRun]:
        slots: dict[Isolation, int] = {"child": free, "inline": inline}
        return self.walk(worker_id).admit({HANDLER: None} if offered is None else offered, slots)

    def running(
        self,
        worker_id: WorkerId | None = None,
        org_id: OrgId | None = None,
        definition_id: DefinitionId | None = None,
        **values: Any,
    ) -> AdmittedRun:
        """A run that is admitted at once; its worker and org are new if none is given."""
        self.put(self.run(org_id or self.org(), definition_id, **values))
        [admitted] = self.admit(worker_id or self.worker())
        return admitted

    def walk(self, worker_id: WorkerId) -> RingWalk:
        """The place of a worker in the ring."""
        return self._admissions.setdefault(worker_id, RingWalk(self.database, worker_id))

    def finish(self, worker_id: WorkerId, *ended: EndedAttempt) -> set[RunId]:
        with self.database.transaction() as connection:
            return statements(connection).finish(connection, worker_id, ended)

    def ended(self, run: AdmittedRun, state: str = "succeeded", **values: Any) -> EndedAttempt:
        """The end of a two-second attempt in that state."""
        waits = state == "waiting"
        end = EndedAttempt(
            run_id=run.id,
            org_id=run.org_id,
            definition_id=run.definition_id,
            fencing_token=run.fencing_token,
            attempt=run.attempt,
            started_at=run.started_at - timedelta(seconds=2),
            ended_at=run.started_at,
            outcome="retry" if waits else "gated" if state == "skipped" else state,
            state=state,
            reason="retry" if waits else None,
            trail=Trail(run.handler, handler_started_at=run.started_at - timedelta(seconds=2)),
            result='{"articles":3}' if state == "succeeded" else None,
            failures=run.failures + waits,
            recoveries=run.recoveries,
        )
        return replace(end, **values)

    def use_hot_statements(self, worker: WorkerId, admitted: Sequence[AdmittedRun], batch: int) -> None:
        """Fire, end a batch of these runs, let another wait and park a third: all statements but `admit`."""
        ended, waiting, parked = (admitted[batch * part :][:batch] for part in range(3))
        hour = timedelta(hours=1)
        with self.database.transaction() as connection:
            hot = statements(connection)
            hot.fire_lock(connection, limit=100, specs={})
            run = admitted[0]
            firing.write(
                connection,
                [self.run(run.org_id)],
                [NewSkip(run.org_id, run.definition_id, 1, self.now(), self.now(), 1, "missed")],
                [NextFire(run.definition_id, self.now() + hour, self.now() + hour)],
            )
            hot.renew(connection, worker, LEASE)
            hot.save_checkpoint(connection, run, HANDLER, "{}")
            hot.write_progress(connection, [(run.id, run.fencing_token, {"done": 1}) for run in ended])
            workers.recover(connection, max_recoveries=3)
        self.finish(worker, *(self.ended(run) for run in ended))
        self.finish(worker, *(self.ended(run, "waiting") for run in waiting))
        wait = NewWait("approval", 1, "answer", seconds=60.0)
        with self.database.transaction() as connection:
            # Opened, and opened again.
            for run in [*parked, *parked]:
                hot.open_wait(connection, run.id, run.fencing_token, attempt=1, wait=wait)
        self.finish(worker, *(self.ended(run, "parked", outcome="parked", reason="answer") for run in parked))
        self.within(hot.wake_due, limit=10)

    def code(self, org_id: str) -> str:
        """The code of an org."""
        row = self._one(tables.orgs, tables.orgs.c.id == org_id)
        assert row is not None
        return str(row["code"])

    def live(self, run_id: str) -> Row | None:
        """The row of `live_runs`, or None once the run has ended."""
        return self._one(tables.live_runs, tables.live_runs.c.id == run_id)

    def unended(self, run_id: str) -> Row:
        """The row of `live_runs` of a run that has not ended."""
        row = self.live(run_id)
        assert row is not None
        return row

    def stored(self, run_id: str) -> Row:
        """The row of `runs`."""
        row = self._one(tables.runs, tables.runs.c.id == run_id)
        assert row is not None
        return row

    def attempts(self, run_id: str) -> list[Row]:
        """The rows of `attempts`, oldest first."""
        return self.all(tables.attempts, tables.attempts.c.run_id == run_id)

    def all(self, table: Any, *where: Any) -> list[Row]:
        query = select(table).where(*where).order_by(*table.primary_key.columns)
        with self.database.autocommit() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def change(self, table: Any, id_: str, **values: Any) -> None:
        """Change one row directly."""
        key = next(iter(table.primary_key.columns))
        with self.database.transaction() as connection:
            connection.execute(update(table).where(key == id_).values(**values))

    def make_available(self, run_id: str) -> None:
        """Make a waiting run available now."""
        self.change(tables.live_runs, run_id, available_at=self.now() - timedelta(seconds=1))

    def let_lease_pass(self, worker_id: WorkerId) -> None:
        """Expire the worker's lease."""
        self.change(tables.workers, worker_id, lease_until=self.now() - timedelta(seconds=1))

    def _one(self, table: Any, condition: Any) -> Row | None:
        rows = self.all(table, condition)
        return rows[0] if rows else None

    def _insert(self, table: Any, **values: Any) -> None:
        with self.database.transaction() as connection:
            connection.execute(insert(table).values(**values))


def await_lock(database: Database) -> None:
    """Return once a session of PostgreSQL waits for a lock."""
    waits = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
    while True:
        with database.autocommit() as connection:
            if connection.execute(waits).scalar_one():
                return
