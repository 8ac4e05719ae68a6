"""Batches over both databases; their time is `clock`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.batches import Rig
from tests.fakes.clock import ManualClock
from tests.fakes.stock import Stock
from worker.demo.model_apis import ModelApis
from worker.store.database import Database


@pytest.fixture
def database(migrated_url: str, clock: ManualClock) -> Iterator[Database]:
    with clock.moves(migrated_url):
        opened = Database.open(migrated_url, clock=clock)
        yield opened
        opened.close()


@pytest.fixture
def apis(clock: ManualClock) -> ModelApis:
    return ModelApis(now=lambda: clock.now().timestamp(), takes=lambda: 20 * 60.0)


@pytest.fixture
def rig(database: Database, clock: ManualClock, apis: ModelApis, tmp_path: Path) -> Rig:
    return Rig(Stock(database), clock, apis, tmp_path)
