"""Runs Procrastinate's no-op jobs from a backlog, with the Python of a separate virtual environment.

    VENV/bin/python bench/peer_procrastinate.py URL JOBS     (pip install procrastinate psycopg[binary,pool])

Prints jobs a second. It fetches and ends each job by itself, keeps its row and its events, and
neither fences nor limits by org. Its worker is async; CONCURRENCY is where it was fastest on two cores.
"""

import asyncio
import logging
import sys
import time

from procrastinate import App, PsycopgConnector

BATCH = 1000
CONCURRENCY = 10


async def main(url: str, jobs: int) -> None:
    logging.disable(logging.WARNING)
    connector = PsycopgConnector(conninfo=url, min_size=4, max_size=CONCURRENCY)
    app = App(connector=connector)

    @app.task(name="noop")
    async def noop() -> None:
        pass

    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        for part in range(0, jobs, BATCH):
            await noop.configure().batch_defer_async(*[{} for _ in range(min(BATCH, jobs - part))])
        await connector.execute_query_async("ANALYZE")
        began = time.perf_counter()
        await app.run_worker_async(
            concurrency=CONCURRENCY, wait=False, listen_notify=False, install_signal_handlers=False
        )
        took = time.perf_counter() - began
        done = await connector.execute_query_one_async(
            "SELECT count(*) AS n FROM procrastinate_jobs WHERE status = 'succeeded'"
        )
    if done["n"] != jobs:
        raise SystemExit(f"{done['n']} of {jobs} jobs succeeded")
    print(f"{jobs / took:.0f}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
