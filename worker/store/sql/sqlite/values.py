"""Python values as SQLite stores them, and batches that take one driver step.

Each step of the driver releases the interpreter lock. Beside a busy event loop it takes up to a switch
interval to get it back, so a batch that goes row by row is ten times slower.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from operator import attrgetter
from typing import Any

from worker.clock import to_text
from worker.store.dialect import compact_json

# Rows in one statement; with 18 columns a third of the parameters that SQLite allows by default.
MAX_ROWS = 512


def instant(value: datetime | None) -> str | None:
    return None if value is None else to_text(value)


def json_text(value: Any) -> str | None:
    """JSON without spaces; None stays None."""
    return None if value is None else compact_json(value)


def json_value(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def json_list(values: Iterable[str]) -> str:
    """A list for `json_each`: one parameter of any length."""
    return json.dumps(list(values))


class Rows:
    """Objects as rows of their attributes: the form of a value, if it has one, and dotted names.

    The same as `Columns` of PostgreSQL, by row.
    """

    def __init__(self, *columns: tuple[Callable[[Any], Any] | None, str]) -> None:
        self._columns = [(form, attrgetter(name)) for form, names in columns for name in names.split()]

    def of(self, objects: Sequence[Any]) -> list[tuple[Any, ...]]:
        read = [(form, map(attribute, objects)) for form, attribute in self._columns]
        return [*zip(*(values if form is None else map(form, values) for form, values in read), strict=True)]


def in_one_step(
    cursor: Any,
    statement: str,
    rows: Sequence[tuple[Any, ...]],
    *,
    first: Sequence[Any] = (),
    last: Sequence[Any] = (),
) -> None:
    """Execute a statement with `{rows}` as a table of these rows: column1, column2 and so on.

    Rows of nulls pad it to a power of two, so that there are few different statements: the text must
    ignore them, as by `WHERE column1 IS NOT NULL`. `first` are the parameters before the rows, `last` those
    after them.
    """
    for part in range(0, len(rows), MAX_ROWS):
        some = rows[part : part + MAX_ROWS]
        length, width = 1 << (len(some) - 1).bit_length(), len(some[0])
        values = list(itertools.chain(first, *some))
        values += [None] * (length * width + len(first) - len(values))
        cursor.execute(_with_rows(statement, width, length), [*values, *last])


@functools.cache
def _with_rows(statement: str, width: int, length: int) -> str:
    row = f"({', '.join('?' * width)})"
    return statement.format(rows=f"(VALUES {', '.join([row] * length)})")


def in_one_answer(cursor: Any, statement: str, values: Sequence[Any]) -> list[Any]:
    """The result of a statement that returns one JSON array."""
    (text,) = cursor.execute(statement, values).fetchone()
    answer: list[Any] = json.loads(text)
    return answer
