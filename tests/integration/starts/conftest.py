"""A database on PostgreSQL with two orgs, and a login of a product that may start the runs of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.fakes.clock import ManualClock
from tests.fakes.postgres import Server, kept_session
from tests.fakes.product import Product
from tests.fakes.site import one_definition
from tests.integration.operations.conftest import CATALOGUE
from worker.model.definitions.file import parse_file
from worker.operations.apply import apply
from worker.store import catalogue
from worker.store.database import Database

Apply = Callable[[str], object]


@pytest.fixture
def database(migrated_postgres_url: str, clock: ManualClock) -> Iterator[Database]:
    opened = Database.open(migrated_postgres_url, clock=clock, threads=4)
    with opened.transaction() as connection:
        catalogue.put(connection, CATALOGUE, at=opened.now(connection))
    yield opened
    opened.close()


@pytest.fixture
def define(database: Database) -> Apply:
    """Apply a TOML text."""

    def apply_text(text: str) -> object:
        return apply(database, parse_file(text), actor="tester")

    return apply_text


@pytest.fixture
def product(
    database: Database, define: Apply, migrated_postgres_url: str, postgres_server: Server
) -> Iterator[Product]:
    """A login that may start the runs of `org_acme`, not those of `org_globex`; both have definitions."""
    define(one_definition(handler="acme.plain", overlap="allow"))
    define(one_definition("org_globex", handler="acme.plain", overlap="allow"))
    found = Product(migrated_postgres_url, "", database, postgres_server)
    found.login = found.new_login("org_acme")
    yield found
    for login in found.logins:
        found.change(f"DROP OWNED BY {login}")
        kept_session(postgres_server.url()).execute(f"DROP ROLE {login}".encode())
