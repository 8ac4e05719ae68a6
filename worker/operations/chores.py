"""The chores that change definitions: templates, time zone data, pauses after failures, and backfills."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice

from worker.clock import to_text
from worker.engine.attempt.inflight import InflightRun
from worker.engine.loops.maintenance import LAST_CHORES, Ages, FailureWatch, Housekeeping
from worker.errors import Unavailable
from worker.ids import ALL_ORGS, DefinitionId
from worker.model.definitions.zones import zone_data_version
from worker.model.runs.outcome import EndedAttempt
from worker.model.runs.run import Recovered
from worker.operations import settle
from worker.operations.backfill import fill_backfills
from worker.operations.definitions import count_failures
from worker.operations.templates import materialise
from worker.settings.sections import RetentionSettings
from worker.store import access_tokens, deadlines, failing, orgs
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
    return Ages(runs=runs, skips=settings.skipped, logs=settings.logs, start_keys=settings.start_keys)


class Chores:
    """Each chore works in short transactions of its own. `on_runs` is called when runs wait."""

    def __init__(self, database: Database, *, on_runs: Callable[[], None]) -> None:
        self._database = database
        self._on_runs = on_runs
        self._failures = FailureWatch()
        self._backfill_waits = asyncio.Event()
        self._zone_data_checked = False
        # Definitions with a deadline that have done something, and how many were late at the last look.
        self._done: set[DefinitionId] = set()
        self._late = 0

    def add_to(self, housekeeping: Housekeeping) -> None:
        """Schedule all chores as one job: a tick costs more than a look."""
        housekeeping.every(EVERY, "schedules", self._look)
        housekeeping.every(FORGET, "failures.forget", self._forget)
        housekeeping.every(FORGET, "orgs.words", self.words)
        housekeeping.every(FORGET, "tokens.expired", self._drop_expired)

    def ended(self, ended: EndedAttempt, held: InflightRun | None) -> None:
        """Record the end of an attempt after it is written."""
        self._failures.ended(ended, held)
        plan = None if held is None else held.plan
        if plan is not None and plan.definition.has_deadline and ended.state in ("succeeded", "skipped"):
            self._done.add(ended.definition_id)
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
        await self.end_done(self._done)
        found = await self._database.call_autocommit(pending)
        if found.backfills:
            self._backfill_waits.set()
        if found.templates:
            while (done := await self._database.run(materialise, self._database)).orgs:
                for name, reached, total in done.progress:
                    emit("template.progress", template=name, done=reached, total=total)
        if found.deadlines:
            await self.pass_deadlines()
        if found.late != self._late:
            self._late = found.late
            emit("late.counted", definitions=found.late)
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

    async def pass_deadlines(self) -> None:
        """Report the definitions that have become late."""
        more = True
        while more:
            late, more = await self._database.call(deadlines.pass_due)
            for each in late:
                emit(
                    "schedule.late",
                    org=each.org,
                    definition=each.definition,
                    newest_run=each.run,
                    scheduled_for=to_text(each.scheduled_for),
                    late_at=to_text(each.deadline_at),
                    why=each.why,
                )

    async def end_done(self, done: set[DefinitionId]) -> None:
        """Drop what definitions have done, and report those that were late; takes them from the set."""
        while done:
            some = list(islice(done, deadlines.BATCH))
            # Taken first: one that is done again meanwhile is looked at again.
            done.difference_update(some)
            try:
                ended = await self._database.call(deadlines.end_done, some)
            except Unavailable:
                done.update(some)
                raise
            for each in ended:
                emit("schedule.done", org=each.org, definition=each.definition)

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
        more = True
        while more:
            filling = asyncio.ensure_future(self._fill_some())
            try:
                more = await asyncio.shield(filling)
            except asyncio.CancelledError:
                # By a drain: nothing else would report a backfill that is stored as ended now.
                await asyncio.wait({filling}, timeout=LAST_CHORES)
                raise

    async def _fill_some(self) -> bool:
        """Make the next runs of backfills, and report those that have ended; returns whether it made any."""
        filled = await self._database.run(fill_backfills, self._database)
        for row in filled.ended:
            emit("backfill.ended", org=row["org"], definition=row["definition"], instants=row["instants"])
        if filled.runs:
            self._on_runs()
        return filled.runs > 0

    async def _forget(self) -> None:
        self._failures.forget_sound()
        await self.check_late()
        after = None
        while True:
            checked = await self._database.call_autocommit(failing.check, after)
            if checked.sound:
                await self._database.call(failing.remove, checked.sound)
            if checked.next is None:
                return
            after = checked.next

    async def check_late(self) -> None:
        """Find what is done of what was late: a worker may have died between a success and its look."""
        after = None
        while True:
            checked = await self._database.call_autocommit(deadlines.check, after)
            await self.end_done(set(checked.done))
            if checked.next is None:
                return
            after = checked.next
