"""The chores that change definitions: templates, time zone data, pauses after failures, and backfills."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from worker.engine.attempt.inflight import InflightRun
from worker.engine.loops.maintenance import Ages, FailureWatch, Housekeeping
from worker.errors import Unavailable
from worker.ids import ALL_ORGS
from worker.model.definitions.zones import zone_data_version
from worker.model.runs.outcome import EndedAttempt
from worker.model.runs.run import Recovered
from worker.operations import settle
from worker.operations.backfill import fill_backfills
from worker.operations.definitions import count_failures
from worker.operations.templates import materialise
from worker.settings.sections import RetentionSettings
from worker.store import access_tokens, failing, orgs
from worker.store.database import Database
from worker.store.sweeps import pending
from worker.telemetry.events import emit

# Seconds between two looks; a new org has the definitions of its templates after at most two looks.
EVERY = 2.0
# Seconds after which a success here makes failures on other workers count again, and between two searches for
# orgs without words.
FORGET = 60.0


def ages_of(settings: RetentionSettings) -> Ages:
    """The retention settings by run state."""
    failed = settings.failed
    runs = {
        "succeeded": settings.succeeded,
        "failed": failed,
        "refused": failed,
        "cancelled": failed,
        "skipped": settings.skipped,
    }
    return Ages(runs=runs, skips=settings.skipped, logs=settings.logs)


class Chores:
    """Each chore works in short transactions of its own. `on_runs` is called when runs wait."""

    def __init__(self, database: Database, *, on_runs: Callable[[], None]) -> None:
        self._database = database
        self._on_runs = on_runs
        self._failures = FailureWatch()
        self._backfill_waits = asyncio.Event()
        self._zone_data_checked = False

    def add_to(self, housekeeping: Housekeeping) -> None:
        """Schedule all chores as one job: a tick costs more than a look."""
        housekeeping.every(EVERY, "schedules", self._look)
        housekeeping.every(FORGET, "failures.forget", self._forget)
        housekeeping.every(FORGET, "orgs.words", self.words)
        housekeeping.every(FORGET, "tokens.expired", self._drop_expired)

    def ended(self, ended: EndedAttempt, held: InflightRun | None) -> None:
        """Record the end of an attempt after it is written."""
        self._failures.ended(ended, held)
        if held is not None and held.run.origin == "backfill":
            self._backfill_waits.set()

    def recovered(self, recovered: Sequence[Recovered]) -> None:
        """Record runs taken over from a dead worker; they wait again."""
        self._failures.recovered(recovered)
        self._on_runs()

    async def backfills(self) -> None:
        """Continue backfills whenever a run of one has ended or a look finds one. Ends by cancellation."""
        while True:
            await self._backfill_waits.wait()
            self._backfill_waits.clear()
            # After an outage of the database the next look starts it again.
            with suppress(Unavailable):
                await self._fill()

    async def words(self) -> None:
        """Let the search find the orgs that a worker of an older release added or renamed."""
        after = None
        while found := await self._database.call_autocommit(orgs.without_words, ALL_ORGS, after):
            await self._database.call(orgs.add_words, found)
            after = found[-1]

    async def _drop_expired(self) -> None:
        """Delete shared tokens that have expired."""
        while await self._database.call(access_tokens.drop_expired, ALL_ORGS) == access_tokens.BATCH:
            pass

    async def _look(self) -> None:
        await self._count_failures()
        found = await self._database.call_autocommit(pending)
        if found.backfills:
            self._backfill_waits.set()
        if found.templates:
            while (done := await self._database.run(materialise, self._database)).orgs:
                for name, reached, total in done.progress:
                    emit("template.progress", template=name, done=reached, total=total)
        if not self._zone_data_checked:
            await self._check_zone_data()

    async def _count_failures(self) -> None:
        """Count the consecutive failures of definitions whose runs ended; pause those with too many."""
        taken = self._failures.take()
        while taken:
            org_id, definition_id = key = taken[-1]
            try:
                failures = await self._database.run(count_failures, self._database, org_id, definition_id)
            except Unavailable:
                self._failures.put_back(taken)
                raise
            if failures is not None:
                self._failures.counted(key, failures)
            taken.pop()

    async def _check_zone_data(self) -> None:
        """Once after the start: recompute the schedules if the time zone data has changed."""
        version, run = zone_data_version(), self._database.run
        if await run(settle.outdated, self._database, version):
            page, moved = await run(settle.recompute, self._database), 0
            while page.after is not None:
                moved += page.moved
                page = await run(settle.recompute, self._database, after=page.after)
            await run(settle.recomputed, self._database, version, moved=moved + page.moved)
        self._zone_data_checked = True

    async def _fill(self) -> None:
        runs = True
        while runs:
            filled = await self._database.run(fill_backfills, self._database)
            runs = filled.runs > 0
            for row in filled.ended:
                emit("backfill.ended", org=row["org"], definition=row["definition"], instants=row["instants"])
            if runs:
                self._on_runs()

    async def _forget(self) -> None:
        self._failures.forget_sound()
        after = None
        while True:
            checked = await self._database.call_autocommit(failing.check, after)
            if checked.sound:
                await self._database.call(failing.remove, checked.sound)
            if checked.next is None:
                return
            after = checked.next
