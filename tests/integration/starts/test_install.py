"""Owners that are no superusers: what `db upgrade` makes of the functions, and what an administrator adds."""

from __future__ import annotations

import psycopg

from tests.fakes.clock import ManualClock
from tests.fakes.postgres import Server
from tests.fakes.rows import reading
from worker.errors import ConfigurationError
from worker.operations.product import allow
from worker.store import schema, start_functions
from worker.store.database import Database


def migrated(server: Server, login: str, clock: ManualClock) -> Database:
    url = server.url("orgworker").replace("postgres@", f"{login}@")
    schema.upgrade(url)
    return Database.open(url, clock=clock)


def is_installed(database: Database) -> bool:
    found = reading(database, start_functions.is_installed)
    database.close()
    return found


def test_an_owner_that_may_create_roles_installs_the_functions(
    own_postgres: Server, clock: ManualClock
) -> None:
    own_postgres.execute("CREATE ROLE owner LOGIN CREATEROLE")
    own_postgres.execute("CREATE DATABASE orgworker OWNER owner")

    assert is_installed(migrated(own_postgres, "owner", clock))


def test_an_owner_that_may_not_installs_them_once_an_administrator_made_the_roles(
    own_postgres: Server, clock: ManualClock
) -> None:
    own_postgres.execute("CREATE ROLE owner LOGIN")
    own_postgres.execute("CREATE DATABASE orgworker OWNER owner")
    database = migrated(own_postgres, "owner", clock)
    try:
        allow(database, "shop", ["*"], actor="tester")
    except ConfigurationError as error:
        assert "orgworker_start is not installed" in error.message
    else:
        raise AssertionError("a login was allowed to call what is not there")
    assert not is_installed(database)

    # The second role exists, but the owner may not act as it.
    for role in (start_functions.PRODUCT, start_functions.OWNER):
        own_postgres.execute(f"CREATE ROLE {role} NOLOGIN")
    assert not is_installed(migrated(own_postgres, "owner", clock))

    own_postgres.execute(f"GRANT {start_functions.OWNER} TO owner")
    assert is_installed(migrated(own_postgres, "owner", clock))


def test_an_upgrade_gives_functions_of_a_restored_database_to_their_role(
    own_postgres: Server, clock: ManualClock
) -> None:
    own_postgres.execute("CREATE ROLE owner LOGIN CREATEROLE")
    own_postgres.execute("CREATE DATABASE orgworker OWNER owner")
    assert is_installed(migrated(own_postgres, "owner", clock))
    owners = "SELECT DISTINCT proowner::regrole::text FROM pg_proc WHERE proname LIKE 'orgworker_start%'"
    with psycopg.connect(own_postgres.url("orgworker"), autocommit=True) as superuser:
        for function in (start_functions.START, start_functions.START_MANY):
            superuser.execute(f"ALTER FUNCTION public.{function} OWNER TO owner")
        assert superuser.execute(owners).fetchall() == [("owner",)]
        assert not is_installed(Database.open(own_postgres.url("orgworker"), clock=clock))

        assert is_installed(migrated(own_postgres, "owner", clock))

        assert superuser.execute(owners).fetchall() == [(start_functions.OWNER,)]
