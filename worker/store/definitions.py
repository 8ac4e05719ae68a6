"""Names: what people call the definitions that rows know by their ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Select, func, insert, select, text, update

from worker.errors import Conflict, NotFound
from worker.ids import DefinitionId, OrgId, RunId
from worker.store import tables
from worker.store.connection import chunks, upsert
from worker.store.listener import hint


class Names(NamedTuple):
    """An org's code and a definition's name; None where its row is gone."""

    org: str | None = None
    definition: str | None = None


def names_of(
    connection: Connection, org_id: OrgId, definition_ids: Iterable[DefinitionId]
) -> dict[DefinitionId, Names]:
    """The names of each of these definitions of one org."""
    return _names(connection, definition_ids, org_id)


def names_for_all_orgs(
    connection: Connection, definition_ids: Iterable[DefinitionId]
) -> dict[DefinitionId, Names]:
    """As `names_of`, of every org."""
    return _names(connection, definition_ids, None)


def _names(
    connection: Connection, definition_ids: Iterable[DefinitionId], org_id: OrgId | None
) -> dict[DefinitionId, Names]:
    orgs, definitions = tables.orgs, tables.definitions
    wanted = sorted(set(definition_ids))
    found = dict.fromkeys(wanted, Names())
    for part in chunks(wanted):
        query = (
            select(definitions.c.id, orgs.c.code, definitions.c.name)
            .join(orgs, orgs.c.id == definitions.c.org_id)
            .where(definitions.c.id.in_(part))
        )
        if org_id is not None:
            query = query.where(definitions.c.org_id == org_id)
        found |= {id_: Names(code, name) for id_, code, name in connection.execute(query)}
    return found


_runs = tables.runs

FAILED = ("failed", "refused")


def failed_in_a_row(
    connection: Connection, org_id: OrgId, definition_id: DefinitionId, *, since: datetime, most: int
) -> int:
    """How many of the newest runs that ended after `since` failed or were refused, up to `most`.

    Runs of a backfill, and those that were cancelled or skipped, are left out.
    """
    query = (
        select(_runs.c.state)
        .where(
            _runs.c.org_id == org_id,
            _runs.c.definition_id == definition_id,
            _runs.c.origin != "backfill",
            _runs.c.state.in_(("succeeded", *FAILED)),
            _runs.c.finished_at > since,
        )
        .order_by(_runs.c.id.desc())
        .limit(most)
    )
    failed = 0
    for state in connection.execute(query).scalars():
        if state not in FAILED:
            break
        failed += 1
    return failed


def last_failed(connection: Connection, org_id: OrgId, definition_id: DefinitionId) -> RunId | None:
    """The newest run that failed or was refused."""
    query = (
        select(_runs.c.id)
        .where(_runs.c.org_id == org_id, _runs.c.definition_id == definition_id, _runs.c.state.in_(FAILED))
        .order_by(_runs.c.id.desc())
        .limit(1)
    )
    return connection.execute(query).scalar_one_or_none()


Row = dict[str, Any]

_definitions = tables.definitions
_revisions = tables.definition_revisions
_schedule = tables.schedule
_orgs = tables.orgs
_skips = tables.skips


def _query() -> Select[Any]:
    """Definitions with their current spec, what their org says, and when they are due next."""
    return (
        select(
            _definitions,
            _revisions.c.spec,
            _orgs.c.code.label("org"),
            _orgs.c.state.label("org_state"),
            _orgs.c.timezone.label("org_timezone"),
            _schedule.c.next_scheduled_for,
            _schedule.c.next_fire_at,
        )
        .join(_orgs, _orgs.c.id == _definitions.c.org_id)
        .join(
            _revisions,
            (_revisions.c.definition_id == _definitions.c.id)
            & (_revisions.c.revision == _definitions.c.revision),
        )
        .outerjoin(_schedule, _schedule.c.definition_id == _definitions.c.id)
        .order_by(_definitions.c.id)
    )


def find(connection: Connection, org_id: OrgId, name: str) -> Row | None:
    """The definition of that name, closed or not; nothing is locked."""
    query = _query().where(_definitions.c.org_id == org_id, _definitions.c.name == name)
    row = connection.execute(query).mappings().first()
    return None if row is None else dict(row)


def require(connection: Connection, org_id: OrgId, org: str, name: str, *, lock: bool = False) -> Row:
    """As `find`, locked against firing and against other edits if asked.

    Raises:
        NotFound: the org has no such definition.
    """
    if lock:
        ids = select(_definitions.c.id).where(_definitions.c.org_id == org_id, _definitions.c.name == name)
        _lock(connection, ids)
    row = find(connection, org_id, name)
    if row is None:
        raise NotFound(
            f"org {org} has no definition {name}",
            fix=f"`definitions list --org {org}` names those it has, `apply` makes one",
        )
    return row


def find_by_id(connection: Connection, org_id: OrgId, definition_id: DefinitionId) -> Row | None:
    """The definition with this id, closed or not; nothing is locked."""
    query = _query().where(_definitions.c.org_id == org_id, _definitions.c.id == definition_id)
    row = connection.execute(query).mappings().first()
    return None if row is None else dict(row)


def require_by_id(connection: Connection, org_id: OrgId, definition_id: DefinitionId) -> Row:
    """The definition with this id, closed or not, locked against firing and against other edits."""
    mine = (_definitions.c.org_id == org_id, _definitions.c.id == definition_id)
    _lock(connection, select(_definitions.c.id).where(*mine))
    return dict(connection.execute(_query().where(*mine)).mappings().one())


def lock_org(connection: Connection, org_id: OrgId) -> list[Row]:
    """All definitions of one org that are not closed, locked against firing and against other edits."""
    open_ones = (_definitions.c.org_id == org_id, _definitions.c.closed_at.is_(None))
    _lock(connection, select(_definitions.c.id).where(*open_ones))
    return [dict(row) for row in connection.execute(_query().where(*open_ones)).mappings()]


def lock_for_all_orgs(connection: Connection, org_ids: Iterable[OrgId]) -> list[Row]:
    """All definitions of these orgs, closed ones too, locked as by `lock_org`."""
    rows: list[Row] = []
    for part in chunks(sorted(set(org_ids))):
        ours = _definitions.c.org_id.in_(part)
        _lock(connection, select(_definitions.c.id).where(ours))
        rows.extend(dict(row) for row in connection.execute(_query().where(ours)).mappings())
    return rows


def lock_named_for_all_orgs(
    connection: Connection, org_ids: Iterable[OrgId], names: Sequence[str], *, made_by_template: bool
) -> list[Row]:
    """Those of these orgs' definitions that have one of these names, closed ones too, locked.

    With `made_by_template` also all others that some template made.
    """
    rows: list[Row] = []
    for part in chunks(sorted(set(org_ids))):
        named: ColumnElement[bool] = _definitions.c.name.in_(names)
        if made_by_template:
            named |= _definitions.c.template_id.is_not(None)
        ours = (_definitions.c.org_id.in_(part), named)
        _lock(connection, select(_definitions.c.id).where(*ours))
        rows.extend(dict(row) for row in connection.execute(_query().where(*ours)).mappings())
    return rows


def page_scheduled_for_all_orgs(
    connection: Connection, *, after: DefinitionId | None, since: datetime, limit: int
) -> list[Row]:
    """Definitions whose next instant comes after `since`, by id from after `after` on; nothing is locked."""
    query = _query().where(_schedule.c.next_scheduled_for > since).limit(limit)
    if after is not None:
        query = query.where(_definitions.c.id > after)
    return [dict(row) for row in connection.execute(query).mappings()]


def lock_by_id_for_all_orgs(connection: Connection, ids: Sequence[DefinitionId]) -> list[Row]:
    """The definitions with these ids, locked as by `lock_org`."""
    rows: list[Row] = []
    for part in chunks(sorted(ids)):
        ours = _definitions.c.id.in_(part)
        _lock(connection, select(_definitions.c.id).where(ours))
        rows.extend(dict(row) for row in connection.execute(_query().where(ours)).mappings())
    return rows


def read_for_all_orgs(connection: Connection, ids: Iterable[DefinitionId]) -> list[Row]:
    """The definitions with these ids as they are now; nothing is locked."""
    rows: list[Row] = []
    for part in chunks(sorted(set(ids))):
        query = _query().where(_definitions.c.id.in_(part))
        rows.extend(dict(row) for row in connection.execute(query).mappings())
    return rows


def last_decided_for_all_orgs(
    connection: Connection, ids: Iterable[DefinitionId]
) -> dict[DefinitionId, datetime]:
    """The newest instant of each definition that became a run or a skip; those that have none left out."""
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
    found: dict[DefinitionId, datetime] = {}
    for part in chunks(sorted(set(ids))):
        query = select(_definitions.c.id, newest_run, newest_skip).where(_definitions.c.id.in_(part))
        for id_, *instants in connection.execute(query):
            if decided := [instant for instant in instants if instant is not None]:
                found[id_] = max(decided)
    return found


def _lock(connection: Connection, ids: Select[Any]) -> None:
    # The rows are read by a later statement: on PostgreSQL a statement that waited for
    # a lock still sees the other tables as they were before the wait.
    if connection.dialect.name == "postgresql":
        in_order = ids.order_by(_definitions.c.id)
        connection.execute(in_order.with_for_update()).all()
        connection.execute(
            select(_schedule.c.definition_id)
            .where(_schedule.c.definition_id.in_(ids))
            .order_by(_schedule.c.definition_id)
            .with_for_update()
        ).all()


def insert_for_all_orgs(
    connection: Connection,
    definitions: Sequence[Mapping[str, Any]],
    revisions: Sequence[Mapping[str, Any]],
) -> None:
    """Insert new definitions with their first revisions, and the new revisions of others."""
    if definitions:
        connection.execute(insert(_definitions), [dict(row) for row in definitions])
    if revisions:
        connection.execute(insert(_revisions), [dict(row) for row in revisions])


def change(
    connection: Connection,
    org_id: OrgId,
    definition_id: DefinitionId,
    values: Mapping[str, Any],
    *,
    at: datetime,
    revision: int,
) -> None:
    """Change columns of one definition that is still at `revision`.

    Raises:
        Conflict: somebody else has changed it meanwhile.
    """
    changed = connection.execute(
        update(_definitions)
        .where(
            _definitions.c.org_id == org_id,
            _definitions.c.id == definition_id,
            _definitions.c.revision == revision,
        )
        .values(**values, updated_at=at)
    )
    if changed.rowcount != 1:
        raise Conflict(
            f"definition {definition_id} was changed by somebody else meanwhile",
            fix="look at it and try again",
        )


def set_failures(connection: Connection, org_id: OrgId, definition_id: DefinitionId, failures: int) -> None:
    """Set how many runs failed one after the other; no change that anybody made, so `updated_at` stays."""
    connection.execute(
        update(_definitions)
        .where(_definitions.c.org_id == org_id, _definitions.c.id == definition_id)
        .values(consecutive_failures=failures)
    )


def set_next_for_all_orgs(
    connection: Connection,
    nexts: Sequence[tuple[OrgId, DefinitionId, datetime | None, datetime | None]],
) -> None:
    """Set when definitions are due next: (org, definition, nominal instant, that plus spread)."""
    if nexts:
        statement = upsert(connection, _schedule, ("definition_id",), ("next_scheduled_for", "next_fire_at"))
        connection.execute(
            statement,
            [
                {"org_id": org, "definition_id": id_, "next_scheduled_for": nominal, "next_fire_at": fire}
                for org, id_, nominal, fire in nexts
            ],
        )
        hint(connection)
