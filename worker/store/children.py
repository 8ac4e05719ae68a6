"""Children: runs that a run starts, and how it reads them.

A child is a row of `children`, unique by parent, handler, key and occurrence, beside its rows of `runs` and
`live_runs`. One transaction writes all of them, under the fencing token of its parent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from operator import itemgetter
from typing import Any

from sqlalchemy import Connection, Text, bindparam, cast, func, insert, select, tuple_, update

from worker.handlers.steps import StepError
from worker.ids import OrgId, RunId, Scope, new_id
from worker.model.runs.children import (
    AT_ONCE,
    MAX_CHILDREN,
    MAX_DEPTH,
    MAX_TREE,
    READ_BYTES,
    ChildCounts,
    ChildPage,
    EndedRow,
    FamilyCap,
    NewChild,
    PlacedChild,
    Span,
    within,
)
from worker.model.runs.run import AdmittedRun, Isolation
from worker.store import families, tables
from worker.store.bulk import among
from worker.store.dialect import (
    Row,
    all_rows,
    first_row,
    hint,
    in_scope,
)
from worker.store.sql import statements
from worker.store.sql.contract import ChildRow

_live, _runs = tables.live_runs, tables.runs
_parents, _children = tables.parents, tables.children
# States of children that a retry of their parent starts again.
RESTARTED = ("failed", "refused", "cancelled", "skipped")
_Identity = tuple[str, str, int]


def start(
    connection: Connection,
    run: AdmittedRun,
    new: Sequence[NewChild],
    *,
    cap: FamilyCap,
    keep: bool,
    isolations: Mapping[str, Isolation],
) -> list[PlacedChild] | str | None:
    """Store children of a running run, fenced, and return their places; those that are there already stay.

    Returns None if the run is no longer ours, and `cancelled` if it is being cancelled.

    Raises:
        StepError: a limit of its depth, its children or its tree.
    """
    live = families.lock(connection, run)
    if live is None:
        return None
    if live.cancel_requested_at is not None:
        return "cancelled"
    parent = _parent(connection, run, live, cap, keep=keep)
    known = _known(connection, run.id, new) if parent["started"] else {}
    fresh: dict[_Identity, NewChild] = {}
    for child in new:
        if (identity := _identity(child)) not in known:
            fresh.setdefault(identity, child)
    if fresh:
        known |= _insert(connection, run, parent, fresh, isolations)
    return [known[_identity(child)] for child in new]


def _identity(child: NewChild) -> _Identity:
    return child.handler, child.key or "", child.occurrence


def _parent(connection: Connection, run: AdmittedRun, live: Any, cap: FamilyCap, *, keep: bool) -> Row:
    """The row of a run that starts children, made at the first ones. Raises StepError."""
    root_id, depth = run.id, 0
    if live.parent_id is not None:
        of = (_children.c.parent_id == live.parent_id, _children.c.place == live.place)
        root_id, depth = connection.execute(select(_children.c.root_id, _children.c.depth).where(*of)).one()
    # In the order of ids, as `families.release_all`: the run at the top is the oldest of its tree.
    ids = sorted({root_id, run.id})
    query = select(_parents).where(_parents.c.run_id.in_(ids)).order_by(_parents.c.run_id)
    rows = all_rows(connection, query.with_for_update())
    found = next((row for row in rows if row["run_id"] == run.id), None)
    if found is not None:
        if found["cap"] != cap.as_json():
            # Of the handler as it is in this attempt.
            mine = update(_parents).where(_parents.c.run_id == run.id)
            connection.execute(mine.values(cap=cap.as_json()))
        return found
    if depth >= MAX_DEPTH:
        raise StepError(
            f"ctx.start: this run is {depth} levels below the first one, the limit; start less deep"
        )
    row = {"run_id": run.id, "org_id": run.org_id, "root_id": root_id, "depth": depth, "keep": keep}
    connection.execute(insert(_parents).values(**row, cap=cap.as_json()))
    return row | {"started": 0, "windows": None}


def _known(connection: Connection, parent_id: RunId, new: Iterable[NewChild]) -> dict[_Identity, PlacedChild]:
    """Those of these children that are stored."""
    identity = (_children.c.handler, _children.c.key, _children.c.occurrence)
    query = select(*identity, _children.c.place, _children.c.run_id).where(
        _children.c.parent_id == parent_id, tuple_(*identity).in_({_identity(child) for child in new})
    )
    rows = connection.execute(query)
    return {(handler, key, number): PlacedChild(place, id_) for handler, key, number, place, id_ in rows}


def _insert(
    connection: Connection,
    run: AdmittedRun,
    parent: Row,
    fresh: Mapping[_Identity, NewChild],
    isolations: Mapping[str, Isolation],
) -> dict[_Identity, PlacedChild]:
    first = parent["started"] + 1
    last = parent["started"] + len(fresh)
    if last > MAX_CHILDREN:
        raise StepError(f"ctx.start: the run has {MAX_CHILDREN:,} children, the limit; let them start others")
    root_id = parent["root_id"]
    in_tree = connection.execute(
        update(_parents)
        .where(_parents.c.run_id == root_id)
        .values(tree=_parents.c.tree + len(fresh))
        .returning(_parents.c.tree)
    ).scalar_one()
    if in_tree > MAX_TREE:
        raise StepError(f"ctx.start: {MAX_TREE:,} runs are below run {root_id}, the limit; start fewer")
    places: dict[_Identity, PlacedChild] = {}
    rows: list[ChildRow] = []
    windows = dict(parent["windows"] or {})
    # Of those below zero, whose children are not in order as long as one is held: see `families.release`.
    mixed = {
        name for name, window in windows.items()
        if window < 0 and families.first_held(connection, run.id, name) is not None
    }  # fmt: skip
    for place, (identity, child) in enumerate(fresh.items(), first):
        row = ChildRow(
            id=RunId(new_id()),
            handler=child.handler,
            isolation=isolations[child.handler],
            idempotency_key=_key_of(run.idempotency_key, identity),
            params_json=child.params_json,
            held=child.window > 0,
            place=place,
            key=child.key or "",
            occurrence=child.occurrence,
            map=child.map or None,
        )
        if row.held:
            name = str(child.map)
            windows[name] = -child.window if name in mixed else child.window
        rows.append(row)
        places[identity] = PlacedChild(place, row.id)
    statements(connection).put_children(connection, run.id, rows)
    changed = {"started": last, "windows": windows or None}
    connection.execute(update(_parents).where(_parents.c.run_id == run.id).values(**changed))
    if windows:
        families.release(connection, run.id)
    hint(connection)
    return places


def _key_of(run_key: str, identity: _Identity) -> str:
    """The idempotency key of a child: the same for each run of it, however often its parent is retried."""
    digits = hashlib.sha256("\n".join([run_key, *map(str, identity)]).encode()).hexdigest()
    digits = f"{digits[:12]}8{digits[13:16]}8{digits[17:32]}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


# What a parent reads.


def read(connection: Connection, parent_id: RunId, places: Collection[int]) -> ChildPage:
    """Children of a run by their places, in order, as far as their results fit into one answer."""
    wanted = (_children.c.parent_id == parent_id, _children.c.place.in_(places))
    return _page(connection, wanted, _children.c.place)


def read_ended(
    connection: Connection, run: AdmittedRun, spans: Sequence[Span], after: int
) -> ChildPage | None:
    """The next children of these spans that have ended, after the place `after` of those seen before.

    Which comes next is stored, so that each attempt sees the same order. None if the run is no longer ours.
    """
    if families.lock(connection, run) is None:
        return None
    first, last = min(spans)[0], max(end for _, end in spans)
    unseen = (
        select(_children.c.place)
        .join(_runs, _runs.c.id == _children.c.run_id)
        .where(_children.c.parent_id == run.id, _children.c.seen.is_(None), _runs.c.state.is_not(None))
        .where(_children.c.place.between(first, last))
        .order_by(_runs.c.finished_at, _children.c.place)
    )
    found = connection.execute(unseen).scalars().all()
    wanted = within(spans, found)
    places = [place for place in found if place in wanted]
    if places:
        seen = connection.execute(
            update(_parents)
            .where(_parents.c.run_id == run.id)
            .values(seen=_parents.c.seen + len(places))
            .returning(_parents.c.seen)
        ).scalar_one()
        numbers = [
            {"of": run.id, "at": place, "number": number}
            for number, place in enumerate(places, seen - len(places) + 1)
        ]
        key = (_children.c.parent_id == bindparam("of"), _children.c.place == bindparam("at"))
        connection.execute(update(_children).where(*key).values(seen=bindparam("number")), numbers)
    following = select(_children.c.place).where(
        _children.c.parent_id == run.id, _children.c.seen > after, _children.c.place.between(first, last)
    )
    seen_after = connection.execute(following.order_by(_children.c.seen)).scalars().all()
    mine = within(spans, seen_after)
    next_ = [place for place in seen_after if place in mine]
    page = _page(
        connection,
        (_children.c.parent_id == run.id, _children.c.place.in_(next_[:AT_ONCE])),
        _children.c.seen,
    )
    return replace(page, more=page.more or len(next_) > AT_ONCE)


def _page(connection: Connection, where: Sequence[Any], order: Any) -> ChildPage:
    query = (
        select(
            _children.c.place,
            _runs.c.state,
            _runs.c.reason,
            _runs.c.error,
            cast(_runs.c.result, Text),
            _children.c.seen,
        )
        .join(_runs, _runs.c.id == _children.c.run_id)
        .where(*where)
        .order_by(order)
        .limit(AT_ONCE + 1)
    )
    rows: list[EndedRow] = []
    size = 0
    for values in connection.execute(query):
        row = EndedRow(*values)
        size += len(row.result_json or "")
        if rows and (size > READ_BYTES or len(rows) == AT_ONCE):
            return ChildPage(tuple(rows), more=True)
        rows.append(row)
    return ChildPage(tuple(rows))


def caps_of(connection: Connection, run_ids: Sequence[RunId]) -> dict[RunId, FamilyCap]:
    """What these runs allow their children; leaves out those that started none."""
    query = select(_parents.c.run_id, cast(_parents.c.cap, Text))
    query = query.where(among(connection, _parents.c.run_id, sorted(run_ids)))
    return {RunId(id_): FamilyCap.from_json(json.loads(cap)) for id_, cap in connection.execute(query)}


def parent_of(connection: Connection, run_id: RunId) -> RunId | None:
    """The run that started a child; of several, since retries took it up, the newest."""
    query = select(_children.c.parent_id).where(_children.c.run_id == run_id)
    found = connection.execute(query.order_by(_children.c.parent_id.desc()).limit(1)).scalar_one_or_none()
    return None if found is None else RunId(found)


def root_of(connection: Connection, run_id: RunId) -> RunId:
    """The run at the top of a run's tree; itself, if no run started it."""
    return roots_of(connection, [run_id])[run_id]


def roots_of(connection: Connection, run_ids: Collection[RunId]) -> dict[RunId, RunId]:
    """The runs at the top of the trees of these runs: those of a retry, if one took a run up."""
    query = select(_children.c.run_id, _children.c.root_id)
    query = query.where(among(connection, _children.c.run_id, sorted(run_ids)))
    found = connection.execute(query.order_by(_children.c.parent_id))
    return {id_: id_ for id_ in run_ids} | {RunId(id_): RunId(root) for id_, root in found}


def counts(connection: Connection, scope: Scope, parent_id: RunId) -> ChildCounts:
    """The children of a run by state. There are at most `MAX_CHILDREN`."""
    state = func.coalesce(_runs.c.state, _live.c.state)
    query = (
        select(state, func.count())
        .select_from(_children)
        .join(_runs, _runs.c.id == _children.c.run_id)
        .outerjoin(_live, _live.c.id == _children.c.run_id)
        .where(_children.c.parent_id == parent_id, *in_scope(_children.c.org_id, scope))
        .group_by(state)
    )
    found: dict[str, int] = {}
    for name, count in connection.execute(query):
        shown = "waiting" if name in tables.UNSTARTED else name
        found[shown] = found.get(shown, 0) + count
    return ChildCounts(found)


# Retries and retention.


def take_up(connection: Connection, org_id: OrgId, of: RunId, to: RunId) -> int:
    """Give a retry the children of the run that it continues that succeeded or are unfinished.

    Unfinished ones that are being cancelled are left out, and those that another retry has taken up. What is
    below them is in its tree from then on.
    """
    # None of those that run starts or spends meanwhile.
    families.lock_tree(connection, org_id, of)
    parent = first_row(
        connection, select(_parents).where(_parents.c.run_id == of, _parents.c.org_id == org_id)
    )
    if parent is None:
        return 0
    mine = (_live.c.parent_id == of) & _live.c.cancel_requested_at.is_(None)
    query = (
        select(_children, _runs.c.state)
        .join(_runs, _runs.c.id == _children.c.run_id)
        .outerjoin(_live, _live.c.id == _children.c.run_id)
        .where(_children.c.parent_id == of, _children.c.org_id == org_id)
        .where((_runs.c.state == "succeeded") | mine)
        .order_by(_children.c.place)
    )
    rows = all_rows(connection, query)
    new = {"parent_id": to, "root_id": to, "depth": 1, "seen": None}
    # Without gaps: those that are started again get places after them.
    names = [column.name for column in _children.c]
    links = [
        {name: row[name] for name in names} | new | {"place": place} for place, row in enumerate(rows, 1)
    ]
    kept = {name: parent[name] for name in ("org_id", "cap", "keep", "windows")}
    count = len(links)
    connection.execute(
        insert(_parents).values(run_id=to, root_id=to, depth=0, started=count, tree=count, seen=0, **kept)
    )
    if links:
        connection.execute(insert(_children), links)
    moved = [
        {"run": row["run_id"], "at": link["place"]}
        for link, row in zip(links, rows, strict=True)
        if row["state"] is None
    ]
    if moved:
        unfinished = (_live.c.id == bindparam("run"), _live.c.org_id == org_id)
        changed = update(_live).where(*unfinished).values(parent_id=to, place=bindparam("at"))
        # In the order in which a batch of ends locks them.
        connection.execute(changed, sorted(moved, key=itemgetter("run")))
    _move_below(connection, to)
    if parent["windows"]:
        families.release(connection, to)
    return count


def _move_below(connection: Connection, to: RunId) -> None:
    """Let a retry be the run at the top of what is below the children that it has taken up."""
    tree = families.parents_of_tree(to)
    below = connection.execute(select(tree.c.id).where(tree.c.id != to).order_by(tree.c.id)).scalars().all()
    if not below:
        return
    for column in (_parents.c.run_id, _children.c.parent_id):
        moved = update(column.table).where(among(connection, column, below))
        connection.execute(moved.values(root_id=to))
    size = select(func.count()).where(_children.c.root_id == to).scalar_subquery()
    connection.execute(update(_parents).where(_parents.c.run_id == to).values(tree=size))


def restart(
    connection: Connection,
    org_id: OrgId,
    parent_id: RunId,
    isolation_of: Callable[[str, str], Isolation],
    *,
    at: datetime,
    by: str,
) -> int:
    """Start those children of an unfinished run again that did not succeed; returns how many.

    Each gets a new run in its place, with its params and its idempotency key; those of a `ctx.map_runs` wait
    for its window. `isolation_of` takes a handler and a pool.
    """
    live = first_row(connection, select(_live).where(_live.c.id == parent_id, _live.c.org_id == org_id))
    if live is None:
        return 0
    columns = ("id", "handler", "idempotency_key", "params", "scheduled_for")
    mine = (_parents.c.run_id == parent_id, _parents.c.org_id == org_id)
    windows = connection.execute(select(_parents.c.windows).where(*mine).with_for_update()).scalar_one() or {}
    query = (
        select(_children.c.place, _children.c.map, *(_runs.c[name] for name in columns))
        .join(_runs, _runs.c.id == _children.c.run_id)
        .where(_children.c.parent_id == parent_id, _children.c.org_id == org_id)
        .where(_runs.c.state.in_(RESTARTED))
        .order_by(_children.c.place)
    )
    failed = all_rows(connection, query)
    shared = {name: live[name] for name in ("org_id", "definition_id", "revision", "pool")}
    shared |= {"origin": "child"}
    runs, waiting, places = [], [], []
    again: set[str] = set()
    for row in failed:
        own = {"id": new_id(), **{name: row[name] for name in columns if name != "id"}}
        runs.append(shared | own | {"created_at": at, "created_by": by, "retry_of": row["id"]})
        limits = {name: live[name] for name in ("max_concurrent", "priority")}
        own |= {"state": "waiting", "reason": "due", "available_at": at}
        if str(row["map"]) in windows:
            again.add(str(row["map"]))
            own |= {"state": "parked", "reason": "window", "available_at": tables.NEVER}
        own["isolation"] = isolation_of(row["handler"], live["pool"])
        waiting.append(
            shared | own | limits | {"serial": False, "parent_id": parent_id, "place": row["place"]}
        )
        places.append({"at": row["place"], "new": own["id"]})
    if failed:
        connection.execute(insert(_runs), runs)
        connection.execute(insert(_live), waiting)
        of = (_children.c.parent_id == parent_id, _children.c.place == bindparam("at"))
        connection.execute(update(_children).where(*of).values(run_id=bindparam("new"), seen=None), places)
        hint(connection)
    if again:
        mixed = windows | {name: -abs(windows[name]) for name in again}
        connection.execute(update(_parents).where(*mine).values(windows=mixed))
        families.release(connection, parent_id)
    return len(failed)
