"""Databases of products, with an outbox: SQLite, PostgreSQL and MariaDB, and the drivers that insert."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiosqlite
import asyncpg
import psycopg
import pytest
from sqlalchemy import NullPool, create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from tests.fakes import mariadb
from worker.client import Outbox
from worker.client.statements import Dialect

KINDS = ("sqlite", "postgresql", "mariadb")


@dataclass
class ProductDatabase:
    """A product's empty database; `url` is SQLAlchemy's, `connect` makes a DB-API connection."""

    kind: str
    url: str
    connect: Callable[[], Any]

    @property
    def dialect(self) -> Dialect:
        return "mysql" if self.kind == "mariadb" else self.kind  # type: ignore[return-value]

    def outbox(self, **more: Any) -> Outbox:
        return Outbox(self.dialect, connect=self.connect, **more)

    def execute(self, sql: str, *values: Any) -> list[Any]:
        """Execute and commit, with the driver's own parameters; the rows."""
        connection = self.connect()
        try:
            cursor = connection.cursor()
            cursor.execute(sql, values)
            found = list(cursor.fetchall()) if cursor.description else []
            connection.commit()
            return found
        finally:
            connection.close()

    def make(self, outbox: Outbox | None = None) -> Outbox:
        """Make the outbox's table."""
        outbox = outbox or self.outbox()
        for statement in outbox.ddl:
            self.execute(statement)
        return outbox


@pytest.fixture(scope="session")
def maria(tmp_path_factory: pytest.TempPathFactory) -> Iterator[mariadb.Server]:
    if mariadb.binary() is None:
        pytest.skip(f"there is no MariaDB here, so nothing of MySQL's dialect is tested: {mariadb.INSTALL}")
    server = mariadb.Server(tmp_path_factory.mktemp("maria"))
    server.start()
    yield server
    server.stop()


_numbers = iter(range(1, 10_000))


@pytest.fixture(params=KINDS)
def product(request: pytest.FixtureRequest, tmp_path: Path) -> ProductDatabase:
    return database_of(request.param, request, tmp_path)


def database_of(kind: str, request: pytest.FixtureRequest, folder: Path) -> ProductDatabase:
    if kind == "sqlite":
        path = folder / "product.db"
        return ProductDatabase(
            kind, f"sqlite:///{path}", lambda: sqlite3.connect(path, timeout=30, check_same_thread=False)
        )
    if kind == "postgresql":
        url: str = request.getfixturevalue("postgres_url")
        return ProductDatabase(
            kind, url.replace("postgresql:", "postgresql+psycopg:"), lambda: psycopg.connect(url)
        )
    server: mariadb.Server = request.getfixturevalue("maria")
    name = f"product_{next(_numbers)}"
    server.make(name)
    return ProductDatabase(
        kind, f"mysql+pymysql://root@127.0.0.1:{server.port}/{name}", lambda: server.connect(name)
    )


# ---- how a product inserts what to start, in a transaction that is committed or rolled back

Insert = Callable[[ProductDatabase, Outbox, bool, tuple[Any, ...], dict[str, Any]], Any]


def by_dbapi(db: ProductDatabase, outbox: Outbox, commit: bool, what: Any, more: Any) -> None:
    connection = db.connect()
    try:
        outbox.start(connection, *what, **more)
        connection.commit() if commit else connection.rollback()
    finally:
        connection.close()


def by_sqlalchemy(db: ProductDatabase, outbox: Outbox, commit: bool, what: Any, more: Any) -> None:
    engine = create_engine(db.url, poolclass=NullPool)
    with engine.connect() as connection:
        outbox.start(connection, *what, **more)
        connection.commit() if commit else connection.rollback()
    engine.dispose()


def by_session(db: ProductDatabase, outbox: Outbox, commit: bool, what: Any, more: Any) -> None:
    engine = create_engine(db.url, poolclass=NullPool)
    with Session(engine) as session:
        outbox.start(session, *what, **more)
        session.commit() if commit else session.rollback()
    engine.dispose()


def by_raw_connection(db: ProductDatabase, outbox: Outbox, commit: bool, what: Any, more: Any) -> None:
    """A DB-API connection of SQLAlchemy's pool."""
    engine = create_engine(db.url, poolclass=NullPool)
    connection = engine.raw_connection()
    outbox.start(connection, *what, **more)
    connection.commit() if commit else connection.rollback()
    connection.close()
    engine.dispose()


@asynccontextmanager
async def _transaction(connection: Any, commit: bool) -> AsyncIterator[Any]:
    yield connection
    await (connection.commit() if commit else connection.rollback())
    await connection.close()


async def by_asyncpg(db: ProductDatabase, outbox: Outbox, commit: bool, what: Any, more: Any) -> None:
    connection = await asyncpg.connect(db.url.replace("+psycopg", ""))
    transaction = connection.transaction()
    await transaction.start()
    await outbox.start_async(connection, *what, **more)
    await (transaction.commit() if commit else transaction.rollback())
    await connection.close()


async def by_async_driver(db: ProductDatabase, outbox: Outbox, commit: bool, what: Any, more: Any) -> None:
    url = db.url.replace("+psycopg", "")
    opened: Any = (
        aiosqlite.connect(db.url.removeprefix("sqlite:///"))
        if db.kind == "sqlite"
        else psycopg.AsyncConnection.connect(url)
    )
    async with _transaction(await opened, commit) as connection:
        await outbox.start_async(connection, *what, **more)


async def by_async_sqlalchemy(
    db: ProductDatabase, outbox: Outbox, commit: bool, what: Any, more: Any
) -> None:
    engine = create_async_engine(db.url.replace("+psycopg", "+asyncpg"), poolclass=NullPool)
    opened: AbstractAsyncContextManager[Any]
    for opened in (engine.connect(), AsyncSession(engine)):
        async with opened as connection:
            await outbox.start_async(connection, *what, **more)
            # The second one finds the key of the first: two rows, one run.
            await (connection.commit() if commit else connection.rollback())
    await engine.dispose()


INSERTS: dict[str, tuple[Insert, tuple[str, ...]]] = {
    "DB-API": (by_dbapi, KINDS),
    "SQLAlchemy's Connection": (by_sqlalchemy, KINDS),
    "SQLAlchemy's Session": (by_session, KINDS),
    "SQLAlchemy's raw connection": (by_raw_connection, KINDS),
    "asyncpg": (by_asyncpg, ("postgresql",)),
    "psycopg or aiosqlite": (by_async_driver, ("sqlite", "postgresql")),
    "SQLAlchemy's asyncio": (by_async_sqlalchemy, ("postgresql",)),
}
