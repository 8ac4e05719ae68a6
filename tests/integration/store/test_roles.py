"""Row-level security: the web role sees one org or nothing, the worker's role and the owner see all.

Which tables there are, and what stands in them, is read from the metadata: a table that
is new with an org's rows is tried here without a change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import Connection, Executable, Table, select, text
from sqlalchemy.exc import ProgrammingError

from tests.fakes.clock import ManualClock
from tests.fakes.one_row_each import Owner, fill, row
from worker.ids import OrgId, new_id
from worker.store import roles, schema, tables
from worker.store.connection import database_now
from worker.store.database import Database

NOT_OF_ORGS = {"templates", "workers", "catalogue", "facts"}
# Rows that name many orgs at once; nobody who acts for one org sees them.
OF_MANY_ORGS = {"alerts", "alert_strikes"}
ORG_COLUMNS = """
SELECT c.relname, c.relrowsecurity AND c.relforcerowsecurity AND EXISTS (
  SELECT 1 FROM pg_policy WHERE polrelid = c.oid AND polname = 'one_org') AS parted
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
WHERE c.relkind IN ('r', 'p') AND c.relnamespace = current_schema::regnamespace
  AND a.attname = 'org_id' AND NOT a.attisdropped
"""


@pytest.fixture
def logins(postgres_server, postgres_url: str) -> Iterator[dict[str, str]]:
    """URLs of an empty database by login: its owner, a worker, a web server; none a superuser."""
    names = {role: f"{role}_{new_id()[-12:]}" for role in ("owner", "worker", "web")}
    name = postgres_url.rpartition("/")[2]
    for role in names.values():
        postgres_server.execute(f"CREATE ROLE {role} LOGIN")
    postgres_server.execute(f"ALTER DATABASE {name} OWNER TO {names['owner']}")
    yield {role: postgres_url.replace("postgres@", f"{login}@") for role, login in names.items()}
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        for role in names.values():
            connection.execute(sql.SQL("DROP OWNED BY {} CASCADE").format(sql.Identifier(role)))
    postgres_server.execute(f"ALTER DATABASE {name} OWNER TO postgres")
    for role in names.values():
        postgres_server.execute(f"DROP ROLE {role}")


@pytest.fixture
def migrated(logins: dict[str, str], postgres_server) -> None:
    """The schema, made by the owner, and the logins as the documentation has them."""
    schema.upgrade(logins["worker"], logins["owner"])
    for role, login in ((roles.WORKER, "worker"), (roles.WEB, "web"), (roles.WEB, "worker")):
        postgres_server.execute(f"GRANT {role} TO {login_of(logins[login])}")


@pytest.fixture
def owners(logins: dict[str, str], migrated: None) -> tuple[Owner, Owner]:
    """Two orgs with a row in every table."""
    both = Owner(), Owner()
    with acting(logins["owner"]) as connection:
        fill(connection, both)
        connection.commit()
    return both


def test_every_table_with_org_data_is_parted(postgres: Database):
    assert set(roles.ORG_DATA) == set(tables.metadata.tables) - NOT_OF_ORGS
    with postgres.transaction() as connection:
        assert set(roles.ORG_DATA) == parted(connection)
        assert unparted(connection) == []

        connection.execute(text("CREATE TABLE newcomers (id uuid, org_id uuid)"))

        assert unparted(connection) == ["newcomers"]


@pytest.mark.parametrize("org", [None, ""])
@pytest.mark.usefixtures("owners")
def test_with_no_org_set_the_web_role_sees_no_row_of_any(logins, org: str | None):
    with acting(logins["worker"]) as worker, acting(logins["web"], org) as web:
        for name in (*roles.ORG_DATA, "run_view"):
            assert count(worker, name) == 2, name
            assert count(web, name) == 0, name


def test_with_no_org_set_the_web_role_writes_nothing(logins, owners):
    with acting(logins["web"]) as web:
        for table in org_tables():
            assert updated(web, table) == deleted(web, table) == 0, table.name
            for owner in (*owners, Owner()):
                with pytest.raises(ProgrammingError, match="violates row-level security"):
                    insert(web, table, owner)


def test_with_an_org_set_the_web_role_sees_its_rows_only(logins, owners):
    mine, _ = owners
    with acting(logins["web"], mine.org) as web:
        for table in org_tables():
            assert count(web, table.name) == (0 if table.name in OF_MANY_ORGS else 1), table.name
            whose = table.c.get("id" if table.name == "orgs" else "org_id")
            if whose is not None:
                assert set(web.execute(select(whose)).scalars()) <= {mine.org}, table.name
        assert web.execute(text("SELECT org_id::text FROM run_view")).scalars().all() == [mine.org]
        (revision,) = web.execute(select(tables.definition_revisions)).mappings()
        assert revision["definition_id"] == mine.definition


def test_with_an_org_set_the_web_role_writes_its_rows_only(logins, owners):
    mine, other = owners
    with acting(logins["web"], mine.org) as web:
        for table in org_tables():
            whose = 0 if table.name in OF_MANY_ORGS else 1
            assert updated(web, table) == deleted(web, table) == whose, table.name
            with pytest.raises(ProgrammingError, match="violates row-level security"):
                insert(web, table, other)


def test_what_is_no_orgs_the_web_role_may_only_read(logins, owners):
    mine, _ = owners
    for name in NOT_OF_ORGS:
        table = tables.metadata.tables[name]
        with acting(logins["web"], mine.org) as web:
            assert count(web, name) > 0
            for write in (updated, deleted, lambda web, table: insert(web, table, mine)):
                with pytest.raises(ProgrammingError, match=f"permission denied for table {name}"):
                    write(web, table)


def test_the_rights_of_an_org_end_with_their_transaction(logins, owners):
    mine, _ = owners
    with opened(logins["worker"]) as database:
        with database.as_org(OrgId(mine.org)) as connection:
            assert who_sees(connection) == (roles.WEB, mine.org, 1)

        with database.autocommit() as connection:
            user, org, rows = who_sees(connection)
            assert user != roles.WEB
            assert (org or "", rows) == ("", 2)


def test_an_owner_who_may_not_create_roles_migrates_all_the_same(logins):
    schema.upgrade(logins["owner"])
    schema.upgrade(logins["owner"])

    with acting(logins["owner"]) as owner:
        assert count(owner, "runs") == 0


@pytest.mark.usefixtures("migrated")
def test_check_warns_of_a_superuser_an_owner_and_a_login_without_the_web_role(logins, postgres):
    assert said_of(logins["worker"]) == []
    (owned, *_) = said_of(logins["owner"])
    assert "owns the tables" in owned
    with postgres.autocommit() as connection:
        assert "superuser" in roles.warnings(connection)[0]


def parted(connection: Connection) -> set[str]:
    """The tables on which row-level security is in force for everybody."""
    query = "SELECT relname FROM pg_class WHERE relrowsecurity AND relforcerowsecurity"
    return set(connection.execute(text(query)).scalars())


def unparted(connection: Connection) -> list[str]:
    """The tables of the database with an org's column whose rows anybody sees."""
    return [name for name, is_parted in connection.execute(text(ORG_COLUMNS)) if not is_parted]


@contextmanager
def acting(url: str, org: str | None = None) -> Iterator[Connection]:
    """A transaction of a login, for an org if one is given, rolled back at the end."""
    with opened(url) as database, database.transaction() as connection:
        if org is not None:
            connection.execute(text("SELECT set_config('app.org', :org, true)"), {"org": org})
        yield connection
        if connection.in_transaction():
            connection.rollback()


def org_tables() -> list[Table]:
    return [tables.metadata.tables[name] for name in roles.ORG_DATA]


def count(connection: Connection, table: str) -> int:
    return connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one()


def insert(connection: Connection, table: Table, owner: Owner) -> None:
    """A row as it stands there already: policies are asked before indexes."""
    with connection.begin_nested():
        connection.execute(table.insert().values(row(table, owner, database_now(connection))))


def updated(connection: Connection, table: Table) -> int:
    """How many rows an UPDATE of all of them reaches."""
    if table is tables.runs:
        # The trigger that keeps what has ended as it is would answer; the same policy is asked.
        return connection.execute(select(table).with_for_update()).rowcount
    (column, *_) = table.primary_key.columns
    return undone(connection, table.update().values({column: column}))


def deleted(connection: Connection, table: Table) -> int:
    """How many rows a DELETE of all of them reaches."""
    return undone(connection, table.delete())


def undone(connection: Connection, statement: Executable) -> int:
    """How many rows a statement reaches, which is then taken back."""
    nested = connection.begin_nested()
    try:
        return connection.execute(statement).rowcount
    finally:
        nested.rollback()


def who_sees(connection: Connection) -> tuple[str, str | None, int]:
    """The role, the org, and how many runs it sees."""
    query = "SELECT current_user, current_setting('app.org', true), count(*) FROM run_view"
    user, org, rows = connection.execute(text(query)).one()
    return user, org, rows


@contextmanager
def opened(url: str) -> Iterator[Database]:
    database = Database.open(url, clock=ManualClock())
    try:
        yield database
    finally:
        database.close()


def said_of(url: str) -> list[str]:
    with opened(url) as database, database.autocommit() as connection:
        return roles.warnings(connection)


def login_of(url: str) -> str:
    return url.split("//")[1].split("@")[0]
