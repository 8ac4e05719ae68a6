"""One worker's part of `bench.cold_tokens`: requests a token for each org, and prints what that took.

Imports only `worker`, which may be that of an older checkout. Reads its task as JSON from stdin.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

from worker.clock import SystemClock
from worker.guard.issuer import Issuer
from worker.guard.profile import load
from worker.ids import OrgId
from worker.model.orgs import OrgRef, TokenWant
from worker.outbound import open_client
from worker.store.database import Database
from worker.telemetry.events import listen
from worker.tokens.cache import Tokens
from worker.tokens.sealing import KeyRing
from worker.tokens.shared import SharedTokens
from worker.wiring.secrets import OpenedCredentials, StoredTokens

SCOPES = frozenset({"read:kb"})
HOLDER = "00000000-0000-7000-8000-000000000001"


def memory() -> int:
    """Bytes of resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def measure(task: dict[str, Any]) -> dict[str, float]:
    clock = SystemClock()
    database = Database.open(task["database"], clock=clock, role="bench", threads=4)
    issuer = Issuer("main", load("kinde"), task["url"], task["audience"], max_requests_per_second=10_000)
    ring = KeyRing.load(Path(task["keyring"]))
    source = OpenedCredentials(database, ring, "", clock)
    shared = SharedTokens(StoredTokens(database, HOLDER), source.ring, clock)
    orgs = [OrgRef(OrgId(id_), code) for id_, code in task["orgs"]]
    seen: list[str] = []
    listen(lambda emitted: seen.append(emitted.event.name))
    async with open_client() as client:
        tokens = Tokens({"main": issuer}, source, client=client, clock=clock, shared=shared)

        async def request(left: list[OrgRef]) -> None:
            while left:
                await tokens.ensure(TokenWant(left.pop(), "main", scopes=SCOPES))

        async def request_all(left: list[OrgRef]) -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(task["slots"]):
                    group.create_task(request(left))

        # Connections, threads and statements are there, as in a worker that works.
        first = len(orgs) // 5
        await request_all(orgs[:first])
        gc.collect()
        if task["trace"]:
            tracemalloc.start(12)
        resident, used, began = memory(), time.process_time(), time.perf_counter()
        await request_all(orgs[first:])
        used, took = time.process_time() - used, time.perf_counter() - began
        gc.collect()
        count = len(orgs) - first
        if task["trace"]:
            snapshot = tracemalloc.take_snapshot()
            for line in snapshot.statistics("lineno")[:30]:
                print(f"  {line.size / count:8.0f} B {line.traceback}", file=sys.stderr)
        found = {
            "processor": used / count,
            "seconds": took / count,
            "resident": (memory() - resident) / count,
            "traced": tracemalloc.get_traced_memory()[0] / count if task["trace"] else 0.0,
            "requested": sum(name == "token.requested" for name in seen) / len(orgs),
        }
        await tokens.close()
    database.close()
    return found


def main() -> None:
    task = json.load(sys.stdin)
    if task["profile"]:
        import cProfile

        profile = cProfile.Profile(time.process_time)
        found = profile.runcall(asyncio.run, measure(task))
        profile.dump_stats(task["profile"])
    else:
        found = asyncio.run(measure(task))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
