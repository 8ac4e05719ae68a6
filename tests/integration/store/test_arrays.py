"""Arrays: what PostgreSQL reads is what was given, in binary form and as text."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from tests.fakes.clock import utc
from worker.ids import new_id
from worker.store.database import Database
from worker.store.dialect import driver
from worker.store.sql.postgresql.arrays import distinct, instants, lines, uuids

LINES = "SELECT unnest(string_to_array(%s::text, chr(30), ''))"


def read(database: Database, query: str, value: str | bytes) -> list[Any]:
    with database.transaction() as connection:
        return [row[0] for row in driver(connection).execute(query, (value,)).fetchall()]


@pytest.mark.parametrize("count", [0, 1, 300])
def test_identifiers_arrive(postgres: Database, count: int) -> None:
    given = [new_id() for _ in range(count)]

    assert read(postgres, "SELECT unnest(%s::uuid[])", uuids(given)) == given


@pytest.mark.parametrize(
    "given",
    [
        [],
        [None],
        [utc("2026-11-29T09:00:00.123457"), None, utc("2031-07-01T00:00:00.000001")],
        [utc("1969-12-31T23:59:59.999999"), utc("9999-12-31T23:59:59.999999")],
    ],
)
def test_times_arrive_to_the_microsecond(postgres: Database, given: list[datetime | None]) -> None:
    assert read(postgres, "SELECT unnest(%s::timestamptz[])", instants(given)) == given


@pytest.mark.parametrize(
    "given", [[], ['{"a":"b\\\\c \\u001e {x,y}"}'], ["[1]", None, '"é\\n"'], [None, None]]
)
def test_json_texts_arrive_unquoted(postgres: Database, given: list[str | None]) -> None:
    # A single null is no text at all: `unnest` fills up what is missing beside longer arrays.
    assert read(postgres, LINES, lines(given)) == given


def test_equal_rows_come_once() -> None:
    assert distinct(["a", "B", "A", "c"], str.lower) == (["a", "B", "c"], "{1,2,1,3}")
