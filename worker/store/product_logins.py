"""The logins of products, and the orgs whose definitions each may start."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple, TypedDict

from sqlalchemy import Connection, delete, select

from worker.ids import OrgId, new_id
from worker.store import start_functions, tables
from worker.store.dialect import insert_into

_logins, _orgs = tables.product_logins, tables.orgs


class ProductLogin(TypedDict):
    """A login and an org that it may start, `*` for all; `member`: it may call the functions."""

    login: str
    org: str
    member: bool
    created_at: datetime
    created_by: str


class LoginOfOrg(NamedTuple):
    """A row: `org` is the org's code, `*` for all of them."""

    login: str
    org_id: OrgId | None
    org: str
    created_at: datetime
    created_by: str


def rows_of(connection: Connection, login: str | None = None) -> list[LoginOfOrg]:
    """The rows of one login or of all, by login and org."""
    query = (
        select(_logins.c.login, _logins.c.org_id, _orgs.c.code, _logins.c.created_at, _logins.c.created_by)
        .outerjoin(_orgs, _orgs.c.id == _logins.c.org_id)
        .order_by(_logins.c.login, _orgs.c.code)
    )
    if login is not None:
        query = query.where(_logins.c.login == login)
    return [
        LoginOfOrg(name, org_id, code or "*", at, by)
        for name, org_id, code, at, by in connection.execute(query)
    ]


def listed(connection: Connection, login: str | None = None) -> list[ProductLogin]:
    """The same for people."""
    rows = rows_of(connection, login)
    members = start_functions.members(connection, list({row.login for row in rows}))
    return [
        ProductLogin(
            login=row.login,
            org=row.org,
            member=row.login in members,
            created_at=row.created_at,
            created_by=row.created_by,
        )
        for row in rows
    ]


def add(connection: Connection, login: str, org_id: OrgId | None, *, at: datetime, by: str) -> bool:
    """Let a login start the definitions of an org, or with None of all; False if it may already."""
    values = {"id": new_id(), "login": login, "org_id": org_id, "created_at": at, "created_by": by}
    made = insert_into(connection, _logins).values(values).on_conflict_do_nothing().returning(_logins.c.id)
    return connection.execute(made).first() is not None


def remove(connection: Connection, login: str, org_id: OrgId | None) -> bool:
    """Take that back; False if the login may not start it."""
    mine = _logins.c.org_id.is_(None) if org_id is None else _logins.c.org_id == org_id
    return connection.execute(delete(_logins).where(_logins.c.login == login, mine)).rowcount == 1


def forget_org(connection: Connection, org_id: OrgId) -> int:
    """Take an org from all logins that name it; returns from how many."""
    return connection.execute(delete(_logins).where(_logins.c.org_id == org_id)).rowcount
