"""Ends of children are looked at together, and again for those that come meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from worker.errors import StoreUnavailable
from worker.ids import RunId
from worker.store import ended_children, families
from worker.store.ended_children import EndedChildren
from worker.telemetry.events import Emitted

ONE, TWO, THREE = map(RunId, ("1", "2", "3"))


class Database:
    """Notes each look; of a child in `waking` the parent may go on."""

    def __init__(self, waking: set[RunId] | None = None, error: Exception | None = None) -> None:
        self.waking, self.error = waking or set(), error
        self.looked: list[list[RunId]] = []
        self.settled: list[list[RunId]] = []

    async def call_autocommit(self, work, ended):
        assert work is families.unsettled
        await asyncio.sleep(0)
        self.looked.append(sorted(ended))
        if self.error is not None:
            raise self.error
        return self.waking.intersection(ended)

    async def call(self, work, ended):
        assert work is families.settle
        self.settled.append(sorted(ended))


@pytest.fixture(autouse=True)
def _no_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ended_children, "PACE", 0)


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_those_that_end_during_a_look_share_the_next():
    database = Database(waking={THREE})
    ended = EndedChildren(database)

    ended.add([ONE])
    await asyncio.sleep(0)
    ended.add([TWO])
    ended.add([THREE, TWO])
    await turns()
    ended.add([ONE])
    await turns()

    assert database.looked == [[ONE], [TWO, THREE], [ONE]]
    assert database.settled == [[TWO, THREE]]


async def test_it_finishes_with_all_that_was_added():
    database = Database()
    ended = EndedChildren(database)
    await ended.finish()

    ended.add([ONE])
    await asyncio.sleep(0)
    ended.add([TWO])
    await ended.finish()

    assert database.looked == [[ONE], [TWO]]


@pytest.mark.parametrize("error", [StoreUnavailable("away"), RuntimeError("odd")])
async def test_an_error_ends_no_later_look(error: Exception, emitted: list[Emitted]):
    database = Database(error=error)
    ended = EndedChildren(database)

    ended.add([ONE])
    await turns()
    ended.add([TWO])
    await turns()

    assert database.looked == [[ONE], [TWO]]
    assert len(emitted) == (2 if isinstance(error, RuntimeError) else 0)
