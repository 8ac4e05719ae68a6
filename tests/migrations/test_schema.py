"""The migrations make exactly what `worker/store/tables.py` describes, and can be taken back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Connection, inspect, text

from worker.errors import ConfigurationError
from worker.store import roles, schema
from worker.store.tables import RUN_VIEW, metadata

TEMPLATE = Path(__file__).parents[2] / "migrations" / "script.py.mako"


@pytest.fixture
def migration(database_url: str) -> Iterator[Connection]:
    """The transaction in which a migrator works, on an empty database of either kind."""
    with schema.migrating(database_url) as connection:
        yield connection


def test_a_migrated_database_is_what_the_tables_say(migration: Connection):
    migrate(migration, "head")

    assert differences(migration) == []


def test_the_view_the_checks_and_the_indexes_are_those_of_the_tables(migration: Connection):
    migrate(migration, "head")
    by_migrations = constraints(migration), words(view(migration)), indexes(migration)
    migrate(migration, "base")
    metadata.create_all(migration)
    migration.execute(text(RUN_VIEW[migration.dialect.name]))

    assert constraints(migration) == by_migrations[0]
    assert words(view(migration)) == by_migrations[1]
    assert indexes(migration) == by_migrations[2]


def test_every_migration_can_be_taken_back_and_made_again(migration: Connection):
    migrate(migration, "head")
    migrate(migration, "base")
    assert set(inspect(migration).get_table_names()) <= {"alembic_version"}

    migrate(migration, "head")

    assert differences(migration) == []


def test_a_second_upgrade_changes_nothing(database_url: str):
    schema.upgrade(database_url)
    schema.upgrade(database_url)

    with schema.migrating(database_url) as connection:
        schema.check(connection)
        assert differences(connection) == []


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


def test_all_org_data_is_parted_by_the_migrations_themselves(postgres_url: str):
    with schema.migrating(postgres_url) as connection:
        migrate(connection, "head")
        parted = connection.execute(
            text("SELECT tablename FROM pg_policies WHERE policyname = 'one_org'")
        ).scalars()

    assert set(parted) == set(roles.ORG_DATA)


def test_a_new_migration_begins_with_the_rule_of_rolling_deploys():
    assert "Expand first" in TEMPLATE.read_text()


def say_works_with(connection: Connection, value: str) -> None:
    statement = text("UPDATE facts SET value = :value WHERE name = 'schema.works_with'")
    connection.execute(statement, {"value": value})


def migrate(connection: Connection, target: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(schema.folder()).replace("%", "%%"))
    config.attributes["connection"] = connection
    (command.downgrade if target == "base" else command.upgrade)(config, target)


def differences(connection: Connection) -> list[object]:
    """All but those of indexes: Alembic cannot read one with an expression in it; see `indexes`."""
    options = {"compare_type": True, "compare_server_default": True}
    found = compare_metadata(MigrationContext.configure(connection, opts=options), metadata)
    return [one for one in found if one[0] not in ("add_index", "remove_index")]


def constraints(connection: Connection) -> dict[str, list[tuple[str, str]]]:
    seen = inspect(connection)
    return {
        table: sorted(
            (str(check["name"]), words(check["sqltext"])) for check in seen.get_check_constraints(table)
        )
        for table in metadata.tables
    }


def indexes(connection: Connection) -> dict[str, str]:
    query = (
        "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'"
        if connection.dialect.name == "postgresql"
        else "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
    )
    found = {name: words(sql) for name, sql in connection.execute(text(query))}
    return {name: sql for name, sql in found.items() if not name.startswith("alembic_version")}


def view(connection: Connection) -> str:
    return str(inspect(connection).get_view_definition("run_view"))


def words(sql: str) -> str:
    return " ".join(sql.split())


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
