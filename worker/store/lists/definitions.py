"""Definitions and templates as people see them, with the schedule in force and the next due time."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, false, select

from worker.errors import NotFound
from worker.store import definitions as definition_rows
from worker.store import orgs, tables
from worker.store import orgs as org_rows
from worker.store.lists.paging import DEFAULT_LIMIT, Row, check_state, page

DEFINITION_STATES = ("active", "paused", "disabled", "closed")

_orgs = tables.orgs
_definitions = tables.definitions
_revisions = tables.definition_revisions
_schedule = tables.schedule


def definitions(
    connection: Connection,
    org: str,
    *,
    definition: str | None = None,
    state: str | None = None,
    since: datetime | None = None,
    limit: int = DEFAULT_LIMIT,
    after: str | None = None,
) -> list[Row]:
    """One org's definitions, newest first; those that are closed only where the state asks for them.

    Raises:
        NotFound: there is no such org.
        UsageError: a state, limit or id that is none.
    """
    mine = _definitions.c.org_id == org_rows.require(connection, org)["id"]
    return _definition_page(connection, [mine], definition, state, since, limit, after)


def definitions_for_all_orgs(
    connection: Connection,
    *,
    definition: str | None = None,
    state: str | None = None,
    since: datetime | None = None,
    limit: int = DEFAULT_LIMIT,
    after: str | None = None,
) -> list[Row]:
    """As `definitions`, of every org."""
    return _definition_page(connection, [], definition, state, since, limit, after)


def definition(connection: Connection, org: str, name: str) -> Row:
    """One definition, closed or not, with its whole spec.

    Raises:
        NotFound: there is no such org, or it has no such definition.
    """
    org_id = org_rows.require(connection, org)["id"]
    definition_rows.require(connection, org_id, org, name)
    query = _definition_query().where(_definitions.c.org_id == org_id, _definitions.c.name == name)
    row = dict(connection.execute(query).mappings().one())
    return _shown_definition(row) | {"spec": row["spec"]}


def _definition_query() -> Select[Any]:
    return (
        select(
            _definitions,
            _orgs.c.code.label("org"),
            _orgs.c.state.label("org_state"),
            _orgs.c.timezone.label("org_timezone"),
            _revisions.c.spec,
            _schedule.c.next_scheduled_for,
            _schedule.c.next_fire_at,
            tables.templates.c.name.label("template"),
        )
        .join(_orgs, _orgs.c.id == _definitions.c.org_id)
        .join(
            _revisions,
            (_revisions.c.definition_id == _definitions.c.id)
            & (_revisions.c.revision == _definitions.c.revision),
        )
        .outerjoin(_schedule, _schedule.c.definition_id == _definitions.c.id)
        .outerjoin(tables.templates, tables.templates.c.id == _definitions.c.template_id)
    )


_IN_STATE: dict[str, tuple[ColumnElement[bool], ...]] = {
    "active": (
        _definitions.c.closed_at.is_(None),
        _definitions.c.enabled,
        _definitions.c.paused_at.is_(None),
    ),
    "paused": (_definitions.c.closed_at.is_(None), _definitions.c.paused_at.is_not(None)),
    "disabled": (
        _definitions.c.closed_at.is_(None),
        _definitions.c.paused_at.is_(None),
        _definitions.c.enabled == false(),
    ),
    "closed": (_definitions.c.closed_at.is_not(None),),
}


def _definition_page(
    connection: Connection,
    where: list[ColumnElement[bool]],
    name: str | None,
    state: str | None,
    since: datetime | None,
    limit: int,
    after: str | None,
) -> list[Row]:
    if state is not None:
        check_state(state, DEFINITION_STATES)
    shown = _IN_STATE[state] if state else (_definitions.c.closed_at.is_(None),)
    if name is not None:
        shown = (*shown, _definitions.c.name == name)
    rows = page(
        connection,
        _definition_query().where(*where, *shown),
        _definitions.c.id,
        limit=limit,
        after=after,
        since=since,
        since_column=_definitions.c.created_at,
    )
    return [_shown_definition(row) for row in rows]


def _shown_definition(row: Row) -> Row:
    """The columns of `definitions list`; `timezone` is the one in force, `state` one of four."""
    spec = row["spec"]
    if row["closed_at"] is not None:
        state = "closed"
    elif row["paused_at"] is not None:
        state = "paused"
    else:
        state = "active" if row["enabled"] else "disabled"
    return {
        "id": row["id"],
        "org": row["org"],
        "name": row["name"],
        "handler": spec["handler"],
        "schedule": spec["schedule"],
        "timezone": spec.get("timezone") or row["org_timezone"] or "UTC",
        "state": state,
        "org_state": row["org_state"],
        "next_scheduled_for": row["next_scheduled_for"],
        "next_fire_at": row["next_fire_at"],
        "revision": row["revision"],
        "enabled": row["enabled"],
        "paused_at": row["paused_at"],
        "paused_by": row["paused_by"],
        "pause_note": row["pause_note"],
        "consecutive_failures": row["consecutive_failures"],
        "template": row["template"],
        "created_at": row["created_at"],
        "updated_at": row["updated_at"],
        "closed_at": row["closed_at"],
    }


TEMPLATE_STATES = ("open", "closed")

_templates = tables.templates


def templates_for_all_orgs(
    connection: Connection,
    *,
    state: str | None = None,
    since: datetime | None = None,
    limit: int = DEFAULT_LIMIT,
    after: str | None = None,
) -> list[Row]:
    """Templates, newest first; closed ones only where the state asks for them.

    Raises:
        UsageError: a state, limit or id that is none.
    """
    if state is not None:
        check_state(state, TEMPLATE_STATES)
    is_open = _templates.c.closed_at.is_(None)
    rows = page(
        connection,
        select(_templates).where(~is_open if state == "closed" else is_open),
        _templates.c.id,
        limit=limit,
        after=after,
        since=since,
        since_column=_templates.c.created_at,
    )
    return [_shown(row) for row in rows]


def templates(connection: Connection, org: str) -> list[Row]:
    """The templates that made a definition of this org, closed ones too, newest first.

    Raises:
        NotFound: there is no such org.
    """
    made = tables.definitions
    mine = select(made.c.template_id).where(
        made.c.org_id == orgs.require(connection, org)["id"], made.c.closed_at.is_(None)
    )
    query = select(_templates).where(_templates.c.id.in_(mine)).order_by(_templates.c.id.desc())
    return [_shown(dict(row)) for row in connection.execute(query).mappings()]


def template_for_all_orgs(connection: Connection, name: str) -> Row:
    """One template, closed or not, with its whole spec.

    Raises:
        NotFound: there is no such template.
    """
    row = connection.execute(select(_templates).where(_templates.c.name == name)).mappings().first()
    if row is None:
        raise NotFound(f"there is no template {name}", fix="`templates list` names the templates")
    return _shown(dict(row)) | {"spec": row["spec"]}


def _shown(row: dict[str, Any]) -> Row:
    return {
        "id": row["id"],
        "name": row["name"],
        "orgs": row["selector"],
        "handler": row["spec"]["handler"],
        "schedule": row["spec"]["schedule"],
        "state": "open" if row["closed_at"] is None else "closed",
        "revision": row["revision"],
        "orgs_done": row["orgs_done"],
        "orgs_total": row["orgs_total"],
        "materialised_at": row["materialised_at"],
        "created_at": row["created_at"],
        "updated_at": row["updated_at"],
        "updated_by": row["updated_by"],
        "closed_at": row["closed_at"],
    }
