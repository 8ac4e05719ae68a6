"""Logins: the sessions of browsers, logins that have begun, and operators.

Everything is found by a SHA-256, in lower-case hexadecimal. The caller passes the time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Table, delete, exists, insert, select, update

from worker.store import tables
from worker.store.dialect import Row, all_rows, first_row

# Expired rows that one login removes.
SWEPT = 500

_operators = tables.operators
_sessions = tables.sessions
_logins = tables.login_transactions
_NAME_AND_ROLE = select(_operators.c.name, _operators.c.role)


def sha256(text: str) -> str:
    """The form in which tokens and keys are stored."""
    return hashlib.sha256(text.encode()).hexdigest()


def find_session(connection: Connection, key_sha256: str, *, at: datetime) -> Row | None:
    """The session with this key, unless it has ended."""
    query = select(_sessions).where(_sessions.c.key_sha256 == key_sha256, _sessions.c.until > at)
    return first_row(connection, query)


def begin_session(connection: Connection, row: Mapping[str, Any], *, most: int) -> None:
    """Insert a session. Its caller keeps the newest `most`, this one included; removes expired ones."""
    _begin(connection, _sessions, "caller", row, most)


def end_session(connection: Connection, key_sha256: str) -> None:
    """Delete one session."""
    connection.execute(delete(_sessions).where(_sessions.c.key_sha256 == key_sha256))


def end_sessions_of_people(connection: Connection, org: str) -> int:
    """Delete the sessions of an org's people; returns their number."""
    theirs = (_sessions.c.home == org, _sessions.c.kind == "person")
    return connection.execute(delete(_sessions).where(*theirs)).rowcount


def end_sessions_on(connection: Connection, basis: str) -> int:
    """Delete the sessions that rest on an operator's token; returns their number."""
    mine = (_sessions.c.kind == "operator", _sessions.c.basis == basis)
    return connection.execute(delete(_sessions).where(*mine)).rowcount


def begin_login(connection: Connection, row: Mapping[str, Any], *, most: int) -> None:
    """Insert a login that has begun. Its client keeps the newest `most`; removes expired ones."""
    _begin(connection, _logins, "client", row, most)


def use_login(
    connection: Connection, key_sha256: str, *, kind: str, browser_sha256: str = "", at: datetime
) -> Row | None:
    """Delete a login that this browser began and return it; None if it does not exist or has expired.

    Of two calls at once one gets the row.
    """
    mine = (
        _logins.c.key_sha256 == key_sha256,
        _logins.c.kind == kind,
        _logins.c.browser_sha256 == browser_sha256,
        _logins.c.until > at,
    )
    return first_row(connection, delete(_logins).where(*mine).returning(_logins))


def _begin(connection: Connection, table: Table, by: str, row: Mapping[str, Any], most: int) -> None:
    """Insert a row, after removing expired ones, and of those counted `by` this column the oldest."""
    key, mine = table.c.key_sha256, table.c[by] == row[by]
    expired = select(key).where(table.c.until <= row["created_at"]).limit(SWEPT)
    connection.execute(delete(table).where(key.in_(expired)))
    kept = select(key).where(mine).order_by(table.c.created_at.desc(), key).limit(most - 1)
    connection.execute(delete(table).where(mine, key.not_in(kept)))
    connection.execute(insert(table), dict(row))


def find_operator(connection: Connection, token_sha256: str) -> Row | None:
    """The operator with this token: `name` and `role`."""
    return first_row(connection, _NAME_AND_ROLE.where(_operators.c.token_sha256 == token_sha256))


def find_operator_of_client(connection: Connection, mcp_token_sha256: str) -> Row | None:
    """The operator whose MCP client has this token: `name` and `role`."""
    return first_row(connection, _NAME_AND_ROLE.where(_operators.c.mcp_token_sha256 == mcp_token_sha256))


def set_client_token(connection: Connection, name: str, mcp_token_sha256: str | None) -> bool:
    """Set or remove the token of an operator's MCP client; False if there is no such operator."""
    change = update(_operators).where(_operators.c.name == name).values(mcp_token_sha256=mcp_token_sha256)
    return bool(connection.execute(change).rowcount)


def has_operators(connection: Connection) -> bool:
    """Whether there is any operator."""
    return bool(connection.execute(select(exists().select_from(_operators))).scalar())


def list_operators(connection: Connection, *, limit: int) -> list[Row]:
    """Operators by name, without the hashes of their tokens."""
    columns = (_operators.c[name] for name in ("id", "name", "role", "created_at", "created_by"))
    return all_rows(connection, select(*columns).order_by(_operators.c.name).limit(limit))


def add_operator(connection: Connection, row: Mapping[str, Any]) -> None:
    """Insert an operator; the name must be free."""
    connection.execute(insert(_operators), dict(row))


def remove_operator(connection: Connection, name: str) -> Row | None:
    """Delete an operator and return it, with the hashes of its tokens; None if it does not exist."""
    return first_row(connection, delete(_operators).where(_operators.c.name == name).returning(_operators))


def operator_named(connection: Connection, name: str) -> Row | None:
    """The operator of that name: `name` and `role`."""
    return first_row(connection, _NAME_AND_ROLE.where(_operators.c.name == name))
