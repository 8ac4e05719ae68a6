"""Families: what wakes a run that waits for its children, starts the next ones, and ends them with it.

The end of a child writes what any end writes. Once that is committed, `settle` looks whether its parent may
go on, in a later transaction: of two children that end at once, and of a child and the park of its parent,
the one that commits last sees both. `look` finds what a worker left that died in between.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import (
    ARRAY,
    CTE,
    BindParameter,
    ColumnElement,
    Connection,
    Select,
    bindparam,
    exists,
    func,
    literal,
    select,
    text,
    update,
)

from worker.ids import ALL_ORGS, OrgId, RunId, Scope
from worker.model.runs.children import BY_PARENT, PACE
from worker.model.runs.run import AdmittedRun
from worker.model.runs.waits import MAX_WAITS, NewWait, WaitState
from worker.store import sweeps, tables
from worker.store.bulk import among
from worker.store.dialect import database_now, driver, hint, insert_into, is_postgresql
from worker.store.sql.contract import ENDS_CHILDREN
from worker.store.sql.postgresql.arrays import words

_live, _runs = tables.live_runs, tables.runs
_parents, _children, _waits = tables.parents, tables.children, tables.waits
# Parked parents, and parents with unfinished children, that one look examines.
LOOKED_AT = 500
# Unfinished children that one transaction cancels.
CANCELLED = 500
# Lower than every id.
NO_RUN = RunId("00000000-0000-0000-0000-000000000000")


def lock(connection: Connection, run: AdmittedRun) -> Any:
    """The row of a run that is still ours, locked; None if it is not."""
    row = connection.execute(select(_live).where(_live.c.id == run.id).with_for_update()).first()
    if row is None or row.fencing_token != run.fencing_token or row.state != "running":
        return None
    return row


_OVER = {
    "postgresql": """
        CASE WHEN (w.children->>'any')::boolean THEN EXISTS (
          SELECT 1 FROM jsonb_array_elements(w.children->'spans') s
          CROSS JOIN LATERAL (
            SELECT c.run_id FROM children c
            WHERE c.parent_id = w.run_id AND c.place BETWEEN (s->>0)::integer AND (s->>1)::integer
              AND c.seen IS NULL AND NOT EXISTS (SELECT 1 FROM live_runs l WHERE l.id = c.run_id)
            LIMIT 1) c)
        ELSE NOT EXISTS (
          SELECT 1 FROM jsonb_array_elements(w.children->'spans') s
          CROSS JOIN LATERAL (
            SELECT l.id FROM live_runs l
            WHERE l.parent_id = w.run_id AND l.place BETWEEN (s->>0)::integer AND (s->>1)::integer
            LIMIT 1) l)
        END
        """,
    "sqlite": """
        CASE WHEN json_extract(w.children, '$.any') THEN EXISTS (
          SELECT 1 FROM json_each(w.children, '$.spans') s CROSS JOIN children c
            ON c.parent_id = w.run_id
               AND c.place BETWEEN json_extract(s.value, '$[0]') AND json_extract(s.value, '$[1]')
          WHERE c.seen IS NULL AND NOT EXISTS (SELECT 1 FROM live_runs l WHERE l.id = c.run_id))
        ELSE NOT EXISTS (
          SELECT 1 FROM json_each(w.children, '$.spans') s CROSS JOIN live_runs l
            ON l.parent_id = w.run_id
               AND l.place BETWEEN json_extract(s.value, '$[0]') AND json_extract(s.value, '$[1]'))
        END
        """,
}
_IS_OVER = (
    "SELECT {over} FROM waits w WHERE w.run_id = :run AND w.name = :name AND w.occurrence = :occurrence"
)
# In the order of ids, as every batch that locks runs.
_READY = """
SELECT p.id, p.attempt, CASE WHEN {any} THEN w.opened_at END AS opened_at
FROM live_runs p JOIN waits w ON w.run_id = p.id AND w.pending_attempt = p.attempt AND w.kind = 'children'
WHERE p.id {among} AND p.state = 'parked' AND p.reason = 'children' AND {over}
ORDER BY p.id
"""
# Each parent once, however many of its children have ended.
_UNSETTLED = """
SELECT c.parent_id
FROM (SELECT DISTINCT parent_id FROM children WHERE run_id {among}) c
JOIN parents f ON f.run_id = c.parent_id
LEFT JOIN live_runs p ON p.id = c.parent_id AND p.state = 'parked' AND p.reason = 'children'
LEFT JOIN waits w ON w.run_id = p.id AND w.pending_attempt = p.attempt AND w.kind = 'children'
WHERE f.windows IS NOT NULL OR (w.run_id IS NOT NULL AND {over})
"""
_UNSETTLED_OF_ANY = _UNSETTLED.format(among="= ANY((SELECT %s::uuid[])::uuid[])", over=_OVER["postgresql"])
_ANY = {"postgresql": "(w.children->>'any')::boolean", "sqlite": "json_extract(w.children, '$.any')"}


def open_wait(connection: Connection, run: AdmittedRun, wait: NewWait) -> WaitState | None:
    """Store which children a run waits for, fenced, and say how that stands; None if it is no longer ours."""
    if lock(connection, run) is None or wait.children is None:
        return None
    now, key = database_now(connection), {"run_id": run.id, "name": wait.name, "occurrence": wait.occurrence}
    kind = connection.execute(select(_waits.c.kind).filter_by(**key)).scalar_one_or_none()
    if kind is None:
        some = select(_waits.c.name).where(_waits.c.run_id == run.id).limit(MAX_WAITS).subquery()
        if connection.execute(select(func.count()).select_from(some)).scalar_one() >= MAX_WAITS:
            return WaitState(wait.kind, "too_many")
    elif kind != wait.kind:
        return WaitState(kind, "pending")
    opened = {"opened_at": now, "pending_attempt": run.attempt, "timed_out_at": None}
    opened["children"] = wait.children.as_json()
    statement = insert_into(connection, _waits).values(**key, org_id=run.org_id, kind=wait.kind, **opened)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["run_id", "name", "occurrence"],
            set_={name: statement.excluded[name] for name in opened},
        )
    )
    dialect = connection.dialect.name
    query = text(_IS_OVER.format(over=_OVER[dialect])).bindparams(
        bindparam("run", run.id, type_=_live.c.id.type),
        bindparam("name", wait.name),
        bindparam("occurrence", wait.occurrence),
    )
    if not connection.execute(query).scalar_one():
        return WaitState(wait.kind, "pending")
    connection.execute(update(_waits).filter_by(**key).values(pending_attempt=None, timed_out_at=now))
    return WaitState(wait.kind, "over")


def settle(connection: Connection, ended: Collection[RunId], parked: Collection[RunId] = ()) -> int:
    """Let parents of children that `ended` go on, and runs that `parked` for children that had ended.

    To call once those ends are committed. Also starts the next runs of `ctx.map_runs`. Returns how many
    parents go on.
    """
    parents = {*parked, *unsettled(connection, ended)}
    woken = wake(connection, sorted(parents)) if parents else 0
    if ended and parents:
        woken += release_all(connection, parents)
    if woken:
        hint(connection)
    return woken


def unsettled(connection: Connection, ended: Collection[RunId]) -> list[RunId]:
    """Parents of children that `ended` that may go on, or have a `ctx.map_runs` that may start the next ones.

    Of a large tree nearly every end changes nothing: this only reads.
    """
    if not ended:
        return []
    if is_postgresql(connection):
        # As often as children end: by SQLAlchemy it takes three times as long.
        rows = driver(connection).execute(_UNSETTLED_OF_ANY, (words(ended),)).fetchall()
        return [RunId(id_) for (id_,) in rows]
    query = text(_UNSETTLED.format(among=_among(connection), over=_OVER[connection.dialect.name]))
    query = query.bindparams(_ids(connection, ended))
    return list(connection.execute(query.columns(parent_id=_live.c.id.type)).scalars())


def _among(connection: Connection) -> str:
    return "= ANY(:ids)" if is_postgresql(connection) else "IN :ids"


def _ids(connection: Connection, ids: Collection[RunId]) -> BindParameter[Any]:
    kind = _live.c.id.type
    if is_postgresql(connection):
        return bindparam("ids", sorted(ids), type_=ARRAY(kind))
    return bindparam("ids", sorted(ids), type_=kind, expanding=True)


def wake(connection: Connection, parents: Sequence[RunId]) -> int:
    """Let those of these parked runs wait for a slot whose children have ended; returns how many."""
    dialect = connection.dialect.name
    ready = text(_READY.format(any=_ANY[dialect], among=_among(connection), over=_OVER[dialect]))
    ready = ready.bindparams(_ids(connection, parents))
    columns = {"id": _live.c.id.type, "attempt": _live.c.attempt.type, "opened_at": _waits.c.opened_at.type}
    rows = connection.execute(ready.columns(**columns)).all()
    if not rows:
        return 0
    now, woken = database_now(connection), 0
    # One that takes its children as they end goes on at most once in `PACE`.
    at: dict[tuple[RunId, int], datetime] = {}
    for id_, attempt, opened_at in rows:
        due = now if opened_at is None else max(now, opened_at + timedelta(seconds=PACE))
        at[id_, attempt] = min(due, at.get((id_, attempt), due))
    for (id_, attempt), due in at.items():
        still = (_live.c.id == id_, _live.c.state == "parked", _live.c.attempt == attempt)
        values = {"state": "waiting", "reason": "resumed", "available_at": due, "started_at": None}
        woken += connection.execute(update(_live).where(*still).values(**values)).rowcount
    return woken


def release_all(connection: Connection, parents: Collection[RunId]) -> int:
    """The same as `release` for those of these runs that have windows."""
    windowed = select(_parents.c.run_id).where(
        among(connection, _parents.c.run_id, sorted(parents)), _parents.c.windows.is_not(None)
    )
    found = sorted(connection.execute(windowed).scalars().all())
    return sum(release(connection, parent_id) for parent_id in found)


def release(connection: Connection, parent_id: RunId) -> int:
    """Start the next children of each `ctx.map_runs` of a run, up to its window; returns how many.

    A window is negative once its children are no longer held in the order of their places: after the last of
    them was released, and after some were started again.
    """
    query = select(_parents.c.windows).where(_parents.c.run_id == parent_id).with_for_update()
    windows: Mapping[str, int] = connection.execute(query).scalar_one_or_none() or {}
    now, released, left = database_now(connection), 0, dict(windows)
    for name, signed in windows.items():
        window, of_map = abs(signed), _of_map(parent_id, name)
        first = first_held(connection, parent_id, name)
        if first is None:
            left[name] = -window
            continue
        # In order, all before the first that is held are released: few, however many are held.
        open_ = of_map.where(_live.c.place < first) if signed > 0 else of_map.where(~_HELD)
        some = select(func.count()).select_from(open_.limit(window).subquery())
        room = window - connection.execute(some).scalar_one()
        if room <= 0:
            continue
        ids = of_map.where(_HELD).order_by(_live.c.place).limit(room)
        next_ = sorted(connection.execute(ids).scalars())
        # A transaction that has locked one of them ends it or takes it up, and may wait for this one.
        rows = select(_live.c.id).where(among(connection, _live.c.id, next_), _HELD).order_by(_live.c.id)
        if connection.execute(rows.with_for_update(skip_locked=True)).scalars().all() != next_:
            continue
        values = {"state": "waiting", "reason": "due", "available_at": now}
        connection.execute(update(_live).where(among(connection, _live.c.id, next_)).values(**values))
        released += len(next_)
    if left != windows:
        connection.execute(update(_parents).where(_parents.c.run_id == parent_id).values(windows=left))
    return released


_HELD = (_live.c.state == "parked") & (_live.c.reason == "window")


def _of_map(parent_id: RunId, name: str) -> Select[Any]:
    """The unfinished children of one `ctx.map_runs`, of which it has started the `name`th."""
    joined = select(_live.c.id).join(_children, _children.c.place == _live.c.place)
    return joined.where(
        _live.c.parent_id == parent_id, _children.c.parent_id == parent_id, _children.c.map == int(name)
    )


def first_held(connection: Connection, parent_id: RunId, name: str) -> int | None:
    """The place of the first child of a `ctx.map_runs` that waits for its window."""
    places = _of_map(parent_id, name).where(_HELD).with_only_columns(_live.c.place)
    return connection.execute(places.order_by(_live.c.place).limit(1)).scalar_one_or_none()


# What ends with a parent.


def parents_of_tree(run_id: RunId) -> CTE:
    """A run and those below it that started others, by `id`; not those that a retry has taken up."""
    tree = select(literal(run_id, _live.c.id.type).label("id")).cte("tree", recursive=True)
    newer = _children.alias("newer")
    is_taken = exists().where(newer.c.run_id == _children.c.run_id, newer.c.parent_id > _children.c.parent_id)
    deeper = select(_children.c.run_id).join(tree, _children.c.parent_id == tree.c.id).where(~is_taken)
    return tree.union(deeper.join(_parents, _parents.c.run_id == _children.c.run_id))


def unfinished_below(connection: Connection, org_id: OrgId, run_id: RunId) -> list[RunId]:
    """The unfinished runs below a run, also below those between that have ended."""
    parents = parents_of_tree(run_id)
    below = select(_live.c.id).join(parents, _live.c.parent_id == parents.c.id)
    return sorted(connection.execute(below.where(_live.c.org_id == org_id)).scalars().all())


def lock_tree(connection: Connection, org_id: OrgId, run_id: RunId) -> None:
    """Lock a run, and those below it that run, in the order of ids, as a batch of ends locks them.

    To call before a run is locked by itself: a retry is newer than the children that it took up.
    """
    below = unfinished_below(connection, org_id, run_id)
    if below:
        _lock_running(connection, [*below, run_id])


_NOT_ASKED = _live.c.cancel_requested_at.is_(None)


def _lock_running(
    connection: Connection, ids: Collection[RunId], *where: ColumnElement[bool]
) -> Sequence[RunId]:
    running = (among(connection, _live.c.id, sorted(ids)), _live.c.state == "running", *where)
    rows = select(_live.c.id).where(*running).order_by(_live.c.id).with_for_update()
    return connection.execute(rows).scalars().all() if ids else ()


def cancel_below(connection: Connection, org_id: OrgId, run_id: RunId, *, at: datetime) -> int:
    """Cancel the runs below a run, those that run too, with their grace. Returns how many.

    No more than `CANCELLED` of those that wait end here; `look` ends the others.
    """
    ids = unfinished_below(connection, org_id, run_id)
    return _cancel(connection, org_id, ids, ids, at)


def _cancel(
    connection: Connection, scope: Scope, ids: Collection[RunId], stopped: Collection[RunId], at: datetime
) -> int:
    """Ask those of `stopped` that run to stop, and end those of `ids` that wait; returns how many.

    All of them at once: a batch of ends, and a suspension, lock runs of several trees in the order of ids.
    """
    running = _lock_running(connection, stopped, _NOT_ASKED)
    if running:
        stop = update(_live).where(among(connection, _live.c.id, running))
        connection.execute(stop.values(cancel_requested_at=at, cancel_reason=BY_PARENT))
    return len(running) + (len(end_waiting(connection, scope, sorted(ids))) if ids else 0)


def end_waiting(connection: Connection, scope: Scope, ids: Sequence[RunId]) -> list[RunId]:
    """Cancel up to `CANCELLED` of these that no process runs."""
    waits = (among(connection, _live.c.id, ids), _live.c.state.in_(tables.UNSTARTED))
    some = select(_live.c.id).where(*waits).order_by(_live.c.id).limit(CANCELLED)
    found = connection.execute(some).scalars().all()
    ended = sweeps.end_waiting(connection, scope, found, state="cancelled", reason=BY_PARENT)
    return [run.run_id for run in ended]


def orphan(connection: Connection, parents: Collection[RunId]) -> int:
    """Cancel the unfinished children of those of these runs that were cancelled or have failed.

    Of one that was cancelled those that run, too; a failed one may keep its children. Returns how many.
    """
    query = select(_runs.c.id, _runs.c.org_id, _runs.c.state).join(_parents, _parents.c.run_id == _runs.c.id)
    ended = query.where(among(connection, _runs.c.id, sorted(parents)), text(ENDS_CHILDREN))
    now, ids, stopped = database_now(connection), set[RunId](), set[RunId]()
    for id_, org_id, state in connection.execute(ended.order_by(_runs.c.id)).all():
        below = unfinished_below(connection, org_id, id_)
        ids.update(below)
        if state == "cancelled":
            stopped.update(below)
    return _cancel(connection, ALL_ORGS, ids, stopped, now)


def orphan_waiting(connection: Connection, children: Collection[RunId]) -> int:
    """As `orphan`, for the parents of children that ran as their parent ended, and wait again."""
    above = select(_live.c.parent_id).where(
        among(connection, _live.c.id, sorted(children)), _live.c.parent_id.is_not(None)
    )
    parents = connection.execute(above.distinct()).scalars().all()
    return orphan(connection, parents) if parents else 0


# Runs with unfinished children, each found by one step along the index.
_FAMILIES = (
    text(
        """
WITH RECURSIVE family(id, n) AS (
  SELECT (SELECT parent_id FROM live_runs WHERE parent_id > :after ORDER BY parent_id LIMIT 1), 1
  UNION ALL
  SELECT (SELECT l.parent_id FROM live_runs l WHERE l.parent_id > family.id ORDER BY l.parent_id LIMIT 1),
         family.n + 1
  FROM family WHERE family.id IS NOT NULL AND family.n < :most
)
SELECT id FROM family WHERE id IS NOT NULL
"""
    )
    .bindparams(bindparam("after", type_=_live.c.id.type))
    .columns(id=_live.c.id.type)
)


def _with_those_above(connection: Connection, run_ids: Collection[RunId]) -> set[RunId]:
    """These runs and those above them: what a child started that has ended, ends with a run further up."""
    found = level = set(run_ids)
    while level:
        links = select(_children.c.run_id, _children.c.parent_id)
        links = links.where(among(connection, _children.c.run_id, sorted(level)))
        # Of several, since retries took it up, the newest.
        above = {id_: of for id_, of in connection.execute(links.order_by(_children.c.parent_id))}
        level = {RunId(of) for of in above.values()} - found
        found = found | level
    return found


class Looked(NamedTuple):
    """What one look did, and the run to go on after; None at the end. `orphan_found` gets `found`."""

    changed: int
    after: RunId | None
    found: Sequence[RunId] = ()


def look(connection: Connection, after: RunId | None = None) -> Looked:
    """Do what `settle` would have done for a worker that died before it could.

    Examines `LOOKED_AT` runs with unfinished children, and as many parked ones, after `after`.
    """
    first = after or NO_RUN
    parked = select(_live.c.id).where(text("live_runs.state = 'parked' AND live_runs.reason = 'children'"))
    parked = parked.where(_live.c.id > first).order_by(_live.c.id).limit(LOOKED_AT)
    waiting = connection.execute(parked).scalars().all()
    found = connection.execute(_FAMILIES, {"after": first, "most": LOOKED_AT}).scalars().all()
    # Both as far as the shorter of the pages that are full.
    full = [page[-1] for page in (waiting, found) if len(page) == LOOKED_AT]
    last = min(full, default=None)
    if last is not None:
        waiting, found = ([id_ for id_ in page if id_ <= last] for page in (waiting, found))
    changed = wake(connection, waiting) if waiting else 0
    if found:
        changed += release_all(connection, found)
    return Looked(changed, last, found)


def orphan_found(connection: Connection, found: Collection[RunId]) -> int:
    """As `orphan`, for runs that a look has found with unfinished children, and those above them.

    In a transaction of its own: what it locks may be older than a run that goes on by the look.
    """
    return orphan(connection, _with_those_above(connection, found))
