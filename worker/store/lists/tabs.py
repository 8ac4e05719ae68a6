"""The tabs of runs, definitions and orgs: what is in each state, and how many of them, up to a bound.

A count reads a limited part of an index, and says so if there are more rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Connection,
    Select,
    and_,
    case,
    func,
    literal,
    literal_column,
    select,
    text,
)

from worker.ids import AllOrgs, OrgId, Scope
from worker.store import failing, tables
from worker.store.dialect import all_rows, database_now, in_scope
from worker.store.lists.morning import MAX_ROWS
from worker.store.lists.runs import is_listed

# A scheduled time is overdue after this.
OVERDUE = timedelta(seconds=60)
# A run that could have started so long ago is delayed: it waits for more than a free slot.
LONG_WAIT = timedelta(minutes=15)
# Definitions or orgs whose newest runs are looked at: each takes a few look-ups.
MAX_CHECKED = 500

_live, _waits, _hours = tables.live_runs, tables.waits, tables.rollup_hours
_definitions, _schedule = tables.definitions, tables.schedule
_orgs, _failing, _late = tables.orgs, tables.failing_definitions, tables.late_definitions
Condition = ColumnElement[bool]
_every = func.count()


class BoundedCount(NamedTuple):
    """A number; `at_least` if not all were read."""

    total: int
    at_least: bool = False

    def __str__(self) -> str:
        return f"{self.total:,}{'+' * self.at_least}"


def unfinished(connection: Connection, org_ids: Sequence[OrgId] | AllOrgs) -> dict[str, BoundedCount]:
    """Waiting and running runs of a few orgs, or of all; without children, as in lists."""
    # As the conditions of the indexes say it: with a parameter, SQLite would not use them.
    waiting, held, parked, running = (
        select(_live.c.id).where(_live.c.state == literal_column(f"'{state}'"), is_listed(_live))
        for state in ("waiting", "held", "parked", "running")
    )
    if not isinstance(org_ids, AllOrgs):
        waiting, running = (rows.where(_live.c.org_id.in_(org_ids)) for rows in (waiting, running))
        # No index has these by org: by its definitions, and by its open waits, also those of ended runs.
        held = held.join(_definitions, _definitions.c.id == _live.c.definition_id)
        held = held.where(_definitions.c.org_id.in_(org_ids))
        is_parked = parked.where(_live.c.id == _waits.c.run_id).limit(1).correlate(_waits)
        parked = select(_waits.c.run_id, is_parked.scalar_subquery().label("id"))
        parked = parked.where(_waits.c.org_id.in_(org_ids), text(tables.OPEN))
    found = {
        **_counted(connection, waiting, lambda row: {"waiting": _every}),
        **_counted(connection, held, lambda row: {"held": _every}),
        # A run may have several open waits.
        **_counted(connection, parked, lambda row: {"parked": func.count(row.id.distinct())}),
        **_counted(connection, running, lambda row: {"running": _every}),
    }
    unstarted = [found[state] for state in tables.UNSTARTED]
    total = sum(count.total for count in unstarted)
    at_least = total > MAX_ROWS or any(count.at_least for count in unstarted)
    return {"waiting": BoundedCount(min(total, MAX_ROWS), at_least), "running": found["running"]}


def ended(connection: Connection, org_ids: Sequence[OrgId], hours: Sequence[datetime]) -> dict[str, int]:
    """Runs of a few orgs that ended in these hours, by final state."""
    # By the key: a range of hours would read those of all orgs.
    query = select(_hours.c.state, func.sum(_hours.c.runs).label("runs")).where(
        _hours.c.hour.in_(hours), _hours.c.org_id.in_(org_ids)
    )
    rows = all_rows(connection, query.group_by(_hours.c.state).limit(len(tables.FINAL_STATES)))
    return {row["state"]: int(row["runs"]) for row in rows}


def definitions(connection: Connection, scope: Scope) -> dict[str, BoundedCount]:
    """Definitions by state, and by trouble. `all` are the open ones."""
    now = database_now(connection)
    columns = (_definitions.c[name] for name in ("id", "org_id", "closed_at", "enabled", "paused_at"))
    newest = select(*columns).where(*in_scope(_definitions.c.org_id, scope))
    candidates = select(_failing.c.definition_id).where(*in_scope(_failing.c.org_id, scope))
    return {
        **_counted(
            connection,
            newest.order_by(_definitions.c.id.desc()),
            lambda row: {
                "all": _those(row.closed_at.is_(None)),
                "disabled": _those(row.closed_at.is_(None), row.paused_at.is_(None), ~row.enabled),
                "closed": _those(row.closed_at.is_not(None)),
            },
        ),
        **_counted(
            connection,
            newest.where(_definitions.c.paused_at.is_not(None), _definitions.c.closed_at.is_(None)),
            lambda row: {"paused": _every},
        ),
        **_counted(
            connection,
            candidates.order_by(_failing.c.definition_id.desc()),
            lambda row: {"broken": _those(failing.is_broken("examined"))},
            most=MAX_CHECKED,
        ),
        **_counted(connection, _due(now), lambda row: {"overdue": _those(*in_scope(row.org_id, scope))}),
        **_counted(connection, _undone(scope), lambda row: {"late": _every}),
        **_counted(
            connection,
            _waiting(scope),
            lambda row: {"delayed": func.count(case((_is_long(row, now), row.definition_id)).distinct())},
        ),
    }


def orgs(connection: Connection, scope: Scope, states: Iterable[str]) -> dict[str, BoundedCount]:
    """Orgs by state, all of them, and those that are broken or late."""
    newest = select(_orgs.c.id, _orgs.c.state).where(*in_scope(_orgs.c.id, scope))
    every = failing.candidates(scope).subquery()
    some = select(every.c.org_id).distinct().limit(MAX_CHECKED + 1).subquery()
    # By its key: as a join, PostgreSQL would read all orgs.
    needs_fix = select(literal(1)).where(_orgs.c.id == some.c.org_id, failing.needs_fix()).limit(1)
    return {
        **_counted(
            connection,
            newest.order_by(_orgs.c.id.desc()),
            lambda row: {"all": _every, **{state: _those(row.state == state) for state in states}},
        ),
        **_counted(
            connection,
            select(needs_fix.scalar_subquery().label("broken")).select_from(some),
            lambda row: {"broken": func.count(row.broken)},
            most=MAX_CHECKED,
        ),
        **_counted(
            connection,
            select(_late.c.org_id).where(*in_scope(_late.c.org_id, scope)),
            lambda row: {"late": func.count(row.org_id.distinct())},
        ),
    }


def troubled(connection: Connection, scope: Scope, state: str) -> Condition:
    """A condition on `definitions`: open, and in this trouble; of those that are not broken MAX_ROWS."""
    now = database_now(connection)
    if state == "broken":
        candidates = select(_failing.c.definition_id).where(*in_scope(_failing.c.org_id, scope))
        # One by one, in the order of the list: PostgreSQL would otherwise read all runs for all of them.
        needs_fix = select(case((failing.is_broken(), 1))).where(
            _failing.c.definition_id == _definitions.c.id
        )
        is_broken = needs_fix.limit(1).scalar_subquery() == 1
        return and_(_definitions.c.id.in_(candidates), is_broken)
    if state == "overdue":
        some = _due(now).where(*in_scope(_schedule.c.org_id, scope)).limit(MAX_ROWS).subquery()
        rows = select(some.c.definition_id)
    elif state == "late":
        rows = select(_undone(scope).limit(MAX_ROWS).subquery().c.definition_id)
    else:
        some = _waiting(scope).limit(MAX_ROWS).subquery()
        rows = select(some.c.definition_id).where(_is_long(some.c, now))
    return and_(_definitions.c.id.in_(rows), _definitions.c.closed_at.is_(None))


def _due(now: datetime) -> Select[Any]:
    """The overdue scheduled times."""
    columns = (_schedule.c.definition_id, _schedule.c.org_id)
    return select(*columns).where(_schedule.c.next_fire_at <= now - OVERDUE)


def _undone(scope: Scope) -> Select[Any]:
    """The definitions whose deadline has passed."""
    return select(_late.c.definition_id).where(*in_scope(_late.c.org_id, scope))


def _waiting(scope: Scope) -> Select[Any]:
    """The waiting runs, without children."""
    rows = select(_live.c.definition_id, _live.c.available_at).where(is_listed(_live))
    return rows.where(_live.c.state == literal_column("'waiting'"), *in_scope(_live.c.org_id, scope))


def _is_long(row: Any, now: datetime) -> Condition:
    """Whether a waiting run is delayed."""
    is_long: Condition = row.available_at <= now - LONG_WAIT
    return is_long


def _those(*conditions: Condition) -> ColumnElement[Any]:
    """The number of rows that meet the conditions."""
    return func.count(case((and_(*conditions), 1))) if conditions else _every


def _counted(
    connection: Connection,
    rows: Select[Any] | CompoundSelect[Any],
    counts: Callable[[Any], Mapping[str, ColumnElement[Any]]],
    *,
    most: int | None = None,
) -> dict[str, BoundedCount]:
    """What is counted of the first `most` rows, by name; by default MAX_ROWS."""
    most = MAX_ROWS if most is None else most
    some = rows.limit(most + 1).subquery("examined")
    wanted = counts(some.c)
    query = select(_every.label("read"), *(count.label(name) for name, count in wanted.items()))
    [found] = all_rows(connection, query.select_from(some).limit(1))
    at_least = found["read"] > most
    return {name: BoundedCount(min(found[name], most), at_least) for name in wanted}
