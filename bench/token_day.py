"""Counts the token requests of a day: orgs that run hourly, tokens of an hour, workers that are restarted.

    .venv/bin/python -m bench.token_day [--orgs N] [--hours N] [--workers N]
        [--lifetime SECONDS] [--not-shared]

The clock is injected, the issuer a fake with real signatures, the store in memory; cache, renewal ahead of
time, sealing and verification are the worker's. A worker runs each org's hourly run, chosen at random; one
worker is replaced by a new one every half hour, so that each is restarted every two hours. Exit 1 if there
are more than 1.05 requests for each org and lifetime.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from time import perf_counter

from tests.fakes.clock import ManualClock
from tests.fakes.token_fleet import Fleet, opened
from worker.engine.attempt.plan import HandlerRegistry
from worker.engine.loops.token_renewal import TokenRenewal
from worker.handlers.catalogue import HandlerEntry
from worker.ids import DefinitionId
from worker.model.orgs import OrgRef, TokenWant
from worker.model.runs.run import Upcoming
from worker.tokens.cache import Tokens

MAX_REQUESTS = 1.05
AHEAD = timedelta(minutes=15)
# Seconds between two looks at the schedule, and until a run needs its token after a full hour, at most.
STEP = 10
LATE = 20
RESTART = 1800
SPEC = json.dumps({"handler": "acme.note", "schedule": "@hourly"})
SEED = 16


class Hourly:
    """Definitions that are due at each full hour; satisfies `UpcomingStore`."""

    def __init__(self, clock: ManualClock, orgs: Sequence[OrgRef], workers: int) -> None:
        self._clock = clock
        self._orgs = orgs
        self._workers = workers

    async def upcoming(
        self, after: tuple[datetime, DefinitionId] | None, ahead: timedelta, limit: int
    ) -> tuple[datetime, Sequence[Upcoming]]:
        now = self._clock.now()
        hour = now.replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)
        if hour > now + ahead:
            return now, []
        first = 0
        if after is not None and after[0] >= hour:
            first = int(after[1]) + 1
        page = self._orgs[first : first + limit]
        return now, [
            Upcoming(DefinitionId(f"{first + place:08}"), each.id, each.code, "main", hour, SPEC)
            for place, each in enumerate(page)
        ]

    async def live_workers(self) -> int:
        return self._workers


class Day:
    """The workers, and what they do in each step of time."""

    def __init__(self, fleet: Fleet, orgs: int, workers: int, *, lifetime: int, shared: bool) -> None:
        self.fleet = fleet
        self.clock = fleet.clock
        self.random = random.Random(SEED)  # noqa: S311
        self.shared = shared
        self.orgs = [fleet.add_org(number) for number in range(orgs)]
        for app in fleet.issuer.apps.values():
            app.lifetime = lifetime
        self.schedule = Hourly(self.clock, self.orgs, workers)
        self.workers = [self._worker() for _ in range(workers)]
        self.late: list[tuple[float, OrgRef]] = []

    def _worker(self) -> tuple[Tokens, TokenRenewal]:
        tokens = self.fleet.start(shared=self.shared)
        handlers = HandlerRegistry()
        handlers.add(HandlerEntry("acme.note", "acme", "1", "acme:note"))
        return tokens, TokenRenewal(self.schedule, tokens, handlers, self.clock, self.random, AHEAD)

    async def run(self, hours: int) -> int:
        """Let so many full hours pass; returns the requests."""
        self.clock.advance(self._seconds_to_hour() - AHEAD.total_seconds() - 60)
        end = self.clock.monotonic() + AHEAD.total_seconds() + 120 + (hours - 1) * 3600
        restart_at, number = self.clock.monotonic() + RESTART, 0
        while self.clock.monotonic() < end:
            if self.clock.monotonic() >= restart_at:
                restart_at += RESTART
                await self.workers[number % len(self.workers)][0].close()
                self.workers[number % len(self.workers)] = self._worker()
                number += 1
            if self.shared and self._seconds_to_hour() <= AHEAD.total_seconds() + STEP:
                for _, renewal in self.workers:
                    await self._finish(renewal.look())
                    await self._finish(renewal.work())
            before = self._seconds_to_hour()
            self.clock.advance(STEP)
            if self._seconds_to_hour() > before:
                await self._run_all()
        return self.fleet.issuer.count()

    async def _run_all(self) -> None:
        for start in range(0, len(self.orgs), 200):
            chosen = self.orgs[start : start + 200]
            runs = [self.random.choice(self.workers)[0].ensure(TokenWant(each, "main")) for each in chosen]
            await self._finish(asyncio.gather(*runs))

    async def _finish(self, work: object) -> None:
        """Await something that may wait for the clock."""
        task = asyncio.ensure_future(work)  # type: ignore[arg-type]
        while not task.done():
            await asyncio.sleep(0)
            if not task.done():
                await self.clock.pass_time(0.001)
        await task

    def _seconds_to_hour(self) -> float:
        now = self.clock.now()
        return 3600 - (now.minute * 60 + now.second + now.microsecond / 1e6)


async def count(orgs: int, hours: int, workers: int, *, lifetime: int = 3600, shared: bool = True) -> float:
    """The token requests for each org and lifetime."""
    with tempfile.TemporaryDirectory() as folder:
        async with opened(ManualClock(), Path(folder), rate=10_000.0) as fleet:
            day = Day(fleet, orgs, workers, lifetime=lifetime, shared=shared)
            return await day.run(hours) / (orgs * max(1.0, hours * 3600 / lifetime))


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--orgs", type=int, default=10_000)
    options.add_argument("--hours", type=int, default=24)
    options.add_argument("--workers", type=int, default=4)
    options.add_argument("--lifetime", type=int, default=3600, help="of a token, in seconds")
    options.add_argument("--not-shared", action="store_true", help="as without [tokens] shared, to compare")
    given = options.parse_args()
    began = perf_counter()
    each = asyncio.run(
        count(given.orgs, given.hours, given.workers, lifetime=given.lifetime, shared=not given.not_shared)
    )
    took = perf_counter() - began
    print(f"{given.orgs} orgs, {given.hours} hours, {given.workers} workers: {took:.0f} s")
    print(f"  token requests for each org and lifetime: {each:.3f}")
    raise SystemExit(0 if each <= MAX_REQUESTS else 1)


if __name__ == "__main__":
    main()
