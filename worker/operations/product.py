"""The logins of products: which orgs' runs each may start in its own transactions, on PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection

from worker.errors import ConfigurationError, NotFound, UsageError
from worker.ids import OrgId
from worker.store import audit, orgs, product_logins, start_functions
from worker.store.database import Database
from worker.store.dialect import is_postgresql
from worker.store.product_logins import ProductLogin

# What an operator writes for all orgs, now and later.
ALL = "*"
# PostgreSQL cuts longer names.
MAX_LOGIN = 63


def allow(database: Database, login: str, codes: Sequence[str], *, actor: str) -> list[ProductLogin]:
    """Let a login start the definitions of these orgs, or with `*` of all; returns its rows.

    Raises:
        NotFound: no such org.
        UsageError: not the name of a login, or `*` beside orgs.
        ConfigurationError: SQLite, which has no logins, or the functions are not installed.
    """
    if not (0 < len(login.encode()) <= MAX_LOGIN and login.isprintable()):
        raise UsageError(
            f"{login!r} is not the name of a login", fix="name the login of the product's connection"
        )
    with database.transaction() as connection:
        _require_functions(connection)
        now = database.now(connection)
        for org_id, code in _orgs_of(connection, codes):
            if product_logins.add(connection, login, org_id, at=now, by=actor):
                audit.note(connection, org_id, "product.allow", login, {"org": code}, at=now, actor=actor)
        return product_logins.listed(connection, login)


def revoke(database: Database, login: str, codes: Sequence[str], *, actor: str) -> list[ProductLogin]:
    """Take these orgs from a login, or without codes all that it has; returns the rows that are left.

    Raises:
        NotFound: no such org, or the login may not start it.
        UsageError: `*` beside orgs.
        ConfigurationError: SQLite, which has no logins.
    """
    with database.transaction() as connection:
        _require_postgresql(connection)
        now = database.now(connection)
        wanted: Sequence[tuple[OrgId | None, str]] = _orgs_of(connection, codes) if codes else ()
        if not wanted:
            wanted = [(row.org_id, row.org) for row in product_logins.rows_of(connection, login)]
        if not wanted:
            raise _nothing(login, None)
        for org_id, code in wanted:
            if not product_logins.remove(connection, login, org_id):
                raise _nothing(login, code)
            audit.note(connection, org_id, "product.revoke", login, {"org": code}, at=now, actor=actor)
        return product_logins.listed(connection, login)


def list_logins(database: Database) -> list[ProductLogin]:
    """The logins of products with the orgs of each; none on SQLite."""
    with database.autocommit() as connection:
        return product_logins.listed(connection) if is_postgresql(connection) else []


def _orgs_of(connection: Connection, codes: Sequence[str]) -> list[tuple[OrgId | None, str]]:
    """The ids of these orgs; None for all."""
    if ALL not in codes:
        return [(OrgId(orgs.require(connection, code)["id"]), code) for code in dict.fromkeys(codes)]
    if len(codes) > 1:
        raise UsageError(f"{ALL} stands for all orgs", fix="leave the others out")
    return [(None, ALL)]


def _require_postgresql(connection: Connection) -> None:
    if not is_postgresql(connection):
        raise ConfigurationError(
            "SQLite has no logins, and no functions that start runs",
            fix="use PostgreSQL, or start runs over HTTP: POST /api/v1/definitions/ORG/NAME/run",
        )


def _require_functions(connection: Connection) -> None:
    _require_postgresql(connection)
    if not start_functions.is_installed(connection):
        raise ConfigurationError(
            "the function orgworker_start is not installed, or belongs to another role",
            fix="see `A product's login` on the documentation's page Many workers on one PostgreSQL",
        )


def _nothing(login: str, code: str | None) -> NotFound:
    missing = "has no orgs" if code is None else f"has no row for {'all orgs' if code == ALL else code}"
    return NotFound(f"login {login} {missing}", fix="`product list` shows what logins may start")
