"""What a worker finds when it starts on a SQLite file whose last worker died."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from tests.fakes.clock import ManualClock
from tests.fakes.stock import HANDLER, Stock
from tests.unit.engine.test_incarnation import process_of
from worker.app.process import Worker
from worker.settings import Settings
from worker.store import definitions

SPEC = {"handler": HANDLER, "max_recoveries": 0, "pause_after_failures": 1, "schedule": "0 3 * * *"}


async def test_a_run_that_is_lost_for_good_counts_as_a_failure_of_its_definition(
    sqlite_stock: Stock, migrated_sqlite_url: str, clock: ManualClock
) -> None:
    """If its runs kill the worker, no end of one is ever written otherwise: it would never be paused."""
    stock = sqlite_stock
    org = stock.org()
    definition = stock.definition(org, spec=SPEC)
    stock.put(stock.run(org, definition))
    [lost] = stock.admit(stock.worker())
    clock.advance(60.0)
    keyring: Any = SimpleNamespace(digests=lambda: None)
    settings = Settings.model_validate({"database": {"url": migrated_sqlite_url}})
    worker = Worker(settings, stock.database, keyring, process_of(clock), [])

    async with worker.begin() as incarnation:
        chores = cast(Any, incarnation.dispatcher.on_end).__self__
        assert stock.stored(lost.id)["state"] == "failed"
        await chores._count_failures()

    with stock.database.autocommit() as connection:
        row = definitions.find_by_id(connection, org, definition)
    assert row is not None and row["paused_at"] is not None
