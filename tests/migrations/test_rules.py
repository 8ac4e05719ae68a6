"""The rules by which a schema changes under workers that run: limits, rows parted by org, old releases."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Connection, text

from worker.errors import ConfigurationError, StoreUnavailable
from worker.store import roles, schema

TEMPLATE = Path(__file__).parents[2] / "migrations" / "script.py.mako"


def test_a_migrator_gives_up_on_a_lock_and_on_a_long_statement(postgres_url: str):
    with schema.migrating(postgres_url) as connection:
        shown = [
            connection.execute(text(f"SHOW {name}")).scalar_one()
            for name in ("lock_timeout", "statement_timeout")
        ]
        held = connection.execute(
            text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()")
        ).scalar_one()

    assert (shown, held) == (["5s", "10min"], 1)


def test_two_migrators_of_one_empty_database_go_one_after_the_other(postgres_url: str):
    with ThreadPoolExecutor(2) as both:
        for done in [both.submit(schema.upgrade, postgres_url) for _ in range(2)]:
            done.result()

    with schema.migrating(postgres_url) as connection:
        assert schema.current(connection) == schema.head()


def test_a_migration_behind_a_long_query_gives_up_and_changes_nothing(migrated_postgres_url: str):
    with psycopg.connect(migrated_postgres_url) as reader:
        reader.execute("SELECT count(*) FROM runs")

        with pytest.raises(StoreUnavailable, match="lock timeout"):
            add_columns(migrated_postgres_url, "orgs", "runs")

    add_columns(migrated_postgres_url, "orgs", "runs")


def add_columns(url: str, *names: str) -> None:
    """Add a column to each table, with less patience than the 5 s that a migrator has."""
    with schema.migrating(url) as connection:
        connection.execute(text("SET LOCAL lock_timeout = '100ms'"))
        for name in names:
            connection.execute(text(f"ALTER TABLE {name} ADD COLUMN note text"))


def test_all_org_data_is_parted_by_the_migrations_themselves(migrated_postgres_url: str):
    with schema.migrating(migrated_postgres_url) as connection:
        parted = connection.execute(
            text("SELECT tablename FROM pg_policies WHERE policyname = 'one_org'")
        ).scalars()

    assert set(parted) == set(roles.ORG_DATA)


def test_a_new_migration_begins_with_the_rule_of_rolling_deploys():
    assert "Expand first" in TEMPLATE.read_text()


def test_a_release_works_with_a_newer_schema_that_says_so(database_url: str):
    schema.upgrade(database_url)
    with schema.migrating(database_url) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        with pytest.raises(ConfigurationError, match="9999"):
            schema.check(connection)

        say_works_with(connection, f"9999 {schema.head()}")
        schema.check(connection)

        say_works_with(connection, "9999 9998")
        with pytest.raises(ConfigurationError, match="9999"):
            schema.check(connection)


def say_works_with(connection: Connection, value: str) -> None:
    statement = text("UPDATE facts SET value = :value WHERE name = 'schema.works_with'")
    connection.execute(statement, {"value": value})
