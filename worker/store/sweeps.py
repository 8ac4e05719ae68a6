"""Sweeps: regular changes of stored runs that expired, are held, lack a handler, or are old."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import ARRAY, Connection, bindparam, delete, literal_column, select, text, update

from worker.ids import ALL_ORGS, OrgId, RunId, Scope
from worker.model.runs.causes import kept_reason
from worker.model.runs.run import Swept
from worker.store import host_grants, tables
from worker.store.bulk import among
from worker.store.definitions import names_of
from worker.store.dialect import (
    Instant,
    above,
    chunks,
    database_now,
    file_now,
    in_scope,
    is_postgresql,
)
from worker.store.sql import statements
from worker.store.sql.contract import Rollups

# `min` uses the index; "is any less" would read every org.
_PENDING = """
SELECT COALESCE((SELECT min(templates_seen) FROM orgs)
                < CAST((SELECT value FROM facts WHERE name = 'templates_change') AS BIGINT), false)
       OR EXISTS (SELECT 1 FROM templates WHERE materialised_at IS NULL),
       EXISTS (SELECT 1 FROM backfills WHERE finished_at IS NULL),
       EXISTS (SELECT 1 FROM deadlines WHERE deadline_at <= {now}),
       (SELECT count(*) FROM (SELECT 1 FROM late_definitions LIMIT {most}) counted)
"""
# Late definitions that are counted.
MAX_LATE = 10_000
# The clock is in a subquery: called once, it can be compared along an index.
_NOW = {"postgresql": "(SELECT clock_timestamp())", "sqlite": ":now"}


class Pending(NamedTuple):
    """Whether orgs are behind the templates, backfills are unfinished, and deadlines have passed.

    `late` is the number of late definitions, up to MAX_LATE.
    """

    templates: bool
    backfills: bool
    deadlines: bool
    late: int


def pending(connection: Connection) -> Pending:
    """What there is to do now, in one query."""
    query = text(_PENDING.format(now=_NOW[connection.dialect.name], most=MAX_LATE))
    if not is_postgresql(connection):
        query = query.bindparams(bindparam("now", file_now(connection), type_=Instant()))
    templates, backfills, deadlines, late = connection.execute(query).one()
    return Pending(bool(templates), bool(backfills), bool(deadlines), late)


# Rows that one transaction changes, and small ones that it deletes.
BATCH = 500
PARTS = 5_000
# Unfinished runs that one call of `mark_no_handler` checks.
CHECKED = 5_000

_live = tables.live_runs
_runs = tables.runs


# The reasons that it sets, and clears again.
MARKED = ("no_pool", "no_handler", "not_approved")


def mark_no_handler(connection: Connection, after: RunId | None = None) -> tuple[int, RunId | None]:
    """Set the reason of due runs that no worker would admit, and clear it once one would.

    It is `no_pool` if none serves their pool, which is then the detail, else `no_handler` if none of those
    that do offers their handler, or `not_approved` if only hosts do that declare too much: the detail is then
    the command that approves it. Looks at `CHECKED` unfinished runs after `after`. Returns how many rows
    changed, and the run to continue after, or None at the end. Admission does not read the reason: it is
    for people.
    """
    now = database_now(connection)
    serving = host_grants.serving(connection)
    columns = (
        *(_live.c[name] for name in ("id", "handler", "variant_handlers", "pool", "reason", "detail")),
        *(_live.c[name] for name in ("definition_id", "revision")),
    )
    # Parked runs may be many: a call looks at a bounded number of rows, whatever their state.
    following = above(_live.c.id, after)
    looked_at = select(_live.c.id).where(*following).order_by(_live.c.id)
    last = connection.execute(looked_at.offset(CHECKED - 1).limit(1)).scalar_one_or_none()
    # `state NOT IN` means waiting, but matches no partial index, so rows come in the order of ids.
    query = select(*columns, _live.c.attempt).where(_live.c.state.not_in(("running", "held", "parked")))
    query = query.where(_live.c.available_at <= now, *following).order_by(_live.c.id)
    rows = connection.execute(query if last is None else query.where(_live.c.id <= last)).all()
    obstacles = _Obstacles(connection, serving, rows)
    wrong: dict[tuple[str, str | None], list[RunId]] = {}
    for row in rows:
        marked = obstacles.of(row)
        if _is_marked(row, marked):
            continue
        wrong.setdefault(marked or ("due" if row.attempt == 0 else "retry", None), []).append(row.id)
    changed = 0
    for (reason, detail), ids in wrong.items():
        for part in chunks(ids):
            changed += _mark(connection, part, reason, detail)
    return changed, last


def _is_marked(row: Any, marked: tuple[str, str | None] | None) -> bool:
    """Whether a run has the reason that it should have; the command that approves a handler may change."""
    if marked is None or row.reason != marked[0]:
        return marked is None and row.reason not in MARKED
    return marked[0] != "not_approved" or row.detail == marked[1]


class _Obstacles:
    """Why no worker would admit a run: reason and detail, or None if one would."""

    def __init__(
        self, connection: Connection, serving: Sequence[host_grants.Serving], rows: Sequence[Any]
    ) -> None:
        self._serving = serving
        self._known: dict[tuple[Any, ...], tuple[str, str | None] | None] = {}
        self._in_pool: dict[str, list[host_grants.Serving]] = {}
        for pool in {row.pool for row in rows}:
            self._in_pool[pool] = [one for one in serving if pool in one.pools]
        conditional = {(row.definition_id, row.revision) for row in rows if self._is_conditional(row)}
        self._specs = host_grants.specs(connection, conditional)

    def _is_conditional(self, row: Any) -> bool:
        return host_grants.conditional(self._in_pool[row.pool], _needed(row))

    def of(self, row: Any) -> tuple[str, str | None] | None:
        handlers = _needed(row)
        revision = (row.definition_id, row.revision)
        key = (row.pool, *handlers, revision if revision in self._specs else None)
        if key not in self._known:
            self._known[key] = self._look(row.pool, handlers, self._specs.get(revision, {}))
        return self._known[key]

    def _look(
        self, pool: str, handlers: Sequence[str], own: Mapping[str, Any]
    ) -> tuple[str, str | None] | None:
        if not (in_pool := self._in_pool[pool]):
            return "no_pool", pool
        found = host_grants.obstacle(in_pool, handlers, own)
        if found is None:
            return None
        return ("not_approved", found) if found else ("no_handler", None)


def _needed(row: Any) -> tuple[str, ...]:
    """The handlers that a run may be of, its definition's first."""
    return (row.handler, *(name for name in row.variant_handlers or () if name != row.handler))


def _mark(connection: Connection, ids: Sequence[RunId], reason: str, detail: str | None) -> int:
    """Set the reason of those of these runs that still wait and are not locked."""
    waiting = (_live.c.id.in_(ids), _live.c.state == "waiting")
    rows = select(_live.c.id).where(*waiting).order_by(_live.c.id).with_for_update(skip_locked=True)
    locked = connection.execute(rows).scalars().all()
    changed = update(_live).where(_live.c.id.in_(locked)).values(reason=reason, detail=detail)
    return connection.execute(changed).rowcount


def expire_overdue(connection: Connection) -> list[Swept]:
    """Skip waiting runs whose start deadline passed before their handler started."""
    query = (
        select(_live.c.id)
        .where(
            _live.c.state == "waiting",
            _live.c.start_by.is_not(None),
            _live.c.start_by < database_now(connection),
        )
        .limit(BATCH)
    )
    overdue = connection.execute(query).scalars().all()
    return end_waiting(connection, ALL_ORGS, overdue, state="skipped", reason="expired")


def promote_held(connection: Connection) -> int:
    """Let held runs wait whose definition has no other unfinished run; returns how many."""
    return statements(connection).promote(connection, None)


def wake_due(connection: Connection) -> int:
    """Let parked runs wait for a slot whose first deadline has passed; returns how many."""
    return statements(connection).wake_due(connection, limit=BATCH)


def is_any_due(connection: Connection) -> bool:
    """Whether the deadline of a parked run has passed."""
    due = (_live.c.state == literal_column("'parked'"), _live.c.available_at <= database_now(connection))
    return connection.execute(select(_live.c.id).where(*due).limit(1)).first() is not None


class EndCounts:
    """Ends of runs to add to the sums of their orgs in one step, so that two writers cannot deadlock."""

    def __init__(self) -> None:
        self._days: Counter[OrgId] = Counter()
        self._hours: Counter[tuple[OrgId, str]] = Counter()

    def __bool__(self) -> bool:
        return bool(self._days)

    def add(self, org_id: OrgId, state: str, *, is_child: bool = False) -> None:
        """Count the end of one run."""
        self._days[org_id] += 1
        if not is_child:
            self._hours[org_id, state] += 1

    def write(self, connection: Connection, *, at: datetime) -> None:
        """Add to the sums. An end locks its runs first: the transaction may lock no live run after that."""
        hour = at.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
        days = [(hour.date(), org_id, runs, 0, 0) for org_id, runs in sorted(self._days.items())]
        hours = [(hour, org_id, state, runs) for (org_id, state), runs in sorted(self._hours.items())]
        statements(connection).add_rollups(connection, Rollups(days, hours))


def end_waiting(
    connection: Connection,
    scope: Scope,
    run_ids: Sequence[RunId],
    *,
    state: str,
    reason: str,
    counts: EndCounts | None = None,
) -> list[Swept]:
    """End those of these runs that no process runs, of one org or of all, without another attempt.

    With `counts`, the caller writes the sums.
    """
    mine = in_scope(_live.c.org_id, scope)
    ended: list[Swept] = []
    counted = EndCounts() if counts is None else counts
    for part in chunks(sorted(run_ids)):
        rows = connection.execute(
            select(_live)
            .where(*mine, among(connection, _live.c.id, part), _live.c.state.in_(tables.UNSTARTED))
            .order_by(_live.c.id)
            .with_for_update()
        ).all()
        if not rows:
            continue
        ids = {row.definition_id for row in rows}
        names = names_of(connection, scope, ids)
        now = database_now(connection)
        connection.execute(
            delete(_live).where(*mine, among(connection, _live.c.id, [row.id for row in rows]))
        )
        for row in rows:
            connection.execute(
                update(_runs)
                .where(_runs.c.id == row.id, _runs.c.org_id == row.org_id, _runs.c.state.is_(None))
                .values(
                    state=state,
                    reason=reason,
                    # What it waited for: without that, an expired run would only say that no worker was free.
                    detail=kept_reason(row.reason, row.detail) if reason == "expired" else None,
                    available_at=row.available_at,
                    finished_at=now,
                    attempt=row.attempt,
                    result_fencing_token=row.fencing_token,
                    progress=row.progress,
                )
            )
            named = names[row.definition_id]
            ended.append(Swept(row.id, row.org_id, row.definition_id, *named, row.attempt, state, reason))
            counted.add(row.org_id, state, is_child=row.origin == "child")
    if ended:
        if counts is None:
            counted.write(connection, at=database_now(connection))
        statements(connection).promote(connection, [run.definition_id for run in ended])
    return ended


# Tables whose rows belong to a run.
_OF_A_RUN = (
    *(tables.run_logs, tables.checkpoints, tables.steps, tables.waits, tables.attempts, tables.spends),
    *(tables.budget_raises, tables.run_words, tables.run_egress, tables.parents, tables.tree_spends),
    *(tables.model_spends, tables.batch_items, tables.run_versions),
)

# By the place in the table: these rows never change, and a key of three columns is slow to compare.
_SOME = {
    "postgresql": """
        DELETE FROM {table} WHERE ctid = ANY(ARRAY(
          SELECT ctid FROM {table} WHERE run_id = ANY(:ids) LIMIT :limit FOR UPDATE SKIP LOCKED))
        """,
    "sqlite": """
        DELETE FROM {table} WHERE rowid IN (
          SELECT rowid FROM {table} WHERE run_id IN :ids LIMIT :limit)
        """,
}
_OLDEST = {
    "postgresql": """
        DELETE FROM {table} WHERE ctid = ANY(ARRAY(
          SELECT ctid FROM {table} WHERE {at} < :before ORDER BY {at} LIMIT :limit FOR UPDATE SKIP LOCKED))
        """,
    "sqlite": """
        DELETE FROM {table} WHERE rowid IN (
          SELECT rowid FROM {table} WHERE {at} < :before ORDER BY {at} LIMIT :limit)
        """,
}


def forget_parts(connection: Connection, state: str, age: timedelta, *, runs: int, limit: int) -> int:
    """Delete up to `limit` log lines, steps, attempts and so on of the runs that `forget_runs` deletes next.

    One run may have thousands. Returns the greatest of these numbers.
    """
    ids = _old_runs(connection, state, age, runs)
    return _delete_parts(connection, ids, limit) if ids else 0


def _delete_parts(connection: Connection, ids: Sequence[Any], limit: int) -> int:
    kind = tables.runs.c.id.type
    if is_postgresql(connection):
        query, named = _SOME["postgresql"], bindparam("ids", ids, type_=ARRAY(kind))
    else:
        query, named = _SOME["sqlite"], bindparam("ids", ids, type_=kind, expanding=True)
    return max(
        connection.execute(text(query.format(table=table)).bindparams(named), {"limit": limit}).rowcount
        for table in (
            *("run_logs", "steps", "attempts", "spends", "model_spends", "run_words", "run_egress"),
            "batch_items",
        )
    )


def forget_runs(connection: Connection, state: str, age: timedelta, *, limit: int) -> int:
    """Delete the oldest runs that ended in this state longer than `age` ago, with their rows elsewhere."""
    ids = _old_runs(connection, state, age, limit)
    if not ids:
        return 0
    # One whose children are still there goes once they are gone.
    links = tables.children.c.root_id
    above = set(connection.execute(select(links).where(among(connection, links, ids)).distinct()).scalars())
    return _delete(connection, [id_ for id_ in ids if id_ not in above])


def _delete(connection: Connection, ids: Sequence[Any]) -> int:
    if not ids:
        return 0
    for table in _OF_A_RUN:
        connection.execute(delete(table).where(among(connection, table.c.run_id, ids)))
    return connection.execute(delete(_runs).where(among(connection, _runs.c.id, ids))).rowcount


def forget_trees(connection: Connection, state: str, age: timedelta, *, runs: int, limit: int) -> int:
    """Delete up to `limit` runs below those that `forget_runs` deletes next, the deepest first; returns how
    many, and `limit` while some of them have too many log lines, steps and so on to go with them.

    A child is kept as long as the run at the top of its tree, and while a retry of its parent has it.
    """
    roots = _old_runs(connection, state, age, runs)
    if not roots:
        return 0
    links = tables.children
    below = select(links.c.parent_id, links.c.place, links.c.run_id)
    below = below.where(among(connection, links.c.root_id, roots))
    below = below.order_by(links.c.depth.desc()).limit(limit)
    rows = connection.execute(below.with_for_update(skip_locked=True)).all()
    if not rows:
        return 0
    places = _by_parent(rows)
    ids = _with_those_before(connection, {row.run_id for row in rows})
    of_ids = select(links.c.run_id, links.c.parent_id, links.c.place)
    of_ids = of_ids.where(among(connection, links.c.run_id, ids))
    kept = {id_ for id_, of, place in connection.execute(of_ids) if place not in places.get(of, ())}
    gone = [id_ for id_ in ids if id_ not in kept]
    if gone and _delete_parts(connection, gone, PARTS) >= PARTS:
        return limit
    for parent_id, mine in places.items():
        of_parent = (links.c.parent_id == parent_id, links.c.place.in_(mine))
        connection.execute(delete(links).where(*of_parent))
    _delete(connection, gone)
    return len(rows)


def _with_those_before(connection: Connection, ids: Collection[RunId]) -> list[RunId]:
    """These children, and those in whose places they were started again: nothing else leads to these."""
    again = select(_runs.c.id, _runs.c.retry_of).where(among(connection, _runs.c.id, sorted(ids)))
    chain = again.cte("chain", recursive=True)
    before = _runs.alias("before")
    chain = chain.union(select(before.c.id, before.c.retry_of).join(chain, before.c.id == chain.c.retry_of))
    return sorted(connection.execute(select(chain.c.id)).scalars())


def _by_parent(rows: Sequence[Any]) -> dict[RunId, list[int]]:
    found: dict[RunId, list[int]] = {}
    for row in rows:
        found.setdefault(row.parent_id, []).append(row.place)
    return found


def _old_runs(connection: Connection, state: str, age: timedelta, limit: int) -> Sequence[Any]:
    """The ids of the oldest without unfinished runs below them, locked against other workers."""
    ends, links = tables.run_ends, tables.children
    unfinished = select(_live.c.id).join(links, links.c.run_id == _live.c.id)
    unfinished = unfinished.where(links.c.root_id == ends.c.run_id)
    old = (
        select(ends.c.run_id)
        .where(ends.c.state == state, ends.c.finished_at < database_now(connection) - age)
        .where(~unfinished.exists())
        .order_by(ends.c.finished_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return connection.execute(old).scalars().all()


def forget_skips(connection: Connection, age: timedelta, *, limit: int) -> int:
    """Delete the oldest skips that ended longer than `age` ago."""
    return _forget(connection, "skips", "skipped_until", age, limit)


def forget_logs(connection: Connection, age: timedelta, *, limit: int) -> int:
    """Delete the oldest log lines, also of runs that are retained."""
    return _forget(connection, "run_logs", "at", age, limit)


def _forget(connection: Connection, table: str, at: str, age: timedelta, limit: int) -> int:
    statement = _OLDEST["postgresql" if is_postgresql(connection) else "sqlite"]
    before = bindparam("before", database_now(connection) - age, type_=Instant())
    query = text(statement.format(table=table, at=at)).bindparams(before)
    return connection.execute(query, {"limit": limit}).rowcount
