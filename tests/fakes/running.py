"""Input of a runner: work with fake claims."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from worker.clock import SystemClock
from worker.engine.runners.child.pool import ChildPool
from worker.engine.runners.contract import Work
from worker.guard.claims import Claims, Flag
from worker.ids import RunId
from worker.secret import AccessToken

MODULE = "process_jobs"
NOW = datetime(2030, 1, 1, 3, tzinfo=UTC)


def claims(**properties: Any) -> Claims:
    """Claims of org_acme with these properties and the flag agent-v2 on."""
    return Claims(
        org_code="org_acme",
        client_id="client",
        scopes=frozenset({"read:kb"}),
        properties=properties,
        flags={"agent-v2": Flag("boolean", True)},
        issued_at=datetime.now(UTC),
        expires_at=datetime.now(UTC) + timedelta(hours=1),
    )


def token(text: str = "token-one", life: timedelta = timedelta(hours=1)) -> AccessToken:
    """A token that expires `life` from now."""
    return AccessToken(text, datetime.now(UTC) + life)


def work(handler: str, **fields: Any) -> Work:
    """The first attempt of a run of this handler of `process_jobs`."""
    given: dict[str, Any] = {
        "run_id": RunId("01234567-89ab-7def-8123-456789abcdef"),
        "attempt": 1,
        "fencing_token": 7,
        "idempotency_key": "key-1",
        "scheduled_for": NOW,
        "org_code": "org_acme",
        "org_name": "Acme",
        "handler": handler,
        "entry_point": f"{MODULE}:{handler}",
        "params": {},
        "claims": claims(),
        "token": token(),
        "api_origins": (),
        "timeout_at": NOW + timedelta(hours=1),
    }
    return Work(**given | fields)


@asynccontextmanager
async def child_pool(*, attached: bool = False, **settings: Any) -> AsyncIterator[ChildPool]:
    """A pool of children that has started."""
    pool = ChildPool(SystemClock(), **settings)
    pool.start()
    if attached:
        pool.attach()
    try:
        yield pool
    finally:
        await pool.close()


async def until(condition: Callable[[], Any], *, within: float = 20.0) -> Any:
    """Wait until the condition holds, and return its result."""
    async with asyncio.timeout(within):
        while not (found := condition()):  # noqa: ASYNC110 - of other processes, which set no event
            await asyncio.sleep(0.01)
    return found


def sizes(folder: Path) -> dict[str, int]:
    """The size of each file, to see which processes still write."""
    return {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
