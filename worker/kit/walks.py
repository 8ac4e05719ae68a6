"""Walks: all rows of a list that is read in pages, and work on many things, some at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from sqlalchemy import Connection

from worker.store.database import Database
from worker.store.dialect import Row

T = TypeVar("T")


def rows_of(
    database: Database,
    read: Callable[[Connection, Any, int], Sequence[Row]],
    *,
    limit: int,
    key: str = "id",
    after: Any = "",
) -> Iterator[Row]:
    """All rows of a list; `read` gets a `key` and a limit, and returns the page after that key.

    No connection is held between pages.
    """
    while True:
        with database.autocommit() as connection:
            page = read(connection, after, limit)
        yield from page
        if len(page) < limit:
            return
        after = page[-1][key]


async def for_each(items: Iterable[T], work: Callable[[T], Awaitable[object]], *, concurrency: int) -> None:
    """Do `work` for each, in the order of `items`, some at a time; raises as a TaskGroup."""
    left = iter(items)

    async def work_on() -> None:
        for item in left:
            await work(item)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work_on())
