"""Pages of a list: newest first by key; the next page is what follows a row."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Select

from worker.errors import NotFound, UsageError
from worker.ids import lowest_id

Row = dict[str, Any]

DEFAULT_LIMIT = 50
MAX_LIMIT = 1000


def page(
    connection: Connection,
    query: Select[Any],
    key: ColumnElement[str],
    *,
    limit: int,
    after: str | None,
    since: datetime | None = None,
    since_column: ColumnElement[datetime] | None = None,
) -> list[Row]:
    """The first `limit` rows of `query`, newest first, that follow the row `after`.

    `key` is a UUIDv7 column; with `since`, rows whose `since_column` lies before it
    are left out, and the key bounds the search.

    Raises:
        UsageError: the limit is out of range.
        NotFound: `after` is no id.
    """
    check_limit(limit)
    if after is not None:
        query = query.where(key < checked_id(after))
    if since is not None and since_column is not None:
        query = query.where(since_column >= since, key >= lowest_id(since))
    query = query.order_by(key.desc()).limit(limit)
    return [dict(row) for row in connection.execute(query).mappings()]


def checked_id(text: str) -> str:
    """The id in its one spelling.

    Raises:
        NotFound: the text is no id, so nothing can have it.
    """
    try:
        return str(UUID(text))
    except ValueError:
        raise NotFound(
            f"nothing is called {text!r}: it is no id", fix="`-o id` prints the ids of a list"
        ) from None


def check_limit(limit: int) -> None:
    """Raise UsageError where a page cannot have so many rows."""
    if not 1 <= limit <= MAX_LIMIT:
        raise UsageError(
            f"limit {limit} is not between 1 and {MAX_LIMIT}", fix="`--after ID` gives what follows a page"
        )


def check_state(state: str, states: tuple[str, ...]) -> None:
    if state not in states:
        raise UsageError(f"{state!r} is no state here", fix=f"one of {', '.join(states)}")
