"""Defences taken out of the product, one at a time: the simulator must notice each that it can show.

Each is cut in code that no double replaces. `where` is the database on which it can show.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import inf
from typing import Any
from unittest.mock import patch

import psycopg
from sqlalchemy import and_, text

from worker.engine.attempt.inflight import InflightRuns
from worker.engine.incarnation import Incarnation
from worker.engine.loops import finisher, reconciler
from worker.engine.loops.heartbeat import Heartbeat
from worker.engine.loops.reconciler import Renewal
from worker.errors import Unavailable
from worker.features.egress.attempts import ServedAttempt as BrokerAttempt
from worker.features.egress.lanes import LimitLane
from worker.features.egress.pacing import Pacer
from worker.guard import decode
from worker.handlers import steps as handler_steps
from worker.model.runs import lease
from worker.store import credentials, edit_runs, spending, waits
from worker.store.sql import contract, postgresql, sqlite
from worker.store.sql.postgresql import admit as pg_admit
from worker.store.sql.postgresql import fire as pg_fire
from worker.store.sql.postgresql import leases as pg_leases
from worker.store.sql.postgresql import steps as pg_steps
from worker.tokens.acquirer import Acquirer

# The packages export functions of these names.
pg_finish: Any = sys.modules["worker.store.sql.postgresql.finish"]
sqlite_finish: Any = sys.modules["worker.store.sql.sqlite.finish"]

Cut = Callable[[ExitStack, str], None]
BOTH = ("sqlite", "postgresql")


@dataclass(frozen=True)
class Ablation:
    """`cut` takes the defence out until the stack is closed; it is given the URL of the database."""

    name: str
    cut: Cut
    where: Sequence[str]
    what: str


ABLATIONS: dict[str, Ablation] = {}


def ablation(what: str, *where: str) -> Callable[[Cut], Cut]:
    def add(cut: Cut) -> Cut:
        name = cut.__name__.replace("_", "-")
        ABLATIONS[name] = Ablation(name, cut, where or BOTH, what)
        return cut

    return add


def without(stack: ExitStack, module: Any, name: str, part: str, instead: str = "") -> None:
    """Cut a part out of a statement. An AssertionError if it is not there: then this file is out of date."""
    whole: str = getattr(module, name)
    assert part in whole, f"{module.__name__}.{name} has no {part!r}"
    stack.enter_context(patch.object(module, name, whole.replace(part, instead)))


def drop_index(url: str, name: str) -> None:
    if url.startswith("sqlite"):
        with sqlite3.connect(url.removeprefix("sqlite:///")) as file:
            file.execute(f"DROP INDEX {name}")
        return
    with psycopg.connect(url, autocommit=True) as server:
        server.execute(f"DROP INDEX {name}".encode())


# The ten of the issue.


@ablation("the fencing comparison in the end of a run: token and owner")
def end_fence(stack: ExitStack, url: str) -> None:
    def end_runs(ended: Any, locked: Any, now: Any) -> Any:
        given = {attempt.run_id: attempt.fencing_token for attempt in ended}
        forged = {run: replace(row, fencing_token=given[run]) for run, row in locked.items() if run in given}
        return real(list(ended), forged, now)

    real = contract.end_runs
    stack.enter_context(patch.object(sqlite_finish, "end_runs", end_runs))
    without(stack, sqlite_finish, "OWNED", "AND l.worker_id = ?", "AND ? IS NOT NULL")
    stack.enter_context(patch.object(pg_finish, "end_runs", end_runs))
    owned = "AND l.worker_id IS NOT DISTINCT FROM %s::uuid"
    for name in ("LOCK", "END", "END_WITH_STATES"):
        without(stack, pg_finish, name, owned, "AND %s::uuid IS NOT NULL")
    for name in ("END", "END_WITH_STATES"):
        whole: str = getattr(pg_finish, name)
        cut = whole.replace("AND ((l.id, l.fencing_token) IN (SELECT id, fencing_token FROM e)) IS TRUE", "")
        cut = cut.replace("ON e.id = l.id AND e.fencing_token = l.fencing_token", "ON e.id = l.id")
        stack.enter_context(patch.object(pg_finish, name, cut))


@ablation("the fencing comparison in a checkpoint", "postgresql")
def checkpoint_fence(stack: ExitStack, url: str) -> None:
    without(stack, sqlite_finish, "OURS", "AND fencing_token = ? AND state = 'running'", "AND ? IS NOT NULL")
    without(
        stack,
        sqlite_finish,
        "SAVE",
        "WHERE fencing_token < excluded.fencing_token OR number <= excluded.number",
    )
    without(
        stack,
        pg_finish,
        "SAVE",
        "AND fencing_token = %(token)s AND state NOT IN ('waiting', 'held', 'parked')",
    )
    without(
        stack,
        pg_finish,
        "SAVE",
        "WHERE checkpoints.fencing_token < excluded.fencing_token OR checkpoints.number <= excluded.number",
    )


@ablation("the fencing comparison in a step", "postgresql")
def step_fence(stack: ExitStack, url: str) -> None:
    without(stack, pg_steps, "STORE", " AND ours.fencing_token = e.fencing_token\n  ON", "\n  ON")
    for package in (sqlite, postgresql):
        stack.enter_context(patch.object(package, "store_steps", _for_any_owner(package.store_steps)))


def _for_any_owner(real: Any) -> Any:
    def store_steps(connection: Any, rows: Any, **keys: Any) -> Any:
        ours = real(connection, rows, **keys)
        running = {run for run, _ in ours}
        return ours | {(row.run.id, row.run.fencing_token) for row in rows if row.run.id in running}

    return store_steps


@ablation("the unique index of a scheduled time", "postgresql")
def unique_instant(stack: ExitStack, url: str) -> None:
    drop_index(url, "uq_runs_definition_id_scheduled_for")
    without(stack, pg_fire, "LOCK", "FOR UPDATE SKIP LOCKED")
    without(stack, pg_fire, "INSERT", "n.origin <> 'schedule' OR (", "true OR (")


@ablation("the lock of admission", "postgresql")
def admission_lock(stack: ExitStack, url: str) -> None:
    stack.enter_context(patch.object(pg_admit, "LOCK", "SELECT %s::bigint"))


@ablation("counting in a later statement than the lock", "postgresql")
def later_count(stack: ExitStack, url: str) -> None:
    """One snapshot for both: that of the statement that waits for the lock."""
    real = pg_admit._locked

    def locked(connection: Any, statement: str, values: Any) -> Any:
        pg_admit.driver(connection).execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        return real(connection, statement, values)

    stack.enter_context(patch.object(pg_admit, "_locked", locked))


@ablation("freezing at 80 % of the lease")
def freeze(stack: ExitStack, url: str) -> None:
    stack.enter_context(patch.object(lease, "FREEZE_AT", 50.0))


@ablation("one lease of contact before recovery", "postgresql")
def contact(stack: ExitStack, url: str) -> None:
    stack.enter_context(patch.object(Incarnation, "may_recover", lambda incarnation: True))


@ablation("the numbering of saves", "postgresql")
def save_numbers(stack: ExitStack, url: str) -> None:
    without(stack, sqlite_finish, "SAVE", "OR number <= excluded.number", "OR TRUE")
    without(stack, pg_finish, "SAVE", "OR checkpoints.number <= excluded.number", "OR TRUE")


# Ten of ours.


@ablation("the expiry of a lease before its runs are taken", "postgresql")
def lease_expiry(stack: ExitStack, url: str) -> None:
    without(stack, pg_leases, "END", "OR lease_until < (SELECT clock_timestamp())", "OR true")


@ablation("a lost lease is noticed: the renewal of an ended incarnation fails", "postgresql")
def lost_lease(stack: ExitStack, url: str) -> None:
    for name in ("RENEW", "AS_JSON"):
        whole: str = getattr(pg_leases, name)
        assert "AND ended_at IS NULL" in whole
        cut = whole.replace("AND ended_at IS NULL", "")
        stack.enter_context(patch.object(pg_leases, name, cut))


@ablation("runs of others are killed before the rest is thawed")
def kill_first(stack: ExitStack, url: str) -> None:
    async def reconcile(self: Any, renewal: Renewal) -> None:
        held = {run.id: run.fencing_token for run in renewal.owned}
        forged = Renewal(held, renewal.owned, renewal.registered, renewal.lease)
        await real(self, forged)

    real = reconciler.Reconciler.reconcile
    stack.enter_context(patch.object(reconciler.Reconciler, "reconcile", reconcile))
    stack.enter_context(patch.object(Renewal, "all_ours", property(lambda renewal: True)))


@ablation("a run whose admission was not answered is handed back")
def hand_back(stack: ExitStack, url: str) -> None:
    async def nothing(self: Any, owned: Any) -> None:
        return

    from worker.store.worker_store import WorkerStore

    stack.enter_context(patch.object(WorkerStore, "hand_back", nothing))


@ablation("an end waits for a database that is away")
def ends_wait(stack: ExitStack, url: str) -> None:
    real = finisher.Finisher._write

    async def write(self: Any, batch: Any) -> None:
        try:
            self._report(batch, await self.store.finish(batch))
        except Unavailable:
            self._report(batch, set())
        except Exception:
            await real(self, batch)

    stack.enter_context(patch.object(finisher.Finisher, "_write", write))


@ablation("a request key makes one run")
def request_key(stack: ExitStack, url: str) -> None:
    drop_index(url, "uq_runs_definition_id_request_key")
    stack.enter_context(patch.object(edit_runs, "find_by_request_key", lambda *args: None))


@ablation("one unfinished run at a time where schedules must not overlap")
def overlap(stack: ExitStack, url: str) -> None:
    drop_index(url, "uq_live_runs_serial")
    without(
        stack,
        pg_fire,
        "INSERT",
        "ON CONFLICT (definition_id) WHERE serial AND state IN ('waiting', 'running', 'parked') DO NOTHING",
    )


@ablation("a stored step is not called again")
def replay(stack: ExitStack, url: str) -> None:
    def add(self: Any, page: Any) -> None:
        self.complete = True

    stack.enter_context(patch.object(handler_steps.StepJournal, "add", add))


@ablation("a spend counts once")
def spend_once(stack: ExitStack, url: str) -> None:
    real = spending.record

    def record(connection: Any, spends: Any, now: Any) -> Any:
        counted = real(connection, spends, now)
        for given in spends:
            connection.execute(
                text("UPDATE meter_days SET used = used + :amount WHERE org_id = :org AND meter = :meter"),
                {"amount": given.amount, "org": given.org_id, "meter": given.meter},
            )
        return counted

    stack.enter_context(patch.object(spending, "record", record))


@ablation("a token of another org is refused")
def org_of_token(stack: ExitStack, url: str) -> None:
    from worker.engine.attempt import attempt
    from worker.tokens import acquirer

    def enforce(claims: Any, **want: Any) -> None:
        real(claims, **(want | {"org_code": claims.org_code}))

    real = decode.enforce
    for module in (attempt, acquirer):
        stack.enter_context(patch.object(module, "enforce", enforce))


@ablation("the first answer counts")
def first_answer(stack: ExitStack, url: str) -> None:
    from worker.operations import answers

    real = waits.find

    def find(*args: Any) -> Any:
        found = real(*args)
        return found and {**found, "answered_at": None}

    stack.enter_context(patch.object(answers.waits, "find", find))


@ablation("a heartbeat that failed is tried again before the lease ends")
def heartbeat_retry(stack: ExitStack, url: str) -> None:
    real = Heartbeat.beat

    def beat(self: Any) -> Any:
        found = real(self)
        if found is None:
            self._stop.wait(self.duration.total_seconds())
        return found

    stack.enter_context(patch.object(Heartbeat, "beat", beat))


# Of requests to other services.


@ablation("what waits in a broker ends with a freeze: its queue, its streams and its leave to send")
def queue_kept(stack: ExitStack, url: str) -> None:
    stack.enter_context(patch.object(Pacer, "stop", lambda pacer: None))
    stack.enter_context(patch.object(BrokerAttempt, "close_streams", lambda attempt: None))


@ablation("a token of a limit ends a second after it was leased")
def share_without_end(stack: ExitStack, url: str) -> None:
    def answered(lane: Any, question: Any, share: Any, now: float) -> None:
        real(lane, question, share._replace(until=inf), now)

    real = LimitLane.answered
    stack.enter_context(patch.object(LimitLane, "answered", answered))


@ablation("requests wait for the end of a pause that a service asks for")
def service_pause(stack: ExitStack, url: str) -> None:
    stack.enter_context(patch.object(Pacer, "pause", lambda pacer, org, origin, seconds: None))


# What the simulator has found: the defect is back.


@ablation("a run that was handed back is not started when its admission is answered late")
def late_admission(stack: ExitStack, url: str) -> None:
    def add(held: Any, run: Any) -> Any:
        if (replaced := held.get(run.id)) is not None:
            held.release(replaced)
        return real(held, run)

    real = InflightRuns.add
    stack.enter_context(patch.object(InflightRuns, "is_late", lambda held, run: False))
    stack.enter_context(patch.object(InflightRuns, "add", add))


@ablation("a budget that is raised before a wait for it is stored ends that wait")
def raised_before(stack: ExitStack, url: str) -> None:
    stack.enter_context(patch.object(spending, "end_raised", lambda *args: False))


@ablation("a token that expired since it was received is requested again", "sqlite")
def outlived(stack: ExitStack, url: str) -> None:
    stack.enter_context(patch.object(Acquirer, "_is_outlived", lambda *args: False))


@ablation("many runs that change are locked in the order of ids", "postgresql")
def lock_order(stack: ExitStack, url: str) -> None:
    for module in (edit_runs, credentials):
        stack.enter_context(patch.object(module, "in_order", lambda *which: and_(*which)))
