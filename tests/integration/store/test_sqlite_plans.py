"""Plans: on SQLite the hot statements look rows up by an index, and each takes its batch in one step."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fakes.stock import Stock
from worker.store import dialect as driver_module
from worker.store.dialect import driver
from worker.store.sql.sqlite.values import MAX_ROWS

MODULES = ("admit", "finish", "fire", "leases", "steps")
# What comes and goes, or grows: none of it is read from end to end.
TABLES = (
    "orgs|definitions|definition_revisions|schedule|runs|live_runs|attempts|skips|workers|checkpoints|waits"
)
# By their own words the few that are there, and they are not in the way of a run.
FEW = ("UPDATE workers SET ended_at",)


class Recorder:
    """A driver's connection that remembers what its cursors were asked, and how often."""

    def __init__(self, raw: Any, seen: dict[str, Any], count: Counter[str]) -> None:
        self.raw, self.seen, self.count = raw, seen, count

    def cursor(self) -> Any:
        recorder, cursor = self, self.raw.cursor()

        class Cursor:
            def execute(self, statement: str, values: Any = ()) -> Any:
                recorder.seen[statement] = values
                recorder.count[statement] += 1
                return cursor.execute(statement, values)

            def executemany(self, statement: str, rows: Any) -> Any:
                for values in (rows := list(rows))[:1]:
                    recorder.seen[statement] = values
                recorder.count[statement] += len(rows)
                return cursor.executemany(statement, rows)

            def __getattr__(self, name: str) -> Any:
                return getattr(cursor, name)

            def __iter__(self) -> Iterator[Any]:
                return iter(cursor)

        return Cursor()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Counter[str]]:
    """Each hot statement that the test runs with its last values, and how often each was run."""
    seen: dict[str, Any] = {}
    count: Counter[str] = Counter()
    plain = driver_module.driver
    for module in MODULES:
        # Not by attribute: the package has functions that are called as its modules are.
        monkeypatch.setattr(
            importlib.import_module(f"worker.store.sql.sqlite.{module}"),
            "driver",
            lambda connection: Recorder(plain(connection), seen, count),
        )
    return seen, count


def test_each_hot_statement_goes_by_an_index(
    sqlite_stock: Stock, asked: tuple[dict[str, Any], Counter[str]]
) -> None:
    stock, (seen, _) = sqlite_stock, asked
    worker, orgs = stock.worker(), [stock.org(limit=60) for _ in range(5)]
    for org in orgs:
        stock.definition(org, due_at=stock.now())
    stock.put(*stock.runs(org for org in orgs for _ in range(20)))
    stock.use_hot_statements(worker, stock.admit(worker, 60), 20)

    with stock.database.transaction() as connection:
        raw = driver(connection)
        for statement, values in seen.items():
            if any(few in statement for few in FEW):
                continue
            plan = [detail for *_, detail in raw.execute("EXPLAIN QUERY PLAN " + statement, values)]
            # Aliases stand in a plan for their tables.
            names = {alias: table for table, alias in re.findall(rf"\b({TABLES}) (\w+)\b", statement)}
            for step in plan:
                scanned = re.match(r"SCAN (\w+)(?! USING)", step)
                if scanned:
                    table = names.get(scanned[1], scanned[1])
                    assert not re.fullmatch(TABLES, table), f"{step}\n{statement}"


def test_a_batch_of_ends_or_of_admissions_is_as_many_steps_as_one(
    sqlite_stock: Stock, asked: tuple[dict[str, Any], Counter[str]]
) -> None:
    """Each step lets the worker's loop in between: they must not grow with the batch."""
    stock, (_, count) = sqlite_stock, asked
    worker, orgs = stock.worker(), [stock.org(limit=100) for _ in range(10)]
    stock.put(*stock.runs(org for org in orgs for _ in range(20)))

    def steps(size: int) -> int:
        count.clear()
        admitted = stock.admit(worker, size)
        stock.finish(worker, *(stock.ended(run) for run in admitted))
        assert len(admitted) == size
        return sum(count.values())

    assert steps(100) <= steps(10) + 1


def test_more_ends_than_one_statement_takes_are_all_written(sqlite_stock: Stock) -> None:
    worker, org = sqlite_stock.worker(), sqlite_stock.org(limit=2 * MAX_ROWS)
    sqlite_stock.put(*sqlite_stock.runs([org] * (MAX_ROWS + 3)))
    admitted = sqlite_stock.admit(worker, MAX_ROWS + 3)

    accepted = sqlite_stock.finish(worker, *(sqlite_stock.ended(run) for run in admitted))

    assert accepted == {run.id for run in admitted}
    assert len(accepted) == MAX_ROWS + 3
    for run in (admitted[0], admitted[-1]):
        assert sqlite_stock.stored(run.id)["state"] == "succeeded"
        assert sqlite_stock.live(run.id) is None
        assert len(sqlite_stock.attempts(run.id)) == 1
