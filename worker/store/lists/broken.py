"""Broken definitions and dead credentials, one row each, for the page of what needs attention."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, TypedDict

from sqlalchemy import Connection, literal_column, null, select, text

from worker.ids import ALL_ORGS, OrgScope, Scope
from worker.store import failing, orgs, tables
from worker.store.dialect import Id, below, in_scope, rows_as
from worker.store.lists import DEFAULT_LIMIT, Page, redaction
from worker.store.lists.redaction import Shown

_failing, _credentials, _orgs = tables.failing_definitions, tables.credentials, tables.orgs
_definitions, _runs = tables.definitions, tables.runs
FIRST_PAGE = Page()


class Broken(TypedDict):
    """A definition whose newest run failed or was refused, or else a credential that is dead.

    `id` is the definition's or the org's, `since` when the run ended or the credential was last used.
    """

    id: Shown[str]
    org: Shown[str]
    definition: Shown[str | None]
    run: Shown[str | None]
    state: Shown[str]
    reason: Shown[str | None]
    detail: Annotated[str | None, redaction.detail]
    since: Shown[datetime | None]


def page_of(connection: Connection, page: Page = FIRST_PAGE, scope: OrgScope = ALL_ORGS) -> list[Broken]:
    """What is broken, the newest definitions and orgs first, in pages by `id`.

    `state` of a row is `failed` or `refused`, or `credential_dead`.

    Raises:
        NotFound: there is no org of the scope.
    """
    org_id, limit = orgs.scope_of(connection, scope), page.limit or DEFAULT_LIMIT
    found = _definitions_of(connection, org_id, page, limit) + _credentials_of(
        connection, org_id, page, limit
    )
    return sorted(found, key=lambda row: row["id"], reverse=True)[:limit]


def _definitions_of(connection: Connection, scope: Scope, page: Page, limit: int) -> list[Broken]:
    newest = literal_column(f"({failing.NEWEST})", Id)
    statement = (
        select(
            _failing.c.definition_id.label("id"),
            _orgs.c.code.label("org"),
            _definitions.c.name.label("definition"),
            _runs.c.id.label("run"),
            _runs.c.state,
            _runs.c.reason,
            _runs.c.detail,
            _runs.c.finished_at.label("since"),
        )
        .join(_orgs, _orgs.c.id == _failing.c.org_id)
        .join(_definitions, _definitions.c.id == _failing.c.definition_id)
        .join(_runs, _runs.c.id == newest)
        .where(_orgs.c.state != "removed", failing.is_broken())
    )
    statement = statement.where(
        *in_scope(_failing.c.org_id, scope), *below(_failing.c.definition_id, page.after)
    )
    statement = statement.order_by(_failing.c.definition_id.desc()).limit(limit)
    return rows_as(Broken, connection, statement)


def _credentials_of(connection: Connection, scope: Scope, page: Page, limit: int) -> list[Broken]:
    """Each org once, with the newest of its credentials that were rejected."""
    others = _credentials.alias("others")
    newest = (
        select(others.c.id)
        .where(others.c.org_id == _orgs.c.id, others.c.state == "active")
        .order_by(others.c.generation.desc())
        .limit(1)
        .scalar_subquery()
    )
    statement = (
        select(
            _orgs.c.id,
            _orgs.c.code.label("org"),
            null().label("definition"),
            null().label("run"),
            literal_column("'credential_dead'").label("state"),
            null().label("reason"),
            _credentials.c.last_error.label("detail"),
            _credentials.c.last_used_at.label("since"),
        )
        .join(_credentials, _credentials.c.org_id == _orgs.c.id)
        .where(
            text(failing.REJECTED), _credentials.c.id == newest, _orgs.c.state != "removed", failing.is_dead()
        )
    )
    statement = statement.where(*in_scope(_orgs.c.id, scope), *below(_orgs.c.id, page.after))
    statement = statement.order_by(_orgs.c.id.desc()).limit(limit)
    return rows_as(Broken, connection, statement)
