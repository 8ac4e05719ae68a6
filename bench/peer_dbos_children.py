"""Runs one DBOS workflow with no-op child workflows, with the Python of a separate virtual environment.

    VENV/bin/python bench/peer_dbos_children.py URL CHILDREN     (pip install dbos 'psycopg[binary]')

Prints JSON: `started`, seconds until the parent has started its last child, `ended`, until it has all
results, `cpu`, processor seconds of the process. All run in one process, as many at once as DBOS lets.
"""

import asyncio
import json
import sys
import time

from dbos import DBOS


@DBOS.workflow()
async def child(number: int) -> int:
    return number


@DBOS.workflow()
async def tree(children: int) -> dict[str, float]:
    began, cpu = time.perf_counter(), time.process_time()
    handles = [await DBOS.start_workflow_async(child, number) for number in range(children)]
    started = time.perf_counter() - began
    results = [await handle.get_result() for handle in handles]
    if results != list(range(children)):
        raise SystemExit("a child's result is not in its place")
    ended = time.perf_counter() - began
    return {"started": started, "ended": ended, "cpu": time.process_time() - cpu}


async def main(url: str, children: int) -> None:
    DBOS(config={"name": "bench", "system_database_url": url, "log_level": "ERROR"})
    DBOS.launch()
    # A first one, so that connections and statements are there.
    await (await DBOS.start_workflow_async(tree, 5)).get_result()
    print(json.dumps(await (await DBOS.start_workflow_async(tree, children)).get_result()))
    DBOS.destroy()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
