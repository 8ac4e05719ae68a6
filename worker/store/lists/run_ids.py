"""Runs by what people give of an id: all of it, its beginning, or `TIME…TAIL` (`worker.ids.given_id`).

The primary key serves all orgs, the index of (org_id, id) one org. Ids that begin alike are read in the
index and compared with the tail, so a short id needs no index of its own.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Select, func, select

from worker.errors import AmbiguousRun, NotFound, UsageError
from worker.ids import MILLISECOND, GivenId, RunId, Scope, given_id
from worker.store import tables
from worker.store.dialect import all_rows, in_scope
from worker.store.lists import checked_id
from worker.store.lists.matching import has_id

# Runs that an error lists.
CANDIDATES = 5
# Ids with the same beginning that are compared with a tail.
EXAMINED = 200_000

_runs, _orgs, _definitions = tables.runs, tables.orgs, tables.definitions


def id_of(connection: Connection, scope: Scope, text: str) -> RunId:
    """The id of the run in this scope that a text names; a whole id as it is, whether or not it exists.

    Raises:
        NotFound: the text is not an id, or no run fits.
        AmbiguousRun: it fits several.
        UsageError: too many ids begin so to look at the ends of all.
    """
    given = given_id(text)
    if given is None or given.is_whole:
        return RunId(checked_id(text))
    found = fitting(connection, scope, given, CANDIDATES + 1)
    if not found:
        raise NotFound(f"there is no run {text}", fix="`runs list` shows the runs")
    if len(found) > 1:
        raise _ambiguous(connection, scope, text, found)
    return found[0]


def fitting(connection: Connection, scope: Scope, given: GivenId, limit: int) -> list[RunId]:
    """The ids of the newest runs in this scope that fit.

    Raises:
        UsageError: too many ids begin so to look at the ends of all.
    """
    query = select(_runs.c.id).where(*in_scope(_runs.c.org_id, scope))
    if given.tail:
        begin = given._replace(tail="")
        _check_few(connection, given, query.where(has_id(begin, _runs.c.id)))
    query = query.where(has_id(given, _runs.c.id))
    ids = connection.execute(query.order_by(_runs.c.id.desc()).limit(limit)).scalars()
    return [RunId(id_) for id_ in ids]


def _check_few(connection: Connection, given: GivenId, query: Select[Any]) -> None:
    """Raise UsageError if too many ids of the query begin alike to look at the ends of all."""
    # The runs of a millisecond are few enough: a due time has at most 100,000.
    if given.first[:MILLISECOND] != given.last[:MILLISECOND]:
        some = query.limit(EXAMINED + 1).subquery("some")
        if connection.execute(select(func.count()).select_from(some)).scalar_one() > EXAMINED:
            raise UsageError(
                f"too many ids begin with {given.first[:8]} to look for one that ends with {given.tail}",
                fix="give more of the beginning",
            )


def _ambiguous(connection: Connection, scope: Scope, text: str, found: list[RunId]) -> AmbiguousRun:
    rows = all_rows(
        connection,
        select(
            _runs.c.id,
            _orgs.c.code.label("org"),
            _definitions.c.name.label("definition"),
            _runs.c.scheduled_for,
        )
        .join(_orgs, _orgs.c.id == _runs.c.org_id)
        .join(_definitions, _definitions.c.id == _runs.c.definition_id)
        .where(_runs.c.id.in_(found[:CANDIDATES]), *in_scope(_runs.c.org_id, scope))
        .order_by(_runs.c.id.desc()),
    )
    more = ", the newest of them" if len(found) > CANDIDATES else ""
    return AmbiguousRun(f"several runs fit {text}{more}", candidates=rows)
