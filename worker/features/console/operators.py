"""Operators of the database: add one with a new token, list them, remove one; links that log in once."""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection
from datetime import datetime, timedelta

from worker.errors import Conflict, NotFound, UsageError
from worker.ids import new_id
from worker.store import audit, sign_in
from worker.store.database import Database
from worker.store.dialect import Row
from worker.store.tables import OPERATOR_ROLES

# Distinguishes them from the tokens of orgs, and lets scanners of source code find them.
TOKEN_PREFIX = "orgworker_op_"  # noqa: S105 - not a secret
# Of tokens of MCP clients.
CLIENT_PREFIX = "orgworker_mcp_"
MAX_OPERATORS = 1000
# How long a link is valid, and links of one user at a time; another one replaces the oldest.
LINK_LASTS = timedelta(minutes=10)
MAX_LINKS = 5
_NAME = re.compile(r"[^\s:][^\n:]{0,99}")


def add_operator(database: Database, name: str, role: str, *, taken: Collection[str], actor: str) -> Row:
    """Add an operator and return its row with the `token`, which is not stored and not shown again.

    `taken` are the names of `[[web.operators]]`: two operators of one name would look the same in the audit.

    Raises:
        UsageError: an invalid name or role.
        Conflict: there is an operator of that name.
    """
    if not (_NAME.fullmatch(name) and name.isprintable()):
        raise UsageError(
            f"{name!r} is not an operator's name", fix="write 1 to 100 characters without a colon"
        )
    if role not in OPERATOR_ROLES:
        raise UsageError(f"there is no role {role!r}", fix=f"use one of {', '.join(OPERATOR_ROLES)}")
    if name in taken:
        raise Conflict(
            f"[[web.operators]] of worker.toml has an operator {name}",
            fix="choose another name, or remove that entry first",
        )
    token = TOKEN_PREFIX + secrets.token_urlsafe(32)
    with database.transaction() as connection:
        if sign_in.operator_named(connection, name) is not None:
            raise Conflict(
                f"there is an operator {name} already",
                fix=f"`operators remove {name}` first; the token then changes",
            )
        now = database.now(connection)
        row = {"id": new_id(), "name": name, "role": role, "created_at": now, "created_by": actor}
        sign_in.add_operator(connection, row | {"token_sha256": sign_in.sha256(token)})
        audit.note(connection, None, "operator.add", name, {"role": role}, at=now, actor=actor)
    return row | {"token": token}


def make_client_token(
    database: Database, name: str, *, configured: Collection[str], actor: str, remove: bool = False
) -> Row:
    """Replace the token of an operator's MCP client, or remove it; returns the row with the new `token`.

    The former token is refused at once, and with it go the plans that were made with it. `configured` are the
    names of `[[web.operators]]`, for the error.

    Raises:
        NotFound: the database has no such operator.
        UsageError: the operator is a starter, which reads and plans nothing.
    """
    token = None if remove else CLIENT_PREFIX + secrets.token_urlsafe(32)
    with database.transaction() as connection:
        found = sign_in.operator_named(connection, name)
        if found is None:
            fix = "`operators list` lists them"
            if name in configured:
                fix = (
                    "it is in [[web.operators]] of worker.toml, which has no such tokens: `operators add` one"
                )
            raise NotFound(f"there is no operator {name}", fix=fix)
        if found["role"] == "starter":
            raise UsageError(f"{name} is a starter, which only starts runs", fix="name an operator who reads")
        sign_in.set_client_token(connection, name, None if token is None else sign_in.sha256(token))
        action = "operator.add_mcp_token" if token else "operator.remove_mcp_token"
        now = database.now(connection)
        audit.note(connection, None, action, name, {"role": found["role"]}, at=now, actor=actor)
    return {"name": name, "role": found["role"], "token": token}


def list_operators(database: Database) -> list[Row]:
    """The operators of the database by name, without the hashes of their tokens."""
    with database.autocommit() as connection:
        return sign_in.list_operators(connection, limit=MAX_OPERATORS)


def remove_operator(database: Database, name: str, *, configured: Collection[str], actor: str) -> Row:
    """Remove an operator, end its sessions and return its row.

    `configured` are the names of `[[web.operators]]`, for the error.

    Raises:
        NotFound: the database has no such operator.
    """
    with database.transaction() as connection:
        removed = sign_in.remove_operator(connection, name)
        if removed is None:
            fix = "`operators list` lists them"
            if name in configured:
                fix = "it is in [[web.operators]] of worker.toml: remove it there and restart"
            raise NotFound(f"there is no operator {name}", fix=fix)
        token_sha256 = removed.pop("token_sha256")
        del removed["mcp_token_sha256"]
        ended = sign_in.end_sessions_on(connection, token_sha256)
        now = database.now(connection)
        detail = {"role": removed["role"], "sessions_ended": ended}
        audit.note(connection, None, "operator.remove", name, detail, at=now, actor=actor)
    return removed


def make_link(database: Database, user: str, *, at: datetime) -> str:
    """Store a link for one login as an administrator, and return its path; only its hash is stored.

    It is for the person at the terminal of a worker, before there is any operator.
    """
    code = secrets.token_urlsafe(32)
    row = {
        "key_sha256": sign_in.sha256(code),
        "kind": "link",
        "client": f"{user} (terminal)",
        "browser_sha256": "",
        "nonce": "",
        "verifier": "",
        "return_to": "/",
        "created_at": at,
        "until": at + LINK_LASTS,
    }
    with database.transaction() as connection:
        sign_in.begin_login(connection, row, most=MAX_LINKS)
    return f"/login/once/{code}"
