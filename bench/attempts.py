"""Measures what an inline no-op run costs the worker's loop, without a database.

    .venv/bin/python -m bench.attempts [--runs N] [--orgs N] [--apart SECONDS] [--profile FILE]

With --orgs 10000 --apart 10 each round is an instant at which other orgs' runs are due, long after the last.

From the answer of an admission to the end that would be written: the token from the cache,
enforced, gates, the handler in a task of its own, events counted as Prometheus metrics. Prints
the least processor time of several rounds, and what the same machine takes for a dictionary of
twenty entries, since the time alone says little on a shared machine.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import json
import statistics
import sys
import time
import types
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

from tests.fakes.issuer import App, FakeCredentials, FakeIssuer, kinde_issuer
from worker.clock import SystemClock
from worker.engine.attempt.attempt import attempt
from worker.engine.attempt.inflight import InflightRuns
from worker.engine.attempt.plan import HandlerRegistry, Plans, Revision
from worker.engine.attempt.run_log import RunLogWriter
from worker.engine.attempt.tools import Tools
from worker.engine.loops.dispatcher import Dispatcher
from worker.engine.runners.inline import Inline
from worker.handlers.catalogue import HandlerEntry
from worker.handlers.context import Context
from worker.handlers.job import job
from worker.ids import DefinitionId, OrgId, RunId, new_id
from worker.model.orgs import OrgRef
from worker.model.runs.outcome import EndedAttempt
from worker.model.runs.run import AdmittedRun, RunContext
from worker.telemetry import events, logs
from worker.telemetry.metrics import Metrics
from worker.tokens.cache import Tokens

ROUNDS = 8
BATCH = 500
SPEC = {"handler": "bench.inline", "schedule": "every 1h", "isolation": "inline"}


@job("bench.inline", isolation="inline")
async def inline(ctx: Context[Any, Any]) -> None:
    """A handler that does nothing."""


class Store:
    """Responds at once, and stores nothing."""

    def __init__(self, orgs: Sequence[OrgRef]) -> None:
        self._contexts = {
            DefinitionId(f"definition of {org.code}"): RunContext(
                org.id, org.code, org.code, None, "main", "noop", json.dumps(SPEC)
            )
            for org in orgs
        }

    async def finish(self, ended: Sequence[EndedAttempt]) -> set[RunId]:
        return {attempt.run_id for attempt in ended}

    async def org_and_definition(self, run: AdmittedRun) -> RunContext:
        return self._contexts[run.definition_id]

    async def orgs_and_definitions(self, wanted: Sequence[Revision]) -> Mapping[Revision, RunContext]:
        return {key: self._contexts[key[0]] for key in wanted}

    def is_limited(self, org_id: OrgId) -> bool:
        return False

    @property
    def limits_in_claims(self) -> bool:
        return False


class Ended:
    """Counts outcomes, which must be successes."""

    def __init__(self) -> None:
        self._count = self._wanted = 0
        self._there = asyncio.Event()

    def take(self, attempt: EndedAttempt) -> None:
        if attempt.state != "succeeded":
            raise SystemExit(f"a run did not succeed: {attempt}")
        self._count += 1
        if self._count == self._wanted:
            self._there.set()

    async def are(self, more: int) -> None:
        """Wait until `count` more have ended since the last call."""
        self._wanted += more
        if self._count < self._wanted:
            self._there.clear()
            await self._there.wait()


def admitted(org: OrgRef, clock: SystemClock) -> AdmittedRun:
    """A run as an admission returns it."""
    at = clock.now()
    return AdmittedRun(
        id=RunId(new_id()),
        org_id=org.id,
        definition_id=DefinitionId(f"definition of {org.code}"),
        revision=1,
        handler="bench.inline",
        isolation="inline",
        origin="schedule",
        scheduled_for=at,
        available_at=at,
        start_by=None,
        started_at=at,
        attempt=1,
        failures=0,
        recoveries=0,
        fencing_token=1,
        idempotency_key="key",
        params=None,
    )


class Hours(SystemClock):
    """The machine's clocks, later by `passed` seconds."""

    passed = 0.0

    def now(self) -> datetime:
        return super().now() + timedelta(seconds=self.passed)

    def monotonic(self) -> float:
        return super().monotonic() + self.passed


async def measure(runs: int, count: int, apart: float, profile: cProfile.Profile | None) -> list[float]:
    """Processor seconds per run, for each round."""
    clock, loop = Hours(), asyncio.get_running_loop()
    orgs = [OrgRef(OrgId(new_id()), f"org_{number}") for number in range(count)]
    issuer, credentials = FakeIssuer(clock), FakeCredentials()  # type: ignore[arg-type]
    for org in orgs:
        issuer.add(App(org.code, f"client of {org.code}", "secret"))
        credentials.add(org, f"client of {org.code}", "secret")
    handlers = HandlerRegistry(frozenset({"bench"}))
    entry_point = f"{__name__}_handlers:inline"
    handlers.add(HandlerEntry("bench.inline", "bench", "1", entry_point, isolation="inline"))
    store = Store(orgs)
    async with issuer.client() as client:
        tokens = Tokens(
            {"main": kinde_issuer(max_requests_per_second=1e4)}, credentials, client=client, clock=clock
        )
        tools = Tools(
            plans=Plans(store, clock, api_origins={"main": ()}),
            tokens=tokens,
            handlers=handlers,
            runners={"inline": Inline(clock)},
            store=store,  # type: ignore[arg-type]
            steps=store,  # type: ignore[arg-type]
            run_log=RunLogWriter(store, clock),  # type: ignore[arg-type]
            clock=clock,
            random=Random(1),  # noqa: S311
        )
        ended = Ended()
        dispatcher = Dispatcher(
            tools,
            attempt,
            InflightRuns(),
            store,
            on_free=lambda: None,
            on_end=lambda attempt, held: ended.take(attempt),
        )
        writing = loop.create_task(dispatcher.finisher.run())
        try:
            dispatcher.start([admitted(org, clock) for org in orgs])  # fetches the tokens
            await ended.are(len(orgs))
            rounds = []
            for _ in range(ROUNDS):
                clock.passed += apart
                rounds.append(await _round(dispatcher, orgs, clock, ended, runs, profile))
        finally:
            writing.cancel()
            await tokens.close()
    return rounds


async def _round(
    dispatcher: Dispatcher[Tools],
    orgs: Sequence[OrgRef],
    clock: SystemClock,
    ended: Ended,
    runs: int,
    profile: cProfile.Profile | None,
) -> float:
    used = 0.0
    for part in range(runs // BATCH):
        batch = [admitted(orgs[(part * BATCH + number) % len(orgs)], clock) for number in range(BATCH)]
        if profile is not None:
            profile.enable()
        before = time.thread_time()
        dispatcher.start(batch)
        await ended.are(BATCH)
        used += time.thread_time() - before
        if profile is not None:
            profile.disable()
    return used / (runs // BATCH * BATCH)


def yardstick() -> float:
    """Processor seconds for a dictionary of twenty entries, the minimum of many."""
    keys = [f"key {number}" for number in range(20)]
    least = []
    for _ in range(50):
        before = time.thread_time()
        for _ in range(1000):
            dict(zip(keys, keys, strict=True))
        least.append((time.thread_time() - before) / 1000)
    return min(least)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=5_000, help="in each round")
    parser.add_argument("--orgs", type=int, default=100)
    parser.add_argument("--apart", type=float, default=0.0, metavar="SECONDS", help="between two rounds")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="cProfile's output of all rounds")
    given = parser.parse_args()
    logs.configure("json", level="warning")
    events.listen(Metrics(version="bench").take)
    module = types.ModuleType(f"{__name__}_handlers")
    module.__dict__["inline"] = inline
    sys.modules[module.__name__] = module
    # As in a worker.
    gc.freeze()
    gc.set_threshold(20_000, 100, 50)
    profile = None if given.profile is None else cProfile.Profile()
    rounds = asyncio.run(measure(given.runs, given.orgs, given.apart, profile))
    if profile is not None:
        profile.dump_stats(given.profile)
    unit = yardstick()
    print(
        f"Python {sys.version.split()[0]}: {1e6 * min(rounds):.1f} us a run"
        f" (median {1e6 * statistics.median(rounds):.1f}), {min(rounds) / unit:.0f} dictionaries of"
        f" {1e6 * unit:.2f} us"
    )


if __name__ == "__main__":
    main()
