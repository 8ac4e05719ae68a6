"""The outbox: a table in the product's database, into which a start is inserted with the product's own data.

An insert is all that happens in the product's transaction; a relay starts what was committed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, get_args

from . import statements
from .errors import ConfigurationError
from .plans import params_text, start_request
from .statements import Dialect, Style, arguments, compiled, written

if TYPE_CHECKING:
    import sqlalchemy

TABLE = "orgworker_outbox"
_NAME = re.compile(r"([a-z_][a-z0-9_]{0,62}\.)?[a-z_][a-z0-9_]{0,47}")
_STYLES: Mapping[str, Style] = {"qmark": "qmark", "format": "format", "pyformat": "format"}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Outbox:
    """An outbox of a database; it holds no connection, so one may serve all threads, loops and processes.

    `dialect` is postgresql, mysql (MariaDB too) or sqlite. `connect` returns a new DB-API connection, or one
    of a pool such as SQLAlchemy's `engine.raw_connection`; only a relay needs it. `paramstyle` is for
    connections that hide their driver. Without `skip_locked`, for MySQL before 8.0 and MariaDB before 10.6,
    relays wait for each other's rows.

    Raises:
        ConfigurationError: another dialect, or a table that is not a name.
    """

    def __init__(
        self,
        dialect: Dialect,
        *,
        table: str = TABLE,
        connect: Callable[[], Any] | None = None,
        paramstyle: str | None = None,
        skip_locked: bool = True,
    ) -> None:
        if dialect not in get_args(Dialect):
            raise ConfigurationError(
                f"{dialect!r} is not a dialect",
                fix=f"one of {', '.join(get_args(Dialect))}; MariaDB is mysql",
            )
        if not _NAME.fullmatch(table):
            raise ConfigurationError(
                f"{table!r} is not the name of a table",
                fix="lower-case letters, digits and _, also SCHEMA.TABLE",
            )
        self.dialect: Dialect = dialect
        self.table = table
        self.connect = connect
        self.skip_locked = skip_locked
        self._paramstyle = paramstyle

    def __repr__(self) -> str:
        return f"Outbox({self.dialect!r}, table={self.table!r})"

    @property
    def ddl(self) -> tuple[str, ...]:
        """The statements that make the table, for a migration."""
        return statements.ddl(self.dialect, self.table)

    def sqlalchemy_table(self, metadata: sqlalchemy.MetaData) -> sqlalchemy.Table:
        """The table for SQLAlchemy's metadata, and so for Alembic's autogenerate."""
        from .sqlalchemy_form import table_of

        return table_of(metadata, self.table)

    def start(
        self,
        connection: Any,
        org: str,
        definition: str,
        params: Mapping[str, Any] | None = None,
        *,
        key: str | None = None,
        not_before: datetime | None = None,
    ) -> str:
        """Insert a start in the connection's transaction, and return its key.

        `connection` is a DB-API connection, Django's, or a Connection or Session of SQLAlchemy. The caller
        commits. One key makes one run of a definition, however often it is inserted: that of the first one
        that is relayed. Without a key it gets a random one.

        Raises:
            InvalidRequest: a value of the wrong shape, before anything is inserted.
        """
        values = self._values(org, definition, params, key, not_before)
        self._execute(connection, statements.INSERT, values)
        return str(values["start_key"])

    async def start_async(
        self,
        connection: Any,
        org: str,
        definition: str,
        params: Mapping[str, Any] | None = None,
        *,
        key: str | None = None,
        not_before: datetime | None = None,
    ) -> str:
        """As `start`, on a connection of asyncpg, psycopg or aiosqlite, or of SQLAlchemy's asyncio."""
        values = self._values(org, definition, params, key, not_before)
        statement = self.written(statements.INSERT)
        module = _module_of(connection)
        if module == "sqlalchemy":
            from sqlalchemy import text

            await connection.execute(text(statement), values)
        elif module == "asyncpg":
            sql, names = compiled(statement, "numeric_dollar")
            await connection.execute(sql, *arguments(names, values))
        else:
            sql, names = compiled(statement, self.style_of(connection))
            await connection.execute(sql, arguments(names, values))
        return str(values["start_key"])

    def find(self, connection: Any, org: str, definition: str, key: str) -> dict[str, Any] | None:
        """The row of a key: its `state` (waiting, sent, refused), `run_id` and `error`; None without one."""
        values = {"start_key": key, "org": org, "definition": definition}
        found = self._rows(connection, statements.BY_KEY, values)
        return found[0] if found else None

    def show(self, connection: Any, state: str = "refused", *, limit: int = 50) -> list[dict[str, Any]]:
        """The newest rows in a state."""
        return self._rows(connection, statements.SHOW, {"state": state, "most": limit})

    def again(self, connection: Any, row_id: int) -> dict[str, Any] | None:
        """Let a refused row wait again, after what refused it was corrected; the caller commits.

        Returns the row as it was, None if no such row was refused.
        """
        found = self._rows(connection, statements.REFUSED_ROW, {"id": row_id})
        self._execute(connection, statements.AGAIN, {"id": row_id})
        return found[0] if found else None

    def written(self, statement: str, ids: int = 0) -> str:
        """A statement for this outbox."""
        return written(statement, self.dialect, self.table, ids, skip_locked=self.skip_locked)

    def style_of(self, connection: Any) -> Style:
        """The driver's style of parameters."""
        style = self._paramstyle or _style_of(connection)
        if style is None or style not in _STYLES:
            raise ConfigurationError(
                f"a connection of {type(connection).__module__} has the paramstyle {style!r}",
                fix="give Outbox(paramstyle=…): qmark, format or pyformat",
            )
        return _STYLES[style]

    def _values(
        self,
        org: str,
        definition: str,
        params: Mapping[str, Any] | None,
        key: str | None,
        not_before: datetime | None,
    ) -> dict[str, Any]:
        request = start_request(org, definition, params, key, not_before)
        at = 0 if not_before is None else int((not_before - EPOCH).total_seconds() * 1000)
        return {
            "org": request.org,
            "definition": request.definition,
            "params": params_text(request.params),
            "start_key": request.key,
            "not_before": max(0, at),
        }

    def _execute(self, connection: Any, statement: str, values: Mapping[str, Any]) -> Any:
        """Execute on any sync connection; returns what has its rows."""
        statement = self.written(statement)
        # A connection of SQLAlchemy's pool wraps the driver's, and is used as that.
        if _module_of(connection) == "sqlalchemy" and not hasattr(connection, "dbapi_connection"):
            from sqlalchemy import text

            result = connection.execute(text(statement), dict(values))
            return [tuple(row) for row in result] if result.returns_rows else []
        sql, names = compiled(statement, self.style_of(connection))
        cursor = connection.cursor()
        try:
            cursor.execute(sql, arguments(names, values))
            return [tuple(row) for row in cursor.fetchall()] if cursor.description else []
        finally:
            cursor.close()

    def _rows(self, connection: Any, statement: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        found = self._execute(connection, statement, values)
        return [dict(zip(statements.SHOWN, row, strict=True)) for row in found]


def _module_of(connection: Any) -> str:
    """The package of a connection's class, of SQLAlchemy also for classes derived from its own."""
    for kind in type(connection).__mro__:
        package = kind.__module__.partition(".")[0]
        if package != "builtins":
            if package == "sqlalchemy" or kind is type(connection):
                first = package
            if package == "sqlalchemy":
                return package
    return first


def _style_of(connection: Any) -> str | None:
    module = _module_of(connection)
    if module == "django":
        # Django takes %s for every database.
        return "format"
    if module == "sqlalchemy":
        return _style_of(connection.dbapi_connection)
    if module == "aiosqlite":
        return "qmark"
    for kind in type(connection).__mro__:
        name = kind.__module__
        while name:
            with suppress(KeyError, AttributeError):
                return str(sys.modules[name].paramstyle)
            name = name.rpartition(".")[0]
    return None
