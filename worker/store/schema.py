"""The schema: its version, its migrations, and facts about the whole database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, inspect, select, text

from worker.clock import SystemClock
from worker.errors import ConfigurationError
from worker.store import roles, start_functions, tables
from worker.store.database import Database, translated
from worker.store.dialect import insert_into, is_postgresql, upsert
from worker.store.engine import open_engine, read_url

if TYPE_CHECKING:
    from alembic.script import ScriptDirectory

_facts = tables.facts

# The fact with the time zone release that the schedules were computed with.
ZONE_DATA = "tzdata"


def read(connection: Connection, name: str) -> str | None:
    """The fact, or None."""
    query = select(_facts.c.value).where(_facts.c.name == name).limit(1)
    return connection.execute(query).scalar_one_or_none()


def write(connection: Connection, name: str, value: str) -> None:
    """Set a fact."""
    connection.execute(upsert(connection, _facts, ("name",), ("value",)), {"name": name, "value": value})


def write_new(connection: Connection, name: str, value: str) -> bool:
    """Set a fact unless it is set; returns whether it was not."""
    made = insert_into(connection, _facts).values({"name": name, "value": value})
    return connection.execute(made.on_conflict_do_nothing()).rowcount == 1


# Two simultaneous migrators, or one that waits for a long query, would make the workers wait: the
# first kind queues for this lock, the second gives up and can be repeated.
_MIGRATION_LOCK = 6_070_311
_SETTINGS = ("SET LOCAL lock_timeout = '5s'", "SET LOCAL statement_timeout = '10min'")
_DEADLINE = 660.0
# True without such a table: `check` reports that.
_MAY_READ = text("SELECT COALESCE(has_table_privilege(to_regclass('alembic_version'), 'SELECT'), true)")
_WORKS_WITH = text("SELECT value FROM facts WHERE name = 'schema.works_with'")


def folder() -> Path:
    """The folder of the migrations: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "migrations"
    return inside if inside.is_dir() else package.parent / "migrations"


def head() -> str:
    """The version that this release needs: the number of the newest migration."""
    return max(path.name.partition("_")[0] for path in (folder() / "versions").glob("[0-9]*_*.py"))


def current(connection: Connection) -> str | None:
    """The version of the database; None if it is empty."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    version: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return version


def check(connection: Connection) -> None:
    """Check that the database has this release's schema, or a newer one that this release can use.

    Raises:
        ConfigurationError: it has no schema, or another version.
    """
    has, needs = current(connection), head()
    if has == needs:
        return
    state = "has no schema yet" if has is None else f"has schema version {has}"
    if has is not None and has > needs:
        version, _, works_with = (connection.execute(_WORKS_WITH).scalar() or "").partition(" ")
        if version == has and works_with <= needs:
            # A rolling deploy: the newer schema still has all that this release needs.
            return
        fix = "it was migrated by a newer release: install that one"
    else:
        fix = "run `python -m worker db upgrade`"
    raise ConfigurationError(f"the database {state}, this release needs {needs}", fix=fix)


def check_as_login(database: Database) -> None:
    """As `check`, for any login: a worker's reads the version itself, that of `serve` in the web role.

    Raises:
        ConfigurationError: as in `check`.
        RolesMissing: the login cannot read the version in any role.
    """
    with database.autocommit() as connection:
        if not is_postgresql(connection) or connection.execute(_MAY_READ).scalar_one():
            check(connection)
            return
    check_for_web(database)


def check_for_web(database: Database) -> None:
    """As `check`, for a process that only acts for callers, in the roles of the web side.

    Raises:
        ConfigurationError: as in `check`.
        RolesMissing: the login cannot take both roles.
    """
    with database.autocommit() as connection:
        if not is_postgresql(connection) or not inspect(connection).has_table("alembic_version"):
            check(connection)
            return
        if roles.WEB in roles.lacking(connection):
            roles.require(connection)
    with database.acting(roles.NOBODY).autocommit() as connection:
        check(connection)
    with database.autocommit() as connection:
        roles.require(connection)


def upgrade(
    url: str,
    owner_url: str = "",
    *,
    then: Callable[[Connection], object] = lambda connection: None,
    report: Callable[[str], None] | None = None,
) -> str | None:
    """Bring the database to this release's version and return the one it had; can be repeated.

    `then` is called in the same transaction, at its end.

    On PostgreSQL `owner_url` names the role that owns the tables, if that is not the worker's. One
    migrator runs at a time, in one transaction. `report` gets a line for each change to review.

    Raises:
        ConfigurationError: the URL is unusable, or the database belongs to a newer release.
        StoreUnavailable: the database did not answer, or a table stayed locked.
    """
    from alembic import command
    from alembic.config import Config
    from alembic.script.revision import ResolutionError
    from alembic.util.exc import CommandError

    config = Config()
    config.set_main_option("script_location", str(folder()).replace("%", "%%"))
    setting = "database.owner_url" if owner_url else "database.url"
    try:
        with migrating(owner_url or url, setting=setting) as connection:
            before = current(connection)
            config.attributes["connection"] = connection
            config.attributes["report"] = report
            command.upgrade(config, "head")
            then(connection)
            return before
    except CommandError as error:
        if isinstance(error.__cause__, ResolutionError):
            raise ConfigurationError(
                "the database was migrated by a newer release", fix="install that release"
            ) from error
        raise


def complete(connection: Connection, scripts: ScriptDirectory) -> None:
    """Do what follows the migrations: record which releases can use this version, and grant the rights.

    `migrations/env.py` calls it, so that plain Alembic leaves the same database as `upgrade`.
    """
    version = current(connection)
    if version is None:
        return
    connection.execute(text("DELETE FROM facts WHERE name = 'schema.works_with'"))
    connection.execute(
        text("INSERT INTO facts (name, value) VALUES ('schema.works_with', :value)"),
        # With its version: the row does not count if the version changes without it.
        {"value": f"{version} {scripts.get_revision(version).module.works_with}"},
    )
    if version == scripts.get_current_head() and is_postgresql(connection):
        roles.grant(connection)
        start_functions.install(connection)


@contextmanager
def migrating(url: str, *, setting: str = "database.url") -> Iterator[Connection]:
    """A transaction with the migration lock."""
    parsed = read_url(url, setting=setting)
    engine = open_engine(parsed, clock=SystemClock(), role="migration", connections=1, deadline=_DEADLINE)
    try:
        with translated(), engine.connect() as connection, connection.begin():
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
                for setting in _SETTINGS:
                    connection.execute(text(setting))
            yield connection
    finally:
        engine.dispose()
