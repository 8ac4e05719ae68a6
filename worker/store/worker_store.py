"""The store as the worker's loops use it: one incarnation's runs, from admission to recovery."""

from __future__ import annotations

import os
import socket
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, ParamSpec, TypeVar

from sqlalchemy import Connection, Text, cast, select

from worker.clock import to_text
from worker.errors import NotFound, StoreUnavailable, Unavailable
from worker.guard.claims import Claims
from worker.ids import ALL_ORGS, DefinitionId, OrgId, RunId, WorkerId
from worker.model.claims import PoolRules, Rules
from worker.model.definitions.budgets import limit_in
from worker.model.definitions.pools import DEFAULT_POOL
from worker.model.money import NANO, money_text
from worker.model.prices import ModelUsage, Prices
from worker.model.rollouts.rollout import RolloutBook, RunVersion, VersionAsk
from worker.model.runs.children import FamilyCap, NewChild, PlacedChild
from worker.model.runs.outcome import EndedAttempt
from worker.model.runs.run import (
    AdmittedRun,
    Declared,
    FireReport,
    Isolation,
    LoadedState,
    LogLine,
    OwnedRun,
    Recovered,
    RunContext,
    RunStep,
    StoredProgress,
    Swept,
    Upcoming,
)
from worker.model.runs.waits import NewWait, WaitState
from worker.store import (
    budgets,
    children,
    deadlines,
    families,
    firing,
    host_handlers,
    hosts,
    limits,
    pools,
    prices,
    rollouts,
    spending,
    starts,
    states,
    steps,
    sweeps,
    tables,
    workers,
)
from worker.store.database import BatchLoader, Database, in_autocommit, in_transaction
from worker.store.dialect import database_now, driver, is_postgresql
from worker.store.ended_children import EndedChildren
from worker.store.ring_walk import BEFORE_ALL, RingWalk
from worker.store.sql import statements
from worker.store.sql.contract import Progress
from worker.store.sql.postgresql.arrays import numbers, words
from worker.telemetry.events import emit

_live = tables.live_runs
_workers = tables.workers
_revisions = tables.definition_revisions

# Looks at budgets after which the tags of orgs are read again.
LOOK_AGAIN = 15
# Seconds that what a parent allows its children is remembered: each child of a process would ask.
CAP_KEPT = 1.0
# Orgs of which the limits in their newest token are remembered.
LIMITS_KEPT = 10_000


def load_progress(connection: Connection, run_id: RunId) -> StoredProgress:
    """The run's last checkpoint, and the handler that stored its first checkpoint or step."""
    saved = select(tables.checkpoints.c.data).where(tables.checkpoints.c.run_id == run_id)
    columns = saved.scalar_subquery(), steps.handler_of_progress(run_id)
    return StoredProgress(*connection.execute(select(*columns)).one())


# Each row is looked up by its key: PostgreSQL might read all of them for a join.
CONTEXTS = """
SELECT r.definition_id, r.revision, o.id, o.code, o.name, o.timezone, o.issuer, d.name, r.spec::text,
       o.tags::text
FROM unnest((SELECT %s::uuid[]), (SELECT %s::integer[])) AS w(definition_id, revision)
CROSS JOIN LATERAL (SELECT * FROM definition_revisions r
                    WHERE r.definition_id = w.definition_id AND r.revision = w.revision LIMIT 1) r
CROSS JOIN LATERAL (SELECT * FROM definitions d WHERE d.id = r.definition_id LIMIT 1) d
CROSS JOIN LATERAL (SELECT * FROM orgs o WHERE o.id = d.org_id LIMIT 1) o
"""


def run_contexts(
    connection: Connection, wanted: Sequence[tuple[DefinitionId, int]]
) -> dict[tuple[DefinitionId, int], RunContext]:
    """The org, the definition and the spec of each of these revisions."""
    if is_postgresql(connection):
        # Every run needs this: by SQLAlchemy it takes three times as long.
        pairs = words(id_ for id_, _ in wanted), numbers(number for _, number in wanted)
        rows = driver(connection).execute(CONTEXTS, pairs).fetchall()
    else:
        orgs, definitions = tables.orgs, tables.definitions
        definition_id, revision = _revisions.c.definition_id, _revisions.c.revision
        columns = definition_id, revision, orgs.c.id, orgs.c.code, orgs.c.name, orgs.c.timezone, orgs.c.issuer
        rows = connection.execute(
            select(*columns, definitions.c.name, cast(_revisions.c.spec, Text), cast(orgs.c.tags, Text))
            .join(definitions, definitions.c.id == definition_id)
            .join(orgs, orgs.c.id == definitions.c.org_id)
            .where(
                definition_id.in_({id_ for id_, _ in wanted}),
                revision.in_({number for _, number in wanted}),
            )
        ).all()
    return {(id_, number): RunContext(*rest) for id_, number, *rest in rows}


P = ParamSpec("P")
T = TypeVar("T")

SPECS_KEPT = 20_000
# The share of the lease that a renewal waits for its answer: two tries fit in before the runs freeze.
PATIENCE = 0.3


def heartbeat_database(database: Database, lease: timedelta) -> Database:
    """The database over a connection for the heartbeat alone, whose deadline leaves time for a retry."""
    return database.with_deadline(PATIENCE * lease.total_seconds())


class WorkerStore:
    """One incarnation's view of the database.

    The async methods run in the database's threads; `register`, `renew` and `unregister` in the
    calling thread, `renew` over a separate connection.
    """

    def __init__(
        self,
        database: Database,
        worker_id: WorkerId,
        lease: timedelta,
        *,
        pools: Sequence[str] = (DEFAULT_POOL,),
        pool_rules: PoolRules | None = None,
        prices: Prices = spending.UNPRICED,
    ) -> None:
        self.database = database
        self._heartbeat_database = heartbeat_database(database, lease)
        self._worker_id = worker_id
        self._lease = lease
        self._pools = pools
        self.pool_rules = pool_rules or PoolRules()
        self._admission = RingWalk(database, worker_id, pools=pools)
        self._contexts = BatchLoader(self.orgs_and_definitions)
        self._caps = BatchLoader(self.caps_of, keep=CAP_KEPT)
        self._ended_children = EndedChildren(database)
        self._versions = BatchLoader(self.keep_versions)
        self.rollouts = RolloutBook()
        # Pools in which runs have waited.
        self._waited: set[str] = set()
        self._nothing_was_due = False
        self._marked_until: RunId | None = None
        self._families_after: RunId | None = None
        self._specs = _SpecCache()
        self._budgets = budgets.WatchedBudgets()
        self._looks = 0
        # Of each org the newest token whose limits are stored: when it was issued, and what they were.
        self._limits_of: OrderedDict[OrgId, tuple[datetime, tuple[int | None, ...]]] = OrderedDict()
        # The own prices, and those with the price list and its digest, once a run has used a model.
        self._own_prices = prices
        self._prices: tuple[Prices, str | None] | None = None

    async def fire(self, decide: firing.Decide, *, limit: int = 100) -> FireReport:
        """Turn due definitions into runs and skips; `decide` is called for each and never raises."""
        if self._nothing_was_due:
            # While nothing is due, only look, without a transaction.
            now, first = await self.database.call_autocommit(
                lambda connection: statements(connection).fire_first(connection)
            )
            if first is None or first > now:
                return FireReport(next_fire_at=first, now=now)
        report = await self.database.call(firing.fire, decide, limit=limit, specs=self._specs)
        self._nothing_was_due = not (report.inserted or report.skips)
        return report

    async def admit(
        self, offered: Mapping[str, int | None], free: Mapping[Isolation, int]
    ) -> list[AdmittedRun]:
        """Mark waiting runs running; see `RingWalk.admit`. Those above a budget of their org wait again."""
        return await self.admit_by(self._admission, offered, free)

    async def admit_by(
        self, walk: RingWalk, offered: Mapping[str, int | None], free: Mapping[Isolation, int]
    ) -> list[AdmittedRun]:
        """As `admit`, by another walk: that of a host, or of a pool whose runs are placed on hosts."""
        return await self._hold_back(await self.database.run(walk.admit, offered, free))

    async def _hold_back(self, admitted: list[AdmittedRun]) -> list[AdmittedRun]:
        """The admitted runs that may start; those above a budget of their org wait again."""
        holding = self._budgets.holding
        checked = [run for run in admitted if run.org_id in holding] if holding else []
        if not checked:
            return admitted
        try:
            started, counted = await self.database.call(spending.hold_back, checked)
            starting = {run.id for run in started}
            self.report(counted)
        except StoreUnavailable:
            # The renewal hands these back. The others were admitted, and must start.
            starting = set()
        return [run for run in admitted if run.org_id not in holding or run.id in starting]

    async def finish(self, ended: Sequence[EndedAttempt]) -> set[RunId]:
        """Write ended attempts; returns the runs whose attempt is stored as given."""
        return await self.finish_by(self._worker_id, ended)

    async def finish_by(self, worker_id: WorkerId, ended: Sequence[EndedAttempt]) -> set[RunId]:
        """The same for the incarnation that owns them: a host's."""
        await self._charge(ended)
        accepted = await self.database.call(
            lambda connection: statements(connection).finish(connection, worker_id, ended)
        )
        await self._settle(ended)
        return accepted

    @property
    def refills(self) -> bool:
        """Whether `finish_and_admit` is faster than both one after the other: on SQLite, by a third."""
        return self.database.dialect == "sqlite"

    async def finish_and_admit(
        self,
        ended: Sequence[EndedAttempt],
        offered: Mapping[str, int | None],
        free: Mapping[Isolation, int],
    ) -> tuple[set[RunId], list[AdmittedRun]]:
        """Write ended attempts, and admit others to their slots in the same transaction; on SQLite only."""
        await self._charge(ended)

        def work(connection: Connection) -> tuple[set[RunId], list[AdmittedRun]]:
            accepted = statements(connection).finish(connection, self._worker_id, ended)
            return accepted, self._admission.admit(offered, free, connection)

        accepted, admitted = await self.database.call(work)
        await self._settle(ended)
        return accepted, await self._hold_back(admitted)

    async def _settle(self, ended: Sequence[EndedAttempt]) -> None:
        """Let the families of runs go on whose ends are committed; `look_at_families` repeats what fails."""
        ends = [attempt for attempt in ended if attempt.is_child or attempt.has_children]
        if not ends:
            return
        over = [attempt.run_id for attempt in ends if attempt.is_child and attempt.final]
        parked = [attempt.run_id for attempt in ends if attempt.reason == "children"]
        # One that would wait again has ended if its own parent has failed.
        parents = [a.run_id for a in ends if a.has_children and (a.final or a.is_child)]
        again = [attempt.run_id for attempt in ends if attempt.is_child and not attempt.final]
        self._ended_children.add(over)
        with suppress(StoreUnavailable):
            if parked:
                await self.database.call(families.settle, (), parked)
            if parents:
                await self.database.call(families.orphan, parents)
            if again:
                # Their parents may have failed at the same time.
                await self.database.call(families.orphan_waiting, again)

    async def families_settled(self) -> None:
        """Return once the families of all children that have ended here may go on."""
        await self._ended_children.finish()

    async def look_at_families(self) -> int:
        """Do what `_settle` would have done for workers that died before; returns how many runs changed."""
        looked = await self.database.call(families.look, self._families_after)
        ended = await self.database.call(families.orphan_found, looked.found) if looked.found else 0
        if ended < families.CANCELLED:  # else it left some
            self._families_after = looked.after
        return looked.changed + ended

    async def _charge(self, ended: Sequence[EndedAttempt]) -> None:
        """Count the run seconds of orgs that have a budget for them."""
        holding = self._budgets.holding
        if holding and (timed := [attempt for attempt in ended if attempt.org_id in holding]):
            self.report(await self.database.call(spending.charge_seconds, timed))

    async def look_at_budgets(self) -> None:
        """Learn of budgets that were added, changed or removed; now and then also of orgs' new tags."""
        self._looks += 1
        known = None if self._looks % LOOK_AGAIN == 0 else self._budgets
        self._budgets = await self.database.call_autocommit(budgets.watched, ALL_ORGS, known)
        if self._prices is not None:
            newest = await self.database.call_autocommit(prices.newest_list)
            if (None if newest is None else newest["digest"]) != self._prices[1]:
                self._prices = await self.database.call_autocommit(prices.load, self._own_prices)

    async def prices(self) -> Prices:
        """The prices with the newest price list, which is loaded when a run first uses a model."""
        if self._prices is None:
            self._prices = await self.database.call_autocommit(prices.load, self._own_prices)
        return self._prices[0]

    async def look_at_rollouts(self) -> None:
        """Learn of rollouts that were added or changed."""
        self.rollouts.take(await self.database.call_autocommit(rollouts.known))

    async def keep_version(self, ask: VersionAsk) -> RunVersion | None:
        """The version of a run that starts, stored with it, fenced; None if the run is no longer ours.

        Runs that start together share a transaction.
        """
        return await self._versions.of(ask)

    async def kept_version(self, run_id: RunId) -> str | None:
        """The handler that a run has got by a rollout, or None."""
        return await self.database.call_autocommit(rollouts.kept, run_id)

    async def look_at_pools(self) -> Mapping[str, Declared]:
        """Learn the rules that other workers stored; returns where handlers ask to run."""

        def read(connection: Connection) -> tuple[Rules, Mapping[str, Declared]]:
            return pools.rules(connection), host_handlers.declared(connection)

        stored, declared = await self.database.call_autocommit(read)
        self._take_rules(stored)
        return declared

    async def count_waiting(self) -> None:
        """Report the backlog of each pool that this worker serves, or where runs have waited."""
        found = await self.database.call_autocommit(pools.waiting)
        self._waited |= found.keys()
        for pool in sorted(self._waited.union(self._pools)):
            emit("pool.counted", pool=pool, waiting=found.get(pool, 0))

    def _take_rules(self, stored: Rules) -> None:
        """Enforce these rules too, and take no run of a pool for which this worker has others."""
        known, self.pool_rules.stored = self.pool_rules.differing, stored
        for pool in sorted(self.pool_rules.differing - known):
            emit("pool.rules_differ", pool=pool, rules=self.pool_rules.own[pool], stored=stored.get(pool, {}))
        self._admission.pools = self.pool_rules.usable(self._pools)

    def is_limited(self, org_id: OrgId) -> bool:
        """Whether an org has a budget that its runs check before steps and spends."""
        return org_id in self._budgets.limiting

    @property
    def limits_in_claims(self) -> bool:
        """Whether a budget takes its limit from the tokens."""
        return bool(self._budgets.properties)

    async def note_claims(self, org_id: OrgId, claims: Claims) -> None:
        """Store the limits that an enforced token has, once for each token."""
        names = sorted(self._budgets.properties)
        seen = (claims.issued_at, tuple(limit_in(claims.properties, name) for name in names))
        if self._limits_of.get(org_id) == seen:
            return
        await self.database.call(budgets.store_properties, org_id, claims, names)
        self._limits_of[org_id] = seen
        self._limits_of.move_to_end(org_id)
        if len(self._limits_of) > LIMITS_KEPT:
            self._limits_of.popitem(last=False)

    async def spend(
        self, run: AdmittedRun, meter: str, amount: int, key: str, used: ModelUsage | None = None
    ) -> spending.RunBudgets | None:
        """Count a spend, fenced, once for each key; None if the run is no longer ours."""
        if used is None:
            found = await self.database.call(spending.spend, run, meter, amount, key)
        else:
            found = await self.database.call(
                spending.spend, run, meter, amount, key, used, await self.prices()
            )
        if found is not None and found.counted is not None:
            self.report(found.counted)
        return found

    @staticmethod
    def report(counted: spending.CountedSpends) -> None:
        """Emit what was counted: budgets that warn, models without a price, and what was used."""
        for meter, amount in counted.spent.items():
            emit("meter.spent", meter=meter, amount=amount)
        for level in counted.warned:
            emit(
                "budget.warned",
                org=level.budget.org,
                meter=level.budget.meter,
                per=level.budget.per,
                used=level.used,
                limit=level.budget.limit,
            )
        for level, at in counted.ahead:
            period = level.budget.period
            emit(
                "budget.forecast",
                org=level.budget.org,
                meter=level.budget.meter,
                per=level.budget.per,
                used=money_text(level.used),
                limit=money_text(level.budget.limit or 0),
                reaches_at=to_text(at),
                resets_at=None if period is None else to_text(period.end),
            )
        for found in counted.unpriced:
            emit("price.missing", org=found.org, provider=found.provider, model=found.model)
        sums: Counter[tuple[str, str, str]] = Counter()
        for costed in counted.costed:
            for line in costed.priced.kinds:
                of = line.kind, costed.priced.tariff
                sums["units", *of] += line.units
                sums["money", *of] += line.money or 0
        for _, kind, tariff in [key for key in sums if key[0] == "units"]:
            units, money = (sums[what, kind, tariff] for what in ("units", "money"))
            emit("model.used", kind=kind, tariff=tariff, units=units, money=money / NANO)

    async def save_checkpoint(self, run: AdmittedRun, handler: str, data_json: str, number: int = 0) -> bool:
        """Store a run's checkpoint, its attempt's save `number`; False if the run is no longer ours."""
        return await self.database.call(
            lambda connection: statements(connection).save_checkpoint(
                connection, run, handler, data_json, number=number
            )
        )

    async def start_children(
        self,
        run: AdmittedRun,
        new: Sequence[NewChild],
        *,
        cap: FamilyCap,
        keep: bool,
        isolations: Mapping[str, Isolation],
    ) -> Sequence[PlacedChild] | None:
        """Store children of a run, fenced; None if it was not ours.

        Raises:
            StepError: a limit is reached.
            Unavailable: the run is being cancelled.
        """
        placed = await self.database.call(children.start, run, new, cap=cap, keep=keep, isolations=isolations)
        if placed == "cancelled":
            raise Unavailable("the run is being cancelled, and starts no others")
        return placed if isinstance(placed, list) else None

    async def cap_of(self, run: AdmittedRun) -> FamilyCap | None:
        """What the parent of a child allows it, or did up to `CAP_KEPT` seconds ago."""
        return None if run.parent_id is None else await self._caps.of(run.parent_id)

    read_children = in_autocommit(children.read)
    read_ended = in_transaction(children.read_ended)
    caps_of = in_autocommit(children.caps_of)
    keep_versions = in_transaction(rollouts.keep_versions)
    budgets_of = in_autocommit(spending.states_of)
    load_progress = in_autocommit(load_progress)
    load_steps = in_autocommit(steps.load_steps)
    step_totals = in_autocommit(steps.step_totals)
    log_size = in_autocommit(hosts.log_size)
    live_workers = in_autocommit(workers.live_workers)
    orgs_and_definitions = in_autocommit(run_contexts)

    async def store_steps(self, rows: Sequence[RunStep]) -> set[tuple[RunId, int]]:
        """Store steps with their spends, fenced; returns the runs, with fencing tokens, that still run."""
        if any(row.step.used for row in rows):
            ours, counted = await self.database.call(spending.store_steps, rows, await self.prices())
            self.report(counted)
            return ours
        if any(row.step.spends for row in rows):
            ours, counted = await self.database.call(spending.store_steps, rows)
            self.report(counted)
            return ours
        return await self.database.call(
            lambda connection: statements(connection).store_steps(connection, rows)
        )

    async def load_state(self, run: AdmittedRun) -> LoadedState:
        """The state of a running run's definition."""
        # On SQLite a read outside the queue of writers sees each change of a state, or precedes it.
        is_sqlite = self.database.dialect == "sqlite"
        call = self.database.call_autocommit if is_sqlite else self.database.call
        return await call(states.load, run)

    async def write_progress(self, rows: Sequence[Progress]) -> None:
        """Set the progress of running runs, fenced."""
        await self.database.call(lambda connection: statements(connection).write_progress(connection, rows))

    async def append_logs(self, rows: Sequence[LogLine]) -> None:
        """Append lines to runs' logs."""
        await self.database.call(lambda connection: statements(connection).append_logs(connection, rows))

    async def recover(self, still: Callable[[], bool], *, max_recoveries: int = 3) -> list[Recovered]:
        """Take over the runs of workers that are gone, if `still` holds once the database has answered."""
        return await self.database.call(
            workers.recover, max_recoveries=max_recoveries, by=self._worker_id, still=still
        )

    async def recover_all_others(self, *, max_recoveries: int = 3) -> list[Recovered]:
        """Take over the runs of every other worker: at the start of a SQLite file's one worker."""
        recovered: list[Recovered] = []
        while part := await self.database.call(
            workers.recover,
            max_recoveries=max_recoveries,
            by=self._worker_id,
            others_than=self._worker_id,
        ):
            recovered += part
        return recovered

    async def hand_back(self, owned: Sequence[OwnedRun]) -> set[RunId]:
        """Let runs wait again that this worker owns but does not know."""
        return await self.database.call(workers.hand_back, self._worker_id, owned)

    async def sweep(self) -> list[Swept]:
        """Promote held runs and skip expired ones; returns the expired ones."""
        await self.database.call(sweeps.promote_held)
        return await self.database.call(sweeps.expire_overdue)

    async def open_wait(self, run: AdmittedRun, wait: NewWait) -> WaitState | None:
        """Store what a run waits for; None if the run is no longer ours."""
        if wait.children is not None:
            return await self.database.call(families.open_wait, run, wait)
        state = await self.database.call(
            lambda connection: statements(connection).open_wait(
                connection, run.id, run.fencing_token, attempt=run.attempt, wait=wait
            )
        )
        is_pending = state is not None and state.state == "pending"
        if wait.kind == "budget" and is_pending and await self.database.call(spending.end_raised, run, wait):
            return WaitState(wait.kind, "over")
        return state

    async def wake_parked(self) -> int:
        """Let runs go on whose first deadline has passed; returns how many."""
        woken = 0
        while await self.database.call_autocommit(sweeps.is_any_due):
            part = await self.database.call(sweeps.wake_due)
            woken += part
            if part == 0:  # another worker has them
                break
        return woken

    async def upcoming(
        self, after: firing.Place | None, ahead: timedelta, limit: int
    ) -> tuple[datetime, Sequence[Upcoming]]:
        """The database's time, and what is due within `ahead` of it, after this place."""

        def read(connection: Connection) -> tuple[datetime, Sequence[Upcoming]]:
            now = database_now(connection)
            place = (now, DefinitionId(BEFORE_ALL)) if after is None else after
            return now, firing.upcoming(connection, ALL_ORGS, place, now + ahead, limit)

        return await self.database.call_autocommit(read)

    async def mark_no_handler(self) -> None:
        """Mark waiting runs whose handler no worker offers, and unmark others; some at each call."""
        _, self._marked_until = await self.database.call(sweeps.mark_no_handler, self._marked_until)

    forget_runs = in_transaction(sweeps.forget_runs)
    forget_parts = in_transaction(sweeps.forget_parts)
    forget_trees = in_transaction(sweeps.forget_trees)
    forget_skips = in_transaction(sweeps.forget_skips)
    forget_late = in_transaction(deadlines.forget_late)
    forget_logs = in_transaction(sweeps.forget_logs)
    forget_starts = in_transaction(starts.forget)
    forget_counters = in_transaction(budgets.forget_counters)
    forget_shares = in_transaction(limits.forget_idle)
    forget_workers = in_transaction(workers.forget_workers)

    async def handlers_changed(self, handlers: Sequence[str]) -> None:
        """Set the handlers that this worker offers."""
        await self.database.call(workers.update_handlers, self._worker_id, handlers)

    async def org_and_definition(self, run: AdmittedRun) -> RunContext:
        """The org and the definition of a run; runs that start together share a query.

        Raises:
            NotFound: one of them is gone.
        """
        context = await self._contexts.of((run.definition_id, run.revision))
        if context is None:
            raise NotFound(f"the org, the definition or the revision of run {run.id} is gone")
        return context

    def register(self, *, version: str, handlers: Sequence[str], capacity: Mapping[str, Any]) -> None:
        """Start this incarnation."""
        with self.database.transaction() as connection:
            workers.register(
                connection,
                self._worker_id,
                host=socket.gethostname(),
                pid=os.getpid(),
                version=version,
                lease=self._lease,
                handlers=handlers,
                capacity=capacity,
                pools=self._pools,
            )
            self._budgets = budgets.watched(connection, ALL_ORGS)
            self.rollouts.take(rollouts.known(connection))
            stored, changed = pools.store_rules(connection, self.pool_rules.own, by=socket.gethostname())
        for pool in changed:
            emit("pool.rules_changed", pool=pool, rules=stored[pool])
        self.pool_rules.stored = stored
        self._take_rules(stored)

    def renew(self) -> tuple[bool, list[OwnedRun]]:
        """Extend the lease and return the runs it covers; False if this incarnation was ended."""
        with self._heartbeat_database.transaction() as connection:
            return statements(connection).renew(connection, self._worker_id, self._lease)

    async def leave(self) -> None:
        """Give up the lease. Families of children that have ended here do not wait for another worker."""
        await self.families_settled()
        await self.database.run(self.unregister)

    def unregister(self) -> None:
        """End this incarnation."""
        with self.database.transaction() as connection:
            workers.unregister(connection, self._worker_id)


class _SpecCache(OrderedDict[tuple[DefinitionId, int], Mapping[str, Any]]):
    """Specs by definition and revision; drops the oldest one when it is full."""

    def __setitem__(self, key: tuple[DefinitionId, int], value: Mapping[str, Any]) -> None:
        super().__setitem__(key, value)
        if len(self) > SPECS_KEPT:
            self.popitem(last=False)
