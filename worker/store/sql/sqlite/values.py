"""Python's values as SQLite keeps them, and batches of them in and out in one step each.

Each step of the driver gives the interpreter's lock away and must get it back. Beside a
loop that is busy in Python that takes up to its switch interval: a batch that goes row by
row is a tenth as fast then.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from worker.clock import to_text
from worker.store.engine import compact_json

# Rows in one statement; 18 columns of so many are a third of what SQLite binds by default.
MOST = 512


def instant(value: datetime | None) -> str | None:
    return None if value is None else to_text(value)


def json_text(value: Any) -> str | None:
    """JSON without spaces, or None for None."""
    return None if value is None else compact_json(value)


def json_value(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def json_list(values: Iterable[str]) -> str:
    """A list for `json_each`: one parameter, however long."""
    return json.dumps(list(values))


def in_one_step(
    cursor: Any, statement: str, rows: Sequence[tuple[Any, ...]], *, first: Sequence[Any] = ()
) -> None:
    """Execute with `{rows}` as a table of these rows, whose columns are column1, column2 and so on.

    It is filled up with rows of nulls, so that few lengths need a statement of their own:
    the text says `WHERE column1 IS NOT NULL` or what comes to the same. `first` are the
    values that stand before the rows.
    """
    for part in range(0, len(rows), MOST):
        some = rows[part : part + MOST]
        length, width = 1 << (len(some) - 1).bit_length(), len(some[0])
        values = list(itertools.chain(first, *some))
        values += [None] * (length * width + len(first) - len(values))
        cursor.execute(_with_rows(statement, width, length), values)


@functools.cache
def _with_rows(statement: str, width: int, length: int) -> str:
    row = f"({', '.join('?' * width)})"
    return statement.format(rows=f"(VALUES {', '.join([row] * length)})")


def in_one_answer(cursor: Any, statement: str, values: Sequence[Any]) -> list[Any]:
    """What a statement answers whose one row is one JSON array."""
    (text,) = cursor.execute(statement, values).fetchone()
    answer: list[Any] = json.loads(text)
    return answer
