"""Runs PgQueuer's no-op jobs from a backlog, with the Python of a separate virtual environment.

    VENV/bin/python bench/peer_pgqueuer.py URL JOBS     (pip install pgqueuer asyncpg)

Prints jobs a second. It keeps a log row a job, and neither fences nor limits by org.
"""

import asyncio
import sys
import time

import asyncpg
from pgqueuer import QueueManager
from pgqueuer.db import AsyncpgDriver
from pgqueuer.queries import Queries
from pgqueuer.types import QueueExecutionMode

BATCH = 100


async def main(url: str, jobs: int) -> None:
    connection = await asyncpg.connect(url)
    queries = Queries(AsyncpgDriver(connection))
    await queries.install()
    for _ in range(0, jobs, 1000):
        await queries.enqueue(["noop"] * 1000, [None] * 1000, [0] * 1000)
    await connection.execute("VACUUM ANALYZE")
    manager = QueueManager(Queries(AsyncpgDriver(connection)))

    @manager.entrypoint("noop")
    async def noop(job: object) -> None:
        pass

    began = time.perf_counter()
    await manager.run(batch_size=BATCH, mode=QueueExecutionMode.drain)
    print(f"{jobs / (time.perf_counter() - began):.0f}")
    await connection.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
