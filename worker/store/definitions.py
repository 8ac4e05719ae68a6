"""Definitions: read and locked, changed by operations, counted by their outcomes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import takewhile
from typing import Any, NamedTuple

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    FromClause,
    Select,
    Subquery,
    bindparam,
    false,
    func,
    select,
    text,
    update,
)

from worker.errors import Conflict, NotFound
from worker.ids import DefinitionId, OrgId, RunId, Scope
from worker.store import tables
from worker.store.bulk import among, insert_many, rows_among
from worker.store.dialect import Row, above, all_rows, chunks, hint, in_scope, is_postgresql

_definitions = tables.definitions
_revisions = tables.definition_revisions
_schedule = tables.schedule
_orgs = tables.orgs
_runs = tables.runs
_skips = tables.skips
# Open definitions that are looked at, the newest ones.
NEWEST = 10_000


class Names(NamedTuple):
    """An org's code and a definition's name; None if its row is gone."""

    org: str | None = None
    definition: str | None = None


def names_of(
    connection: Connection, scope: Scope, definition_ids: Iterable[DefinitionId]
) -> dict[DefinitionId, Names]:
    """The names of each of these definitions of one org or of all."""
    wanted = set(definition_ids)
    query = (
        select(_definitions.c.id, _orgs.c.code, _definitions.c.name)
        .join(_orgs, _orgs.c.id == _definitions.c.org_id)
        .where(*in_scope(_definitions.c.org_id, scope))
    )
    found = rows_among(connection, query, _definitions.c.id, wanted)
    return dict.fromkeys(wanted, Names()) | {id_: Names(code, name) for id_, code, name in found}


FAILED = ("failed", "refused")


def failed_in_a_row(
    connection: Connection, org_id: OrgId, definition_id: DefinitionId, *, since: datetime, most: int
) -> int:
    """How many of the newest runs that ended after `since` failed or were refused in a row, up to `most`.

    Runs of backfills, children, and cancelled or skipped runs, do not count.
    """
    query = (
        select(_runs.c.state)
        .where(
            _runs.c.org_id == org_id,
            _runs.c.definition_id == definition_id,
            _runs.c.origin.not_in(("backfill", "child")),
            _runs.c.state.in_(("succeeded", *FAILED)),
            _runs.c.finished_at > since,
        )
        .order_by(_runs.c.id.desc())
        .limit(most)
    )
    states = connection.execute(query).scalars()
    return sum(1 for _ in takewhile(lambda state: state in FAILED, states))


def last_failed(connection: Connection, org_id: OrgId, definition_id: DefinitionId) -> RunId | None:
    """The newest run that failed or was refused; not a child."""
    query = (
        select(_runs.c.id)
        .where(_runs.c.org_id == org_id, _runs.c.definition_id == definition_id, _runs.c.state.in_(FAILED))
        .where(_runs.c.origin != "child")
        .order_by(_runs.c.id.desc())
        .limit(1)
    )
    return connection.execute(query).scalar_one_or_none()


def in_force(of: FromClause) -> ColumnElement[bool]:
    """The condition that a row of `definition_revisions` is the one in force of a definition's row."""
    return (_revisions.c.definition_id == of.c.id) & (_revisions.c.revision == of.c.revision)


def spec_of(
    connection: Connection, org_id: OrgId, definition_id: DefinitionId, revision: int
) -> Mapping[str, Any]:
    """The keys of a definition as of a revision that it has."""
    query = (
        select(_revisions.c.spec)
        .join(_definitions, _definitions.c.id == _revisions.c.definition_id)
        .where(
            _definitions.c.org_id == org_id,
            _definitions.c.id == definition_id,
            _revisions.c.revision == revision,
        )
    )
    spec: Mapping[str, Any] = connection.execute(query).scalar_one()
    return spec


def newest_open(scope: Scope) -> Subquery:
    """The newest `NEWEST` open definitions: id, org_id, name, revision, template_id."""
    return (
        select(*(_definitions.c[name] for name in ("id", "org_id", "name", "revision", "template_id")))
        .where(_definitions.c.closed_at.is_(None), *in_scope(_definitions.c.org_id, scope))
        .order_by(_definitions.c.id.desc())
        .limit(NEWEST)
        .subquery()
    )


def reveals_token() -> ColumnElement[bool]:
    """Whether the revision in the outer query gives sealed runs the org's token itself."""
    return func.coalesce(_revisions.c.spec["reveal_token"].as_boolean(), false())


def _query() -> Select[Any]:
    """Definitions with their current spec, their org's columns, and their next times."""
    return (
        select(
            _definitions,
            _revisions.c.spec,
            _orgs.c.code.label("org"),
            _orgs.c.state.label("org_state"),
            _orgs.c.timezone.label("org_timezone"),
            _orgs.c.pool.label("org_pool"),
            _schedule.c.next_scheduled_for,
            _schedule.c.next_fire_at,
        )
        .join(_orgs, _orgs.c.id == _definitions.c.org_id)
        .join(_revisions, in_force(_definitions))
        .outerjoin(_schedule, _schedule.c.definition_id == _definitions.c.id)
        .order_by(_definitions.c.id)
    )


def _read(
    connection: Connection, *which: ColumnElement[bool], lock: bool = False, most: int | None = None
) -> list[Row]:
    """These definitions, by id; `lock` keeps firing and other edits out until the transaction ends."""
    if lock and is_postgresql(connection):
        # The rows are read by a later statement: on PostgreSQL a statement that waited for
        # a lock still sees the other tables as they were before the wait.
        ids = select(_definitions.c.id).where(*which)
        connection.execute(ids.order_by(_definitions.c.id).with_for_update()).all()
        connection.execute(
            select(_schedule.c.definition_id)
            .where(_schedule.c.definition_id.in_(ids))
            .order_by(_schedule.c.definition_id)
            .with_for_update()
        ).all()
    return all_rows(connection, _query().where(*which).limit(most))


def find(connection: Connection, org_id: OrgId, name: str) -> Row | None:
    """The definition of that name, closed or not, without a lock."""
    rows = _read(connection, _definitions.c.org_id == org_id, _definitions.c.name == name, most=1)
    return rows[0] if rows else None


def require(connection: Connection, org_id: OrgId, org: str, name: str, *, lock: bool = False) -> Row:
    """As `find`, locked if asked.

    Raises:
        NotFound: the org has no such definition.
    """
    rows = _read(connection, _definitions.c.org_id == org_id, _definitions.c.name == name, lock=lock, most=1)
    if not rows:
        raise NotFound(
            f"org {org} has no definition {name}",
            fix=f"`definitions list --org {org}` lists its definitions, `apply` makes one",
            sought=("definition", name, org),
        )
    return rows[0]


def find_by_id(connection: Connection, org_id: OrgId, definition_id: DefinitionId) -> Row | None:
    """The definition with this id, closed or not, without a lock."""
    rows = _read(connection, _definitions.c.org_id == org_id, _definitions.c.id == definition_id, most=1)
    return rows[0] if rows else None


def require_by_id(connection: Connection, org_id: OrgId, definition_id: DefinitionId) -> Row:
    """The definition with this id, closed or not, locked."""
    (row,) = _read(connection, _definitions.c.org_id == org_id, _definitions.c.id == definition_id, lock=True)
    return row


def lock_org(connection: Connection, org_id: OrgId) -> list[Row]:
    """All open definitions of one org, locked."""
    return lock(connection, [org_id], _definitions.c.closed_at.is_(None))


def lock(connection: Connection, org_ids: Iterable[OrgId], *which: ColumnElement[bool]) -> list[Row]:
    """All definitions of these orgs that meet a condition, closed ones too, locked."""
    return _read_each(connection, _definitions.c.org_id, org_ids, *which, lock=True)


def is_named(names: Sequence[str], *, or_made_by_template: bool) -> ColumnElement[bool]:
    """A condition for `lock`: it has one of these names, or else a template made it, if that will do."""
    named: ColumnElement[bool] = _definitions.c.name.in_(names)
    return named | _definitions.c.template_id.is_not(None) if or_made_by_template else named


def scheduled(
    connection: Connection, scope: Scope, *, after: DefinitionId | None, since: datetime, limit: int
) -> list[Row]:
    """Definitions whose next scheduled time is later than `since`, by id, those after `after`; no lock."""
    query = _query().where(_schedule.c.next_scheduled_for > since).limit(limit)
    query = query.where(*in_scope(_definitions.c.org_id, scope), *above(_definitions.c.id, after))
    return all_rows(connection, query)


def read(
    connection: Connection, scope: Scope, ids: Iterable[DefinitionId], *, lock: bool = False
) -> list[Row]:
    """The definitions of one org or of all with these ids, locked if asked."""
    mine = in_scope(_definitions.c.org_id, scope)
    return _read_each(connection, _definitions.c.id, ids, *mine, lock=lock)


def _read_each(
    connection: Connection, key: Column[Any], values: Iterable[str], *which: Any, lock: bool
) -> list[Row]:
    return [
        row
        for part in chunks(sorted(set(values)))
        for row in _read(connection, among(connection, key, part), *which, lock=lock)
    ]


def active(connection: Connection, org_ids: Sequence[OrgId]) -> list[Row]:
    """These orgs' definitions that are neither closed nor disabled: id, org_id, name, spec, paused_at."""
    query = (
        select(
            _definitions.c.id,
            _definitions.c.org_id,
            _definitions.c.name,
            _definitions.c.paused_at,
            _revisions.c.spec,
        )
        .join(_revisions, in_force(_definitions))
        .where(_definitions.c.org_id.in_(org_ids), _definitions.c.closed_at.is_(None), _definitions.c.enabled)
        .order_by(_definitions.c.org_id, _definitions.c.name)
    )
    return all_rows(connection, query)


def last_decided(
    connection: Connection, scope: Scope, ids: Iterable[DefinitionId]
) -> dict[DefinitionId, datetime]:
    """Each definition's newest scheduled time that became a run or a skip, if it has one."""
    newest_run = (
        select(func.max(_runs.c.scheduled_for))
        .where(_runs.c.definition_id == _definitions.c.id, text("runs.origin = 'schedule'"))
        .scalar_subquery()
    )
    newest_skip = (
        select(_skips.c.skipped_until)
        .where(_skips.c.definition_id == _definitions.c.id)
        .order_by(_skips.c.skipped_from.desc())
        .limit(1)
        .scalar_subquery()
    )
    query = select(_definitions.c.id, newest_run, newest_skip)
    query = query.where(*in_scope(_definitions.c.org_id, scope))
    return {
        id_: max(decided)
        for id_, *times in rows_among(connection, query, _definitions.c.id, ids)
        if (decided := [time for time in times if time is not None])
    }


def add(
    connection: Connection, definitions: Sequence[Mapping[str, Any]], revisions: Sequence[Mapping[str, Any]]
) -> None:
    """Insert new definitions, and new revisions of these and others."""
    insert_many(connection, _definitions, definitions)
    insert_many(connection, _revisions, revisions)


class DefinitionUpdate(NamedTuple):
    """Columns to change of a definition that is still at `revision`."""

    org_id: OrgId
    id: DefinitionId
    revision: int
    values: Mapping[str, Any]


def change(connection: Connection, changes: Iterable[DefinitionUpdate], *, at: datetime) -> None:
    """Change columns of definitions: one statement for those whose same columns change.

    Raises:
        Conflict: one has another revision by now.
    """
    alike: dict[tuple[str, ...], list[Row]] = {}
    for each in changes:
        new = {f"new_{name}": value for name, value in each.values.items()}
        of = {"of_org": each.org_id, "of_id": each.id, "at_revision": each.revision}
        alike.setdefault(tuple(each.values), []).append(new | of)
    for names, rows in alike.items():
        statement = (
            update(_definitions)
            .where(
                _definitions.c.org_id == bindparam("of_org"),
                _definitions.c.id == bindparam("of_id"),
                _definitions.c.revision == bindparam("at_revision"),
            )
            .values({name: bindparam(f"new_{name}") for name in names} | {"updated_at": at})
        )
        if connection.execute(statement, rows).rowcount != len(rows):
            which = f"definition {rows[0]['of_id']}" if len(rows) == 1 else "a definition"
            raise Conflict(f"{which} was changed by someone else meanwhile", fix="look at it and try again")


def set_failures(connection: Connection, org_id: OrgId, definition_id: DefinitionId, failures: int) -> None:
    """Set how many runs failed in a row; `updated_at` stays, since no person changed anything."""
    connection.execute(
        update(_definitions)
        .where(_definitions.c.org_id == org_id, _definitions.c.id == definition_id)
        .values(consecutive_failures=failures)
    )


def set_next(
    connection: Connection, nexts: Sequence[tuple[OrgId, DefinitionId, datetime | None, datetime | None]]
) -> None:
    """Set when definitions are due next: (org, definition, scheduled time, the same plus spread)."""
    if nexts:
        insert_many(
            connection,
            _schedule,
            [
                {"definition_id": id_, "org_id": org, "next_scheduled_for": nominal, "next_fire_at": fire}
                for org, id_, nominal, fire in nexts
            ],
            key=("definition_id",),
            replaced=("next_scheduled_for", "next_fire_at"),
        )
        hint(connection)
