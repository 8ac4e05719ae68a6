"""Templates as people see them: what each makes, for which orgs, and how far its last change has got."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Connection, select

from worker.errors import NotFound
from worker.store import orgs, tables
from worker.store.paging import DEFAULT_LIMIT, Row, check_state, page

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
