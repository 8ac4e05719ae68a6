"""Runs DBOS workflows of no-op steps, with the Python of a separate virtual environment.

    VENV/bin/python bench/peer_dbos.py URL WORKFLOWS STEPS     (pip install dbos 'psycopg[binary]')

Prints JSON: steps a second, and the seconds of each step. All workflows run at once in one process.
"""

import asyncio
import json
import sys
import time

from dbos import DBOS

TOOK: list[float] = []


@DBOS.step()
async def nothing() -> None:
    return None


@DBOS.workflow()
async def stepwise(steps: int) -> None:
    for _ in range(steps):
        at = time.perf_counter()
        await nothing()
        TOOK.append(time.perf_counter() - at)


async def main(url: str, workflows: int, steps: int) -> None:
    DBOS(config={"name": "bench", "system_database_url": url, "log_level": "ERROR"})
    DBOS.launch()
    # A first one, so that connections and statements are there.
    await (await DBOS.start_workflow_async(stepwise, 5)).get_result()
    TOOK.clear()
    began = time.perf_counter()
    handles = [await DBOS.start_workflow_async(stepwise, steps) for _ in range(workflows)]
    await asyncio.gather(*(handle.get_result() for handle in handles))
    rate = workflows * steps / (time.perf_counter() - began)
    print(json.dumps({"rate": rate, "took": TOOK}))
    DBOS.destroy()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
