"""Insert, or change what is there: both databases spell it alike, SQLAlchemy by dialect."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, Table
from sqlalchemy.dialects import postgresql, sqlite


def upsert(
    connection: Connection, table: Table, key: Sequence[str], replaced: Sequence[str]
) -> postgresql.Insert | sqlite.Insert:
    """An INSERT that sets the `replaced` columns of the row that already has this key."""
    if connection.dialect.name == "postgresql":
        statement = postgresql.insert(table)
        return statement.on_conflict_do_update(
            index_elements=list(key), set_={name: statement.excluded[name] for name in replaced}
        )
    other = sqlite.insert(table)
    return other.on_conflict_do_update(
        index_elements=list(key), set_={name: other.excluded[name] for name in replaced}
    )
