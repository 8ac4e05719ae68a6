"""The product's side on PostgreSQL: logins that start runs in their own transactions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import psycopg
import psycopg.rows
from psycopg.types.json import Jsonb

from tests.fakes.postgres import Server, kept_session
from worker.ids import new_id
from worker.model.runs.run import MadeRuns
from worker.operations.product import allow
from worker.operations.starts import make_runs
from worker.store.database import Database
from worker.store.start_functions import PRODUCT

START = "SELECT orgworker_start(%s, %s, %s, %s, %s)"


@dataclass
class Product:
    """The product's side: a login, and its transactions."""

    url: str
    login: str
    database: Database
    server: Server
    logins: list[str] = field(default_factory=list)

    @contextmanager
    def transaction(self, login: str | None = None) -> Iterator[psycopg.Connection[Any]]:
        """A transaction, committed at the end of the block."""
        with psycopg.connect(self.url_of(login)) as connection:
            yield connection

    def start(
        self,
        key: str,
        definition: str = "digest",
        *,
        org: str = "org_acme",
        params: Mapping[str, Any] | None = None,
        not_before: datetime | None = None,
        login: str | None = None,
    ) -> str:
        """Start one run in a transaction of its own; returns its id."""
        with self.transaction(login) as connection:
            return start(connection, key, definition, org=org, params=params, not_before=not_before)

    def url_of(self, login: str | None = None) -> str:
        return self.url.replace("postgres@", f"{login or self.login}@")

    def new_login(self, *orgs: str, roles: str = PRODUCT) -> str:
        """Another login, a member of the product's role, that may start these orgs."""
        name = f"product_{new_id()[-12:]}"
        kept_session(self.server.url()).execute(f"CREATE ROLE {name} LOGIN IN ROLE {roles}".encode())
        self.logins.append(name)
        if orgs:
            allow(self.database, name, orgs, actor="tester")
        return name

    def make(self) -> int:
        """As a worker makes runs, until there are no more; returns how many."""
        return sum(made.made for made in self.steps())

    def steps(self) -> Iterator[MadeRuns]:
        after = None
        while True:
            made = make_runs(self.database, after)
            yield made
            after = made.passed
            if not made.made and after is None:
                return

    def id_of_org(self, code: str) -> str:
        [row] = self.query("SELECT id FROM orgs WHERE code = %s", code)
        return str(row["id"])

    def change(self, statement: str) -> None:
        """Change rows as the superuser."""
        with psycopg.connect(self.url) as connection:
            connection.execute(statement.encode())

    def query(self, statement: str, *given: Any) -> list[dict[str, Any]]:
        """Rows as the superuser reads them."""
        with psycopg.connect(self.url, row_factory=psycopg.rows.dict_row) as connection:
            return connection.execute(statement.encode(), given).fetchall()


def start(
    connection: psycopg.Connection[Any],
    key: str,
    definition: str = "digest",
    *,
    org: str = "org_acme",
    params: Mapping[str, Any] | None = None,
    not_before: datetime | None = None,
) -> str:
    """Start one run in this transaction; returns its id."""
    given = (org, definition, None if params is None else Jsonb(params), key, not_before)
    row = connection.execute(START, given).fetchone()
    assert row is not None
    return str(row[0])
