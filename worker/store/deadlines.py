"""Deadlines: scheduled times that must be done by a time, and the definitions that are late.

`deadlines` has what firing decided and is not done yet, `late_definitions` one row for each definition with
a deadline that passed. Both lose a row once a run for that scheduled time or a later one has succeeded, or
found its flag off: the work is done then. A transaction that changes both tables takes `deadlines` first, and
each in the order of definitions, as firing does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    bindparam,
    delete,
    exists,
    func,
    literal_column,
    or_,
    select,
    update,
)

from worker.ids import ALL_ORGS, DefinitionId, OrgId, RunId, Scope, lowest_id
from worker.model.runs.run import NewDeadline
from worker.store import tables
from worker.store.bulk import among, insert_many, rows_among
from worker.store.definitions import in_force, names_of, newest_open
from worker.store.dialect import Row, above, all_rows, database_now, in_scope, insert_into

_deadlines, _late, _runs = tables.deadlines, tables.late_definitions, tables.runs
_live, _skips, _definitions, _orgs = tables.live_runs, tables.skips, tables.definitions, tables.orgs
_revisions = tables.definition_revisions

# Deadlines that one transaction looks at, and late definitions that one call of `check` does.
BATCH = 250
# The states of orgs whose work is not expected any more.
UNWANTED = ("suspended", "removed")


@dataclass(frozen=True, slots=True)
class Late:
    """A definition that became late: `run` is the newest one since its scheduled time, None without one.

    `why` is that run's state with its reason, or why the scheduled time never became a run.
    """

    definition_id: DefinitionId
    org: str | None
    definition: str | None
    scheduled_for: datetime
    deadline_at: datetime
    run: RunId | None
    why: str


class Done(NamedTuple):
    """A definition that was late."""

    org: str | None
    definition: str | None


def add(connection: Connection, new: Sequence[NewDeadline]) -> None:
    """Store deadlines; of scheduled times with the same one, the last stays."""
    rows = {(each.definition_id, each.deadline_at): each._asdict() for each in sorted(new)}
    key = ("definition_id", "deadline_at")
    insert_many(connection, _deadlines, list(rows.values()), key=key, replaced=("scheduled_for",))


def pass_due(connection: Connection) -> tuple[list[Late], bool]:
    """Take deadlines that have passed, the oldest first; returns the definitions that became late by it.

    Also returns whether there may be more. A definition that is late already is late for the newer scheduled
    time then. Nothing is late that is done, nor a definition that is closed or disabled, nor one of an org
    that is suspended or removed.
    """
    now = database_now(connection)
    due = select(_deadlines).where(_deadlines.c.deadline_at <= now).order_by(_deadlines.c.deadline_at)
    rows = connection.execute(due.limit(BATCH).with_for_update(skip_locked=True)).all()
    passed = [NewDeadline(*(getattr(row, name) for name in NewDeadline._fields)) for row in rows]
    _remove(connection, passed)
    wanted = _wanted(connection, {each.definition_id for each in passed})
    # The oldest of each comes last.
    newest_first = sorted(passed, key=lambda each: each.scheduled_for, reverse=True)
    since = {each.definition_id: each.scheduled_for for each in newest_first if each.definition_id in wanted}
    done = _done_until(connection, since)
    undone = [each for each in passed if each.definition_id in wanted and not _is_done(each, done)]
    return _mark(connection, undone), len(rows) == BATCH


def end_done(connection: Connection, ids: Collection[DefinitionId]) -> list[Done]:
    """Drop what these definitions have done; returns those of them that were late until now."""
    oldest: dict[DefinitionId, datetime] = {}
    for table in (_deadlines, _late):
        first = select(table.c.definition_id, func.min(table.c.scheduled_for)).group_by(table.c.definition_id)
        for id_, at in rows_among(connection, first, table.c.definition_id, ids):
            oldest[id_] = min(at, oldest.get(id_, at))
    done = _done_until(connection, oldest)
    if not done:
        return []
    of_done = delete(_deadlines).where(
        _deadlines.c.definition_id == bindparam("of_id"), _deadlines.c.scheduled_for <= bindparam("until")
    )
    connection.execute(of_done, [{"of_id": id_, "until": until} for id_, until in sorted(done.items())])
    late = select(_late.c.definition_id, _late.c.scheduled_for).order_by(_late.c.definition_id)
    rows = rows_among(connection, late.with_for_update(), _late.c.definition_id, done)
    ended = [id_ for id_, at in rows if at <= done[id_]]
    if ended:
        connection.execute(delete(_late).where(among(connection, _late.c.definition_id, ended)))
    return [Done(*names) for names in names_of(connection, ALL_ORGS, ended).values()]


class CheckedLate(NamedTuple):
    """The late definitions of a page that are done, and where to continue; None at the end."""

    done: Sequence[DefinitionId]
    next: DefinitionId | None


def check(connection: Connection, after: DefinitionId | None = None) -> CheckedLate:
    """Check the next `BATCH` late definitions: a worker may have died before it dropped what was done."""
    page = select(_late.c.definition_id, _late.c.scheduled_for).where(*above(_late.c.definition_id, after))
    rows = connection.execute(page.order_by(_late.c.definition_id).limit(BATCH)).all()
    late: dict[DefinitionId, datetime] = {row.definition_id: row.scheduled_for for row in rows}
    done = _done_until(connection, late)
    ended = [id_ for id_, at in late.items() if id_ in done and at <= done[id_]]
    return CheckedLate(ended, rows[-1].definition_id if len(rows) == BATCH else None)


class StoredDeadline(NamedTuple):
    """A deadline that is stored, or the scheduled time of a late definition with `late_at`."""

    definition_id: DefinitionId
    org_id: OrgId
    scheduled_for: datetime
    deadline_at: datetime
    is_late: bool


def stored(connection: Connection, scope: Scope, ids: Iterable[DefinitionId]) -> list[StoredDeadline]:
    """The deadlines of these definitions of one org or of all, locked, and those of them that are late."""
    ids, found = list(ids), []
    for table, at in ((_deadlines, _deadlines.c.deadline_at), (_late, _late.c.late_at)):
        query = select(table.c.definition_id, table.c.org_id, table.c.scheduled_for, at)
        query = query.where(*in_scope(table.c.org_id, scope))
        if table is _deadlines:
            # What `pass_due` has taken meanwhile is then seen among those that are late.
            query = query.order_by(table.c.definition_id, table.c.deadline_at).with_for_update()
        rows = rows_among(connection, query, table.c.definition_id, ids)
        found += [
            StoredDeadline(id_, org_id, nominal, until, table is _late)
            for id_, org_id, nominal, until in rows
        ]
    return found


def is_any(connection: Connection, scope: Scope) -> bool:
    """Whether a definition of the scope has a deadline or is late."""
    return any(
        connection.execute(
            select(table.c.definition_id).where(*in_scope(table.c.org_id, scope)).limit(1)
        ).first()
        for table in (_deadlines, _late)
    )


def drop(connection: Connection, dropped: Iterable[StoredDeadline]) -> None:
    """Remove these rows."""
    each = sorted(dropped)
    _remove(connection, [NewDeadline(*one[:4]) for one in each if not one.is_late])
    for one in each:
        if one.is_late:
            connection.execute(delete(_late).where(_late.c.definition_id == one.definition_id))


def forget_late(connection: Connection, age: timedelta, *, limit: int) -> int:
    """Drop definitions that are late for a scheduled time longer than `age` ago, and have no unfinished run.

    The run of that time is gone, too.
    """
    unfinished = exists().where(_live.c.definition_id == _late.c.definition_id)
    old = (_late.c.scheduled_for < database_now(connection) - age, ~unfinished)
    query = select(_late.c.definition_id).where(*old).order_by(_late.c.definition_id).limit(limit)
    ids = connection.execute(query).scalars().all()
    gone = delete(_late).where(_late.c.definition_id.in_(ids), *old)
    return connection.execute(gone).rowcount if ids else 0


def with_deadline(connection: Connection, scope: Scope) -> list[Row]:
    """Org, time zone, name and spec of definitions with a deadline, among the newest open ones."""
    newest, keys = newest_open(scope), ("done_by", "done_within")
    query = (
        select(_orgs.c.code.label("org"), _orgs.c.timezone, newest.c.name, _revisions.c.spec)
        .select_from(newest)
        .join(_orgs, _orgs.c.id == newest.c.org_id)
        .join(_revisions, in_force(newest))
        .where(_orgs.c.state != "removed")
        .where(or_(*(_revisions.c.spec[key].as_string().is_not(None) for key in keys)))
        .order_by(newest.c.id.desc())
    )
    return all_rows(connection, query.limit(BATCH))


def late_orgs(scope: Scope) -> ColumnElement[bool]:
    """A condition on `orgs`: a definition of it is late."""
    return _orgs.c.id.in_(select(_late.c.org_id).where(*in_scope(_late.c.org_id, scope)))


def _remove(connection: Connection, rows: Sequence[NewDeadline]) -> None:
    if rows:
        mine = (_deadlines.c.definition_id == bindparam("of_id"), _deadlines.c.deadline_at == bindparam("at"))
        keys = [{"of_id": each.definition_id, "at": each.deadline_at} for each in rows]
        connection.execute(delete(_deadlines).where(*mine), keys)


def _wanted(connection: Connection, ids: Collection[DefinitionId]) -> set[DefinitionId]:
    """Those of these definitions whose work is expected; a pause changes nothing for what became a run."""
    query = (
        select(_definitions.c.id)
        .join(_orgs, _orgs.c.id == _definitions.c.org_id)
        .where(_definitions.c.closed_at.is_(None), _definitions.c.enabled, _orgs.c.state.not_in(UNWANTED))
    )
    return {id_ for (id_,) in rows_among(connection, query, _definitions.c.id, ids)}


def _groups(
    since: Mapping[DefinitionId, datetime], by: Callable[[datetime], Any]
) -> Iterator[tuple[datetime, list[DefinitionId]]]:
    """Definitions whose times are the same by `by`, with the first of these times."""
    in_order = sorted(since, key=lambda id_: (since[id_], id_))
    for _, group in groupby(in_order, key=lambda id_: by(since[id_])):
        ids = list(group)
        yield since[ids[0]], ids


def _done_until(
    connection: Connection, since: Mapping[DefinitionId, datetime]
) -> Mapping[DefinitionId, datetime]:
    """The last scheduled time of each definition that is done, among the runs made since its time.

    By day: one that is late for weeks must not have the runs of weeks read of all others.
    """
    # As the condition of an index says it.
    is_done = or_(
        _runs.c.state == literal_column("'succeeded'"),
        and_(_runs.c.state == literal_column("'skipped'"), _runs.c.reason == "flag_off"),
    )
    done: dict[DefinitionId, datetime] = {}
    for first, ids in _groups(since, datetime.date):
        mine = (_runs.c.definition_id == _definitions.c.id, _runs.c.id >= lowest_id(first), is_done)
        # A child has the scheduled time of its parent, whose work is more than that.
        last = select(func.max(_runs.c.scheduled_for)).where(*mine, _runs.c.origin != "child")
        each = select(_definitions.c.id, last.correlate(_definitions).scalar_subquery())
        found = rows_among(connection, each, _definitions.c.id, ids)
        done |= {id_: at for id_, at in found if at is not None}
    return done


def _is_done(each: NewDeadline, done: Mapping[DefinitionId, datetime]) -> bool:
    until = done.get(each.definition_id)
    return until is not None and each.scheduled_for <= until


def _mark(connection: Connection, undone: Sequence[NewDeadline]) -> list[Late]:
    """Store that these are late; returns the definitions that were not yet."""
    first: dict[DefinitionId, NewDeadline] = {}
    newest: dict[DefinitionId, NewDeadline] = {}
    for each in sorted(undone):
        first.setdefault(each.definition_id, each)
        newest[each.definition_id] = each
    if not newest:
        return []
    rows = [
        {
            "definition_id": id_,
            "org_id": each.org_id,
            "scheduled_for": each.scheduled_for,
            "late_at": first[id_].deadline_at,
        }
        for id_, each in newest.items()
    ]
    # The database decides which of two workers makes a definition late.
    insert = insert_into(connection, _late).on_conflict_do_nothing(index_elements=["definition_id"])
    new = set(connection.execute(insert.returning(_late.c.definition_id), rows).scalars())
    became = [each for id_, each in newest.items() if id_ in new]
    if known := [each for id_, each in newest.items() if id_ not in new]:
        later = update(_late).where(
            _late.c.definition_id == bindparam("of_id"), _late.c.scheduled_for < bindparam("at")
        )
        values = [{"of_id": each.definition_id, "at": each.scheduled_for} for each in known]
        connection.execute(later.values(scheduled_for=bindparam("at")), values)
    names = names_of(connection, ALL_ORGS, [each.definition_id for each in became])
    reasons = _reasons(connection, became)
    return [
        Late(
            each.definition_id,
            *names[each.definition_id],
            each.scheduled_for,
            first[each.definition_id].deadline_at,
            *reasons[each.definition_id],
        )
        for each in became
    ]


def _reasons(
    connection: Connection, late: Sequence[NewDeadline]
) -> dict[DefinitionId, tuple[RunId | None, str]]:
    """Of each definition its newest run since that scheduled time, and why it is not done."""
    found: dict[DefinitionId, tuple[RunId | None, str | None]] = {}
    times = {each.definition_id: each.scheduled_for for each in late}
    for since, ids in _groups(times, lambda at: at):
        mine = (_runs.c.definition_id == _definitions.c.id, _runs.c.id >= lowest_id(since))
        # Of runs that are made within a second, the id does not say which is newer.
        newest = select(_runs.c.id).where(*mine, _runs.c.scheduled_for >= since, _runs.c.origin != "child")
        newest = newest.order_by(_runs.c.id.desc()).limit(1).correlate(_definitions)
        skipped = select(_skips.c.reason).where(
            _skips.c.definition_id == _definitions.c.id, _skips.c.skipped_until >= since
        )
        skipped = skipped.order_by(_skips.c.skipped_from.desc()).limit(1).correlate(_definitions)
        query = select(_definitions.c.id, newest.scalar_subquery(), skipped.scalar_subquery())
        for id_, run, skip in rows_among(connection, query, _definitions.c.id, ids):
            found[id_] = run, skip
    states = select(
        _runs.c.id,
        func.coalesce(_runs.c.state, _live.c.state),
        func.coalesce(_runs.c.reason, _live.c.reason),
    ).select_from(_runs.outerjoin(_live, _live.c.id == _runs.c.id))
    runs = {run for run, _ in found.values() if run is not None}
    whys = {
        run: state if reason is None else f"{state} ({reason})"
        for run, state, reason in rows_among(connection, states, _runs.c.id, runs)
    }
    return {
        id_: (run, whys.get(run, f"skipped ({skip})" if skip else "skipped"))
        for id_, (run, skip) in found.items()
    }
