"""Plans: on PostgreSQL the hot statements go by the index meant for them, however wrong the statistics."""

from __future__ import annotations

import importlib
import re
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text

from tests.fakes.stock import Stock
from worker.store import dialect as driver_module
from worker.store.database import Database

MODULES = ("admit", "finish", "fire", "leases", "steps")

# For each statement, by what it begins with or is known by: the indexes it may use.
MEANT = {
    "SELECT * FROM ring": {"ix_live_runs_waiting", "ix_live_runs_running_org_id"},
    "offer AS": {
        "ix_live_runs_waiting",
        "ix_live_runs_running_org_id",
        "ix_live_runs_definition_id_started_at",
        "ix_live_runs_running_worker_id_handler",
        "ix_live_runs_parked_handler",
        "pk_live_runs",
    },
    "FOR UPDATE\n": {"pk_live_runs"},
    "DELETE FROM live_runs": {"pk_live_runs", "pk_runs"},
    "UPDATE live_runs l SET state = 'waiting'": {"pk_live_runs"},
    "UPDATE live_runs l SET state = 'parked'": {"pk_live_runs"},
    "UPDATE live_runs w SET": {"pk_live_runs", "ix_live_runs_parked_available_at"},
    "UPDATE live_runs l SET progress": {"pk_live_runs"},
    "UPDATE live_runs h SET": {
        "pk_live_runs",
        "uq_live_runs_held",
        "uq_live_runs_serial",
        "ix_live_runs_definition_id_started_at",
    },
    "WITH ours": {"pk_live_runs"},
    "WITH me": {"ix_live_runs_running_worker_id_handler"},
    "FROM owner o LEFT JOIN workers": {"ix_live_runs_running_worker_id_handler"},
    "FOR UPDATE SKIP LOCKED\n": {"ix_schedule_next_fire_at"},
    "AS s(definition_id)": {"pk_definitions"},
    "WITH new AS": {
        "uq_runs_definition_id_scheduled_for",
        "uq_runs_definition_id_request_key",
        "uq_runs_backfill_id_scheduled_for",
    },
    "UPDATE schedule": {"pk_schedule"},
}


class Recorder:
    """A driver's connection that remembers what it was asked."""

    def __init__(self, raw: Any, seen: dict[str, Any]) -> None:
        self._raw, self._seen = raw, seen

    def execute(self, statement: str, values: Any = (), **options: Any) -> Any:
        self._seen[statement] = values
        return self._raw.execute(statement, values, **options)

    def pipeline(self) -> Any:
        return self._raw.pipeline()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Every hot statement that the test runs, with its last parameters."""
    statements_seen: dict[str, Any] = {}
    plain = driver_module.driver
    for module in MODULES:
        monkeypatch.setattr(
            importlib.import_module(f"worker.store.sql.postgresql.{module}"),
            "driver",
            lambda connection: Recorder(plain(connection), statements_seen),
        )
    return statements_seen


def analyse(database: Database) -> None:
    with database.autocommit() as connection:
        connection.execute(text("ANALYZE"))


@pytest.mark.parametrize("analysed", ["empty", "full"])
def test_each_hot_statement_goes_by_its_index(
    postgres: Database, seen: dict[str, Any], analysed: str
) -> None:
    """Statistics taken when nothing waited or ran must not lead to reading everything that now does."""
    stock = Stock(postgres)
    worker, orgs = stock.worker(), [stock.org(limit=60) for _ in range(20)]
    soon = stock.now() + timedelta(hours=1)
    definitions = [stock.definition(org, due_at=soon if n else stock.now()) for n, org in enumerate(orgs)]
    if analysed == "empty":
        analyse(postgres)
    for _ in range(10):
        stock.put(*stock.runs(org for org in orgs for _ in range(20)))
    held = stock.admit(worker, 500)
    if analysed == "full":
        analyse(postgres)

    # The walk under the lock, and the one before it.
    admitted = stock.admit(worker, 20) + stock.admit(worker, 5000) + stock.admit(worker, 20) + held
    stock.use_hot_statements(worker, admitted, 50)

    with postgres.transaction() as connection:
        raw = driver_module.driver(connection)
        plans = {
            statement: "\n".join(line for (line,) in raw.execute("EXPLAIN " + statement, values))
            for statement, values in seen.items()
            if re.search("live_runs|schedule|definitions", statement)
        }
    looked_at = set()
    for statement, plan in plans.items():
        for mark, indexes in MEANT.items():
            if mark in statement and not (mark == "FOR UPDATE\n" and "unnest" in statement):
                looked_at.add(mark)
                used = set(
                    re.findall(
                        r"Scan (?:Backward )?using (\w+) on (?:live_runs|runs|schedule|definitions)\b", plan
                    )
                )
                assert used <= indexes, f"{mark}: {used - indexes}\n{plan}"
                assert not re.search(r"Seq Scan on (live_runs|runs|orgs|schedule|workers)", plan), plan
                # Each row with all of the batch.
                if mark in ("offer AS", "DELETE FROM live_runs"):
                    assert not re.search(r"Join Filter: .*\b[alp]\.id\b", plan), plan
                # Hashed is what the statement itself has just made, never a table.
                for number in re.findall(r"hashed SubPlan (\d+)", plan):
                    assert re.search(rf"SubPlan {number}\n\s+->  CTE Scan", plan), plan
    assert looked_at == set(MEANT)
    assert definitions
