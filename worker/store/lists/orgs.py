"""Orgs, skips, credentials and audit rows as people see them."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ColumnElement, Connection, select

from worker.store import orgs as org_rows
from worker.store import tables
from worker.store.lists.paging import DEFAULT_LIMIT, MAX_LIMIT, Row, check_state, page

_orgs = tables.orgs
_definitions = tables.definitions
_skips = tables.skips
_credentials = tables.credentials
_audit = tables.audit

ORG_COLUMNS = (
    "id",
    "code",
    "name",
    "issuer",
    "state",
    "state_by",
    "state_at",
    "state_note",
    "max_concurrent_runs",
    "weight",
    "tags",
    "timezone",
    "created_at",
    "updated_at",
)


def orgs_for_all_orgs(
    connection: Connection,
    *,
    org: str | None = None,
    state: str | None = None,
    since: datetime | None = None,
    limit: int = DEFAULT_LIMIT,
    after: str | None = None,
) -> list[Row]:
    """Orgs, newest first; with `org` only the one of that code.

    Raises:
        NotFound: there is no such org.
        UsageError: a state, limit or id that is none.
    """
    query = select(*(_orgs.c[name] for name in ORG_COLUMNS))
    if org is not None:
        query = query.where(_orgs.c.id == org_rows.require(connection, org)["id"])
    if state is not None:
        check_state(state, tables.ORG_STATES)
        query = query.where(_orgs.c.state == state)
    return page(
        connection, query, _orgs.c.id, limit=limit, after=after, since=since, since_column=_orgs.c.created_at
    )


def org(connection: Connection, code: str) -> Row:
    """One org with its credentials (no secrets).

    Raises:
        NotFound: there is no such org.
    """
    found = org_rows.require(connection, code)
    return {name: found[name] for name in ORG_COLUMNS} | {"credentials": credentials(connection, code)}


def skips(
    connection: Connection,
    org: str,
    *,
    definition: str | None = None,
    since: datetime | None = None,
    limit: int = DEFAULT_LIMIT,
    after: str | None = None,
) -> list[Row]:
    """One org's skips, newest first: instants that never became a run, both ends inclusive.

    Raises:
        NotFound: there is no such org.
        UsageError: a limit or id that is none.
    """
    mine = _skips.c.org_id == org_rows.require(connection, org)["id"]
    return _skip_page(connection, [mine], definition, since, limit, after)


def skips_for_all_orgs(
    connection: Connection,
    *,
    definition: str | None = None,
    since: datetime | None = None,
    limit: int = DEFAULT_LIMIT,
    after: str | None = None,
) -> list[Row]:
    """As `skips`, of every org."""
    return _skip_page(connection, [], definition, since, limit, after)


def credentials(
    connection: Connection,
    org: str,
    *,
    state: str | None = None,
    since: datetime | None = None,
    limit: int = MAX_LIMIT,
    after: str | None = None,
) -> list[Row]:
    """One org's credentials, newest generation first, without anything secret.

    Raises:
        NotFound: there is no such org.
        UsageError: a state, limit or id that is none.
    """
    mine = _credentials.c.org_id == org_rows.require(connection, org)["id"]
    return _credential_page(connection, [mine], state, since, limit, after)


def credentials_for_all_orgs(
    connection: Connection,
    *,
    state: str | None = None,
    since: datetime | None = None,
    limit: int = DEFAULT_LIMIT,
    after: str | None = None,
) -> list[Row]:
    """As `credentials`, of every org."""
    return _credential_page(connection, [], state, since, limit, after)


def audit(
    connection: Connection,
    org: str,
    *,
    since: datetime | None = None,
    limit: int = DEFAULT_LIMIT,
    after: str | None = None,
) -> list[Row]:
    """Who changed what of one org, newest first.

    Raises:
        NotFound: there is no such org.
    """
    mine = _audit.c.org_id == org_rows.require(connection, org)["id"]
    return _audit_page(connection, [mine], since, limit, after)


def audit_for_all_orgs(
    connection: Connection,
    *,
    since: datetime | None = None,
    limit: int = DEFAULT_LIMIT,
    after: str | None = None,
) -> list[Row]:
    """As `audit`, of every org and of what belongs to none."""
    return _audit_page(connection, [], since, limit, after)


def _skip_page(
    connection: Connection,
    where: list[ColumnElement[bool]],
    definition: str | None,
    since: datetime | None,
    limit: int,
    after: str | None,
) -> list[Row]:
    query = (
        select(
            _skips.c.id,
            _orgs.c.code.label("org"),
            _definitions.c.name.label("definition"),
            _skips.c.revision,
            _skips.c.skipped_from,
            _skips.c.skipped_until,
            _skips.c["count"],
            _skips.c.reason,
        )
        .join(_orgs, _orgs.c.id == _skips.c.org_id)
        .join(_definitions, _definitions.c.id == _skips.c.definition_id)
        .where(*where)
    )
    if definition is not None:
        query = query.where(_definitions.c.name == definition)
    if since is not None:
        query = query.where(_skips.c.skipped_until >= since)
    return page(connection, query, _skips.c.id, limit=limit, after=after)


def _credential_page(
    connection: Connection,
    where: list[ColumnElement[bool]],
    state: str | None,
    since: datetime | None,
    limit: int,
    after: str | None,
) -> list[Row]:
    if state is not None:
        check_state(state, ("active", "retired"))
        where.append(_credentials.c.state == state)
    query = (
        select(
            _credentials.c.id,
            _orgs.c.code.label("org"),
            *(_credentials.c[name] for name in _CREDENTIAL_COLUMNS),
        )
        .join(_orgs, _orgs.c.id == _credentials.c.org_id)
        .where(*where)
    )
    created_at = _credentials.c.created_at
    return page(
        connection, query, _credentials.c.id, limit=limit, after=after, since=since, since_column=created_at
    )


_CREDENTIAL_COLUMNS = (
    "generation",
    "client_id",
    "kind",
    "reference",
    "key_id",
    "state",
    "created_at",
    "created_by",
    "retired_at",
    "last_used_at",
    "uses",
    "last_error",
)


def _audit_page(
    connection: Connection,
    where: list[ColumnElement[bool]],
    since: datetime | None,
    limit: int,
    after: str | None,
) -> list[Row]:
    query = (
        select(
            _audit.c.id,
            _audit.c.at,
            _audit.c.actor,
            _audit.c.action,
            _orgs.c.code.label("org"),
            _audit.c.subject,
            _audit.c.detail,
        )
        .outerjoin(_orgs, _orgs.c.id == _audit.c.org_id)
        .where(*where)
    )
    return page(
        connection, query, _audit.c.id, limit=limit, after=after, since=since, since_column=_audit.c.at
    )
