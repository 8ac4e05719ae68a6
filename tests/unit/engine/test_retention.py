"""Retention deletes in batches until nothing old enough is left, and says what it did."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from tests.fakes.clock import ManualClock
from worker.engine.loops.maintenance import BATCH, PARTS, Ages, Retention
from worker.operations.chores import ages_of
from worker.settings.sections import RetentionSettings
from worker.store.tables import FINAL_STATES

DAY = timedelta(days=1)
AGES = Ages(
    runs={"succeeded": 30 * DAY, "failed": 90 * DAY}, skips=7 * DAY, logs=14 * DAY, start_keys=5 * DAY
)


class Rows:
    """So many rows of each kind that are old enough."""

    def __init__(self, **rows: int) -> None:
        self.rows = rows
        self.asked: dict[str, timedelta] = {}
        self.batches: list[tuple[str, int]] = []

    async def forget_parts(self, state: str, age: timedelta, *, runs: int, limit: int) -> int:
        return self._take(f"parts_of_{state}", age, limit)

    async def forget_trees(self, state: str, age: timedelta, *, runs: int, limit: int) -> int:
        return self._take(f"below_{state}", age, limit)

    async def forget_runs(self, state: str, age: timedelta, *, limit: int) -> int:
        return self._take(state, age, limit)

    async def forget_skips(self, age: timedelta, *, limit: int) -> int:
        return self._take("skips", age, limit)

    async def forget_logs(self, age: timedelta, *, limit: int) -> int:
        return self._take("lines", age, limit)

    async def forget_starts(self, age: timedelta, *, limit: int) -> int:
        return self._take("keys", age, limit)

    async def forget_workers(self, age: timedelta) -> int:
        return self._take("workers", age, 100)

    async def forget_late(self, age: timedelta, *, limit: int) -> int:
        return 0

    async def forget_counters(self) -> int:
        return 0

    async def forget_shares(self) -> int:
        return 0

    def _take(self, kind: str, age: timedelta, limit: int) -> int:
        if not kind.startswith(("parts_of_", "below_")):
            self.asked[kind] = age
        taken = min(self.rows.get(kind, 0), limit)
        self.batches.append((kind, taken))
        self.rows[kind] = self.rows.get(kind, 0) - taken
        return taken


async def test_everything_old_enough_goes_in_batches_with_pauses_between(clock, emitted):
    store = Rows(succeeded=2 * BATCH + 1, failed=1, lines=PARTS)

    await tidied(store, clock)

    assert not any(store.rows.values())
    assert emitted[-1].event.name == "history.forgotten"
    assert emitted[-1].fields == {"runs": 2 * BATCH + 2, "skips": 0, "lines": PARTS, "keys": 0, "workers": 0}


async def test_what_goes_with_runs_goes_before_them_and_a_few_at_a_time(clock):
    store = Rows(succeeded=BATCH + 1, parts_of_succeeded=2 * PARTS + 1, below_succeeded=BATCH + 1)

    await tidied(store, clock)

    assert store.batches[:8] == [
        ("below_succeeded", BATCH),
        ("below_succeeded", 1),
        *[("parts_of_succeeded", PARTS)] * 2,
        ("parts_of_succeeded", 1),
        ("succeeded", BATCH),
        ("below_succeeded", 0),
        ("parts_of_succeeded", 0),
    ]


async def test_each_kind_is_kept_as_long_as_its_setting_says(clock, emitted):
    store = Rows()

    await tidied(store, clock)

    assert store.asked == {
        "succeeded": 30 * DAY,
        "failed": 90 * DAY,
        "skips": 7 * DAY,
        "lines": 14 * DAY,
        "keys": 5 * DAY,
        "workers": 7 * DAY,
    }
    assert emitted == []


def test_every_final_state_has_its_age_in_the_settings():
    settings = RetentionSettings(
        succeeded=1 * DAY, failed=2 * DAY, skipped=3 * DAY, logs=4 * DAY, start_keys=5 * DAY
    )

    ages = ages_of(settings)

    assert set(ages.runs) == set(FINAL_STATES)
    assert ages.runs == {
        "succeeded": 1 * DAY,
        "failed": 2 * DAY,
        "refused": 2 * DAY,
        "cancelled": 2 * DAY,
        "skipped": 3 * DAY,
    }
    assert (ages.skips, ages.logs, ages.start_keys) == (3 * DAY, 4 * DAY, 5 * DAY)


async def tidied(store: Rows, clock: ManualClock) -> None:
    task = asyncio.create_task(Retention(store, AGES, clock).tidy())
    while not task.done():
        await asyncio.sleep(0)
        clock.advance(1)
    task.result()
