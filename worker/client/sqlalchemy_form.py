"""The outbox's table for SQLAlchemy, the same as the DDL of `statements`."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Identity, Index, Integer, MetaData, String, Table, Text, text
from sqlalchemy.dialects import mysql


def table_of(metadata: MetaData, name: str) -> Table:
    """The table, in the schema that its name has, if any."""
    schema, _, name = name.rpartition(".")
    short = String(200).with_variant(Text(), "postgresql", "sqlite")
    number = BigInteger().with_variant(Integer(), "sqlite")
    state = String(10).with_variant(Text(), "postgresql", "sqlite")
    brief = String(36).with_variant(Text(), "postgresql", "sqlite")
    long = Text().with_variant(mysql.MEDIUMTEXT(), "mysql", "mariadb")
    waiting = text("state = 'waiting'")
    ended = text("state <> 'waiting'")
    return Table(
        name,
        metadata,
        Column("id", number, Identity(always=False), primary_key=True),
        Column("org", short, nullable=False),
        Column("definition", short, nullable=False),
        Column("params", long, nullable=False),
        Column("start_key", short, nullable=False),
        Column("not_before", number, nullable=False, server_default="0"),
        Column("created_at", number, nullable=False),
        Column("state", state, nullable=False, server_default="waiting"),
        Column("next_at", number, nullable=False, server_default="0"),
        Column("claim", brief),
        Column("first_sent_at", number),
        Column("tries", Integer, nullable=False, server_default="0"),
        Column("ended_at", number),
        Column("run_id", brief),
        Column("error", Text),
        Index(
            f"{name}_waiting",
            "state",
            "org",
            "definition",
            "id",
            postgresql_where=waiting,
            sqlite_where=waiting,
        ),
        Index(f"{name}_ended", "state", "ended_at", postgresql_where=ended, sqlite_where=ended),
        Index(f"{name}_key", "start_key"),
        schema=schema or None,
        sqlite_autoincrement=True,
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
        mariadb_engine="InnoDB",
        mariadb_charset="utf8mb4",
        mariadb_collate="utf8mb4_bin",
    )
