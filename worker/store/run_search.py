"""Which runs a list means, newest first, without walking the history.

An org, or a definition of one, goes by its index. Else the newest runs that meet each condition
alone are looked at, so many at most, until they hold a page or are all that there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, FromClause, Select, func, select

from worker.errors import UsageError
from worker.ids import OrgId, RunId, lowest_id
from worker.store import tables
from worker.store.paging import DEFAULT_LIMIT, check_limit, checked_id

RUN_STATES = ("waiting", "running", *tables.FINAL_STATES)
# Runs looked at under one condition: some 20 ms of SQLite.
WINDOW = 20_000

_runs = tables.runs
_ends = tables.run_ends
_live = tables.live_runs
_definitions = tables.definitions

_LOOKED_AT = (_runs.c.id, _runs.c.org_id, _runs.c.definition_id, _runs.c.state)
_ENDED = (_ends.c.run_id.label("id"), _ends.c.org_id, _ends.c.definition_id, _ends.c.state)

Condition = ColumnElement[bool]
Met = dict[str, str | Select[Any]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What narrows a list of runs, and which page of it.

    Raises:
        UsageError: a state or limit that is none.
        NotFound: `after` is no id.
    """

    definition: str | None = None
    state: str | None = None
    since: datetime | None = None
    limit: int = DEFAULT_LIMIT
    after: str | None = None

    def __post_init__(self) -> None:
        check_limit(self.limit)
        if self.after is not None:
            checked_id(self.after)
        if self.state is not None and self.state not in RUN_STATES:
            raise UsageError(f"{self.state!r} is no state of a run", fix=f"one of {', '.join(RUN_STATES)}")


def find(connection: Connection, org_id: OrgId, wanted: Wanted) -> list[RunId]:
    """The ids of a page of one org's runs."""
    return _find(connection, org_id, wanted)


def find_for_all_orgs(connection: Connection, wanted: Wanted) -> list[RunId]:
    """As `find`, of every org."""
    return _find(connection, None, wanted)


def _find(connection: Connection, org_id: OrgId | None, wanted: Wanted) -> list[RunId]:
    met = _met(org_id, wanted.definition)
    if wanted.state is not None and wanted.state not in tables.FINAL_STATES:
        return _unfinished(connection, met, wanted)
    if wanted.state is not None:
        met["state"] = wanted.state
    # The runs of one org or definition are in order in an index; those of a state or of a name are not.
    if len(met) > 1 or wanted.state is not None or (wanted.definition is not None and org_id is None):
        for alone in ((), ("state",), ("org_id",), ("definition_id",)):
            if met.keys() >= set(alone):
                found = _in_window(connection, alone, met, wanted)
                if found is not None:
                    return found
    query = select(_runs.c.id).where(*_that_meet(_runs, met), *_bounds(_runs.c.id, wanted))
    if wanted.since is not None:
        query = query.where(_runs.c.created_at >= wanted.since)
    return _ids(connection, query, _runs.c.id, wanted.limit)


def _unfinished(connection: Connection, met: Met, wanted: Wanted) -> list[RunId]:
    """Unfinished runs are few, and in a table of their own."""
    kept = ("running",) if wanted.state == "running" else ("waiting", "held")
    query = select(_live.c.id).where(
        _live.c.state.in_(kept), *_that_meet(_live, met), *_bounds(_live.c.id, wanted)
    )
    if wanted.since is not None:
        query = query.join(_runs, _runs.c.id == _live.c.id).where(_runs.c.created_at >= wanted.since)
    return _ids(connection, query, _live.c.id, wanted.limit)


def _met(org_id: OrgId | None, definition: str | None) -> Met:
    """What each column is to be: a value, or one of those that a query gives."""
    met: Met = {}
    named = select(_definitions.c.id).where(_definitions.c.name == definition)
    if org_id is not None:
        met["org_id"] = org_id
        named = named.where(_definitions.c.org_id == org_id)
    if definition is not None:
        met["definition_id"] = named
    return met


def _that_meet(rows: FromClause, met: Met) -> list[Condition]:
    return [
        rows.c[name].in_(value) if isinstance(value, Select) else rows.c[name] == value
        for name, value in met.items()
    ]


def _bounds(id_: ColumnElement[Any], wanted: Wanted) -> list[Condition]:
    """Of ids, which are in order of when their runs were created, by the clock of whoever did so."""
    bounds: list[Condition] = []
    if wanted.after is not None:
        bounds.append(id_ < checked_id(wanted.after))
    if wanted.since is not None:
        bounds.append(id_ >= lowest_id(wanted.since))
    return bounds


def _in_window(connection: Connection, alone: Sequence[str], met: Met, wanted: Wanted) -> list[RunId] | None:
    """The page, from the newest runs that meet `alone`; None where those do not settle it."""
    within = {name: met[name] for name in alone}
    # By state from the narrow table alone: a join with all runs reads all of them.
    rows, columns = (_ends, _ENDED) if "state" in within else (_runs, _LOOKED_AT)
    some = select(*columns).where(*_that_meet(rows, within), *_bounds(columns[0], wanted)).limit(WINDOW)
    if wanted.since is not None and rows is _runs:
        some = some.where(_runs.c.created_at >= wanted.since)
    in_order = not isinstance(within.get("definition_id"), Select)
    window = (some.order_by(columns[0].desc()) if in_order else some).subquery("some")
    rest = _that_meet(window, {name: value for name, value in met.items() if name not in alone})
    query = select(window.c.id).where(*rest).order_by(window.c.id.desc()).limit(wanted.limit)
    if wanted.since is not None and rows is _ends:
        query = query.join(_runs, _runs.c.id == window.c.id).where(_runs.c.created_at >= wanted.since)
    found = [RunId(id_) for id_ in connection.execute(query).scalars()]
    if len(found) == wanted.limit and in_order:
        return found
    size = connection.execute(select(func.count()).select_from(window)).scalar_one()
    return found if size < WINDOW else None


def _ids(connection: Connection, query: Select[Any], id_: ColumnElement[Any], limit: int) -> list[RunId]:
    return [RunId(found) for found in connection.execute(query.order_by(id_.desc()).limit(limit)).scalars()]
