"""The migrations make exactly what the metadata says, on both databases, up, down and up again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, text

from tests.fakes import postgres
from tests.fakes.clock import ManualClock
from tests.migrations import ddl
from worker.errors import ConfigurationError
from worker.store import schema, start_functions, tables
from worker.store.database import Database

Snapshot = dict[str, Any]
ROOT = Path(__file__).parents[2]

POSTGRES_FACTS = {
    "columns": "SELECT table_name, column_name, ordinal_position, data_type, is_nullable, column_default "
    "FROM information_schema.columns WHERE table_schema = 'public' ORDER BY 1, 3",
    "constraints": "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint "
    "WHERE connamespace = 'public'::regnamespace ORDER BY 1, 2",
    "indexes": "SELECT tablename, indexname, indexdef FROM pg_indexes "
    "WHERE schemaname = 'public' ORDER BY 1, 2",
    "settings": "SELECT relname, reloptions FROM pg_class WHERE relnamespace = 'public'::regnamespace "
    "AND relkind = 'r' ORDER BY 1",
    "views": "SELECT viewname, definition FROM pg_views WHERE schemaname = 'public' ORDER BY 1",
    "triggers": "SELECT tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal ORDER BY 1",
    "functions": "SELECT proname, prosrc, prosecdef, proconfig::text FROM pg_proc "
    "WHERE pronamespace = 'public'::regnamespace ORDER BY 1",
}
SQLITE_FACTS = {
    "everything": "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY 1, 2",
    "columns": "SELECT t.name, c.* FROM sqlite_master t, pragma_table_info(t.name) c ORDER BY 1, 2",
}

POSTGRES_PRIVILEGES = {
    "tables": "SELECT relname, relacl::text FROM pg_class "
    "WHERE relnamespace = 'public'::regnamespace ORDER BY 1",
    "columns": "SELECT attrelid::regclass::text, attname, attacl::text FROM pg_attribute "
    "WHERE attacl IS NOT NULL ORDER BY 1, 2",
    "functions": "SELECT proname, proacl::text FROM pg_proc "
    "WHERE pronamespace = 'public'::regnamespace ORDER BY 1",
    "policies": "SELECT tablename, policyname, roles::text, cmd, qual, with_check FROM pg_policies "
    "ORDER BY 1, 2",
}


def snapshot(connection: Connection) -> Snapshot:
    """All that the database says of its schema, but for Alembic's own table."""
    facts = SQLITE_FACTS if connection.dialect.name == "sqlite" else POSTGRES_FACTS
    return {
        name: [
            tuple(normalised(value) for value in row)
            for row in connection.execute(text(query))
            if not any("alembic_version" in str(value) for value in row)
        ]
        for name, query in facts.items()
    }


def normalised(value: Any) -> Any:
    """Without what means nothing: white space, and the order of a SQLite table's lines."""
    if not isinstance(value, str):
        return value
    if value.startswith("CREATE TABLE"):
        # ALTER TABLE puts a column on the line of the last one.
        return sorted(part for part in map(str.strip, re.split(r",\s|\n", value)) if part)
    return re.sub(r"\s+", " ", value).strip()


@contextmanager
def connected(url: str) -> Iterator[Connection]:
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def read(url: str) -> Snapshot:
    with connected(url) as connection:
        return snapshot(connection)


def read_all(url: str) -> Snapshot:
    """As `read`, with the privileges on PostgreSQL and the facts."""
    with connected(url) as connection:
        queries = {} if connection.dialect.name == "sqlite" else POSTGRES_PRIVILEGES
        queries = queries | {"facts": "SELECT name, value FROM facts ORDER BY 1"}
        rows = {name: connection.execute(text(query)).all() for name, query in queries.items()}
        return snapshot(connection) | {f"all {name}": found for name, found in rows.items()}


def alembic(url: str, step: Callable[..., None], revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(schema.folder()))
    with schema.migrating(url) as connection:
        config.attributes["connection"] = connection
        step(config, revision)


def from_metadata(url: str) -> Snapshot:
    with connected(url) as connection:
        dialect = connection.dialect.name
        made = [table for table in tables.metadata.sorted_tables if table.name != "run_ends"]
        tables.metadata.create_all(connection, made if dialect == "sqlite" else None)
        for statement in (
            ddl.RUN_VIEW[dialect],
            *ddl.ABSORBING[dialect],
            *ddl.RUN_ENDS[dialect],
            *ddl.APPEND_ONLY[dialect],
            *ddl.FIND_CALLER[dialect],
            *ddl.ORGS_RENAMED[dialect],
        ):
            connection.execute(text(statement))
        if dialect == "postgresql":
            for statement in start_functions.CREATE:
                connection.exec_driver_sql(statement.replace("%", "%%"))
        return snapshot(connection)


def test_the_migrated_schema_is_the_metadata_on_sqlite(sqlite_url: str, tmp_path: Path) -> None:
    schema.upgrade(sqlite_url)

    expected = from_metadata(f"sqlite:///{tmp_path / 'metadata.db'}")

    assert read(sqlite_url) == expected


def test_the_migrated_schema_is_the_metadata_on_postgresql(
    postgres_url: str, postgres_server: postgres.Server
) -> None:
    schema.upgrade(postgres_url)

    with postgres_server.new_database() as other:
        assert read(postgres_url) == from_metadata(other)


def test_the_hot_tables_are_vacuumed_by_count(migrated_postgres_url: str) -> None:
    with connected(migrated_postgres_url) as connection:
        options = connection.execute(
            text("SELECT reloptions FROM pg_class WHERE relname = 'live_runs'")
        ).scalar_one()
    assert {"autovacuum_vacuum_scale_factor=0", "autovacuum_vacuum_threshold=5000"} <= set(options)


def test_up_down_and_up_again_leaves_nothing_and_then_the_same(database_url: str) -> None:
    schema.upgrade(database_url)
    first = read(database_url)

    alembic(database_url, command.downgrade, "base")
    assert all(not rows for rows in read(database_url).values())

    alembic(database_url, command.upgrade, "head")
    assert read(database_url) == first


def test_going_back_leaves_no_alert_that_the_release_before_does_not_know(migrated_url: str) -> None:
    def kinds() -> list[str]:
        with connected(migrated_url) as connection:
            return list(connection.execute(text("SELECT kind FROM alerts ORDER BY kind")).scalars())

    with connected(migrated_url) as connection:
        at = connection.execute(text("SELECT CURRENT_TIMESTAMP")).scalar_one()
        for kind in ("egress_denied", "failed"):
            row = {"cause": kind, "id": kind, "kind": kind, "summary": "s", "at": at}
            connection.execute(
                text(
                    "INSERT INTO alerts (cause, id, kind, summary, fields, since, struck_at, count) "
                    "VALUES (:cause, :id, :kind, :summary, '{}', :at, :at, 1)"
                ),
                row,
            )
    assert kinds() == ["egress_denied", "failed"]

    alembic(migrated_url, command.downgrade, "0033")

    assert kinds() == ["failed"]


@pytest.fixture
def twin_url(database_url: str, postgres_server: postgres.Server, tmp_path: Path) -> Iterator[str]:
    """A second empty database of the same kind."""
    if database_url.startswith("sqlite"):
        yield f"sqlite:///{tmp_path / 'twin.db'}"
        return
    with postgres_server.new_database() as url:
        yield url


def plain_alembic(
    url: str, monkeypatch: pytest.MonkeyPatch, step: Callable[..., None], *revision: str
) -> None:
    """A command of Alembic as a developer gives it in a checkout."""
    monkeypatch.setenv("WORKER_DATABASE__URL", url)
    step(Config(ROOT / "alembic.ini"), *revision)


def test_plain_alembic_leaves_the_same_database_as_db_upgrade(
    database_url: str, twin_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema.upgrade(twin_url)

    plain_alembic(database_url, monkeypatch, command.upgrade, "0004")
    plain_alembic(database_url, monkeypatch, command.upgrade, "head")

    assert read_all(database_url) == read_all(twin_url)


def test_plain_alembic_repairs_what_an_older_one_left_out(
    migrated_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = read_all(migrated_url)
    with connected(migrated_url) as connection:
        connection.execute(text("DELETE FROM facts"))
        if connection.dialect.name == "postgresql":
            connection.execute(text("REVOKE ALL ON ALL TABLES IN SCHEMA public FROM orgworker_web"))
    plain_alembic(migrated_url, monkeypatch, command.current)
    assert read_all(migrated_url)["all facts"] == []

    plain_alembic(migrated_url, monkeypatch, command.upgrade, "head")

    assert read_all(migrated_url) == complete


def test_an_older_version_names_the_releases_that_work_with_it(
    migrated_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_alembic(migrated_url, monkeypatch, command.downgrade, "0004")

    assert read_all(migrated_url)["all facts"] == [("schema.works_with", "0004 0003")]


def test_upgrading_again_changes_nothing(database_url: str) -> None:
    schema.upgrade(database_url)
    first = read(database_url)

    schema.upgrade(database_url)

    assert read(database_url) == first


def test_the_head_is_what_alembic_says() -> None:
    config = Config()
    config.set_main_option("script_location", str(schema.folder()))

    assert schema.head() == ScriptDirectory.from_config(config).get_current_head()


def test_an_empty_database_is_refused_with_the_command_that_mends_it(
    database_url: str, clock: ManualClock
) -> None:
    database = Database.open(database_url, clock=clock)
    with database.autocommit() as connection, pytest.raises(ConfigurationError) as caught:
        schema.check(connection)
    database.close()

    assert "no schema yet" in str(caught.value)
    assert "python -m worker db upgrade" in caught.value.fix
    assert caught.value.exit_code == 78


@pytest.mark.parametrize(("version", "fix"), [("0000", "db upgrade"), ("9999", "newer release")])
def test_another_version_is_refused(migrated_url: str, clock: ManualClock, version: str, fix: str) -> None:
    with connected(migrated_url) as connection:
        connection.execute(text(f"UPDATE alembic_version SET version_num = '{version}'"))
    database = Database.open(migrated_url, clock=clock)
    with database.autocommit() as connection, pytest.raises(ConfigurationError, match=version) as caught:
        schema.check(connection)
    database.close()

    assert fix in caught.value.fix


def test_a_database_of_a_newer_release_is_not_migrated(migrated_url: str) -> None:
    with connected(migrated_url) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))

    with pytest.raises(ConfigurationError, match="newer release"):
        schema.upgrade(migrated_url)


def test_the_current_version_passes(migrated_url: str, clock: ManualClock) -> None:
    database = Database.open(migrated_url, clock=clock)
    with database.autocommit() as connection:
        schema.check(connection)
        assert schema.current(connection) == schema.head()
    database.close()
