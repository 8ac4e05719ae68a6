"""Measures APScheduler's SQLAlchemyJobStore as `bench.schedules` does, in a separate process; prints JSON.

    .venv/bin/python -m bench.apscheduler_peer URL idle|busy --stored N --seconds S --period P

`idle` stores N jobs that are far from due; `busy` N jobs each due every P seconds, spread evenly.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import pickle
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

from apscheduler.events import EVENT_JOB_EXECUTED
from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.interval import IntervalTrigger
from sqlalchemy import insert

BATCH = 10_000


async def nothing() -> None:
    """The job."""


def scheduler_on(url: str) -> tuple[AsyncIOScheduler, SQLAlchemyJobStore]:
    store = SQLAlchemyJobStore(url=url.replace("postgresql://", "postgresql+psycopg://"))
    return AsyncIOScheduler(timezone="UTC", jobstores={"default": store}), store


def rows(scheduler: AsyncIOScheduler, count: int, first: datetime, period: float) -> Iterator[dict[str, Any]]:
    """Rows as the store would write them; it uses one transaction for each, which would take hours."""
    for number in range(count):
        at = first + timedelta(seconds=period * number / count)
        job = scheduler.add_job(
            "bench.apscheduler_peer:nothing",
            IntervalTrigger(seconds=int(period), start_date=at, timezone=UTC),
            id=f"job-{number}",
            misfire_grace_time=None,
            coalesce=True,
            max_instances=1,
            executor="default",
        )
        scheduler._pending_jobs.clear()
        job._modify(next_run_time=at)
        yield {
            "id": job.id,
            "next_run_time": at.timestamp(),
            "job_state": pickle.dumps(job.__getstate__(), pickle.HIGHEST_PROTOCOL),
        }


def store_jobs(url: str, count: int, first: datetime, period: float) -> None:
    scheduler, store = scheduler_on(url)
    store.start(scheduler, "default")
    found = rows(scheduler, count, first, period)
    with store.engine.begin() as connection:
        while batch := list(islice(found, BATCH)):
            connection.execute(insert(store.jobs_t), batch)
    store.shutdown()


async def measure(url: str, seconds: float, warm_up: float) -> None:
    """Start on the stored jobs, measure for `seconds`, print the result; lateness in milliseconds."""
    late: list[tuple[float, float]] = []
    scheduler, _ = scheduler_on(url)

    def executed(event: Any) -> None:
        now = datetime.now(UTC)
        late.append((time.monotonic(), (now - event.scheduled_run_time).total_seconds() * 1000))

    scheduler.add_listener(executed, EVENT_JOB_EXECUTED)
    began = time.monotonic()
    scheduler.start()
    await asyncio.sleep(0.05)
    ready = time.monotonic() - began
    await asyncio.sleep(warm_up)
    cpu, watched = time.process_time(), time.monotonic()
    await asyncio.sleep(seconds)
    used = (time.process_time() - cpu) / (time.monotonic() - watched)
    counted = sorted(ms for at, ms in late if at >= watched)
    some = counted[:: max(1, len(counted) // 1000)]
    print(json.dumps({"ready": ready, "core": used, "runs": len(counted), "late": some}), flush=True)
    # Jobs that it started would run for long.
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("what", choices=("idle", "busy"))
    parser.add_argument("--stored", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--period", type=float, required=True)
    given = parser.parse_args()
    ahead = timedelta(days=30) if given.what == "idle" else timedelta(seconds=5)
    store_jobs(given.url, given.stored, datetime.now(UTC) + ahead, given.period)
    warm_up = 1.0 if given.what == "idle" else 5.0 + given.period
    logging.disable()
    asyncio.run(measure(given.url, given.seconds, warm_up))


if __name__ == "__main__":
    main()
