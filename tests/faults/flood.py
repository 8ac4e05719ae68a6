"""A flood of idle and slow HTTP clients, as a process of its own: how old does each connection get?

Clients come from several addresses of 127.0.0.0/8. Some are silent, some send a byte of
their headers or body a second. Those that are closed come back, `again` a second at most.
The process ends by itself.

    python -m tests.faults.flood '{"port": 8470, "count": 5000, "sources": 50, "seconds": 20, "again": 100}'
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from typing import Any

KINDS = ("idle", "headers", "body")
HEADS = {
    "idle": b"",
    "headers": b"GET /livez HTTP/1.1\r\nhost: x\r\nx-slow: ",
    "body": b"POST /login HTTP/1.1\r\nhost: x\r\norigin: http://x\r\n"
    b"content-type: application/x-www-form-urlencoded\r\ncontent-length: 100000\r\n\r\ntoken=",
}
# Connections that are opened at a time, and seconds between two looks for those that are missing.
BATCH = 100
LOOK = 0.2


class Client(asyncio.Protocol):
    """One connection that keeps its server waiting."""

    def __init__(self, flood: Flood, kind: str) -> None:
        self.kind = kind
        self._flood = flood

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._opened_at = time.monotonic()
        self._flood.open.add(self)
        transport.write(HEADS[self.kind])

    def connection_lost(self, exc: Exception | None) -> None:
        self._flood.open.discard(self)
        self._flood.note_age(self)

    def drip(self) -> None:
        if self.kind != "idle":
            self.transport.write(b"x")

    @property
    def age(self) -> float:
        return time.monotonic() - self._opened_at


class Flood:
    """Keeps `count` clients at the server on `port` for so many seconds."""

    def __init__(self, *, port: int, count: int, sources: int, seconds: float, again: int) -> None:
        self._port = port
        self._count = count
        self._sources = sources
        self._seconds = seconds
        self._again = again
        self.open: set[Client] = set()
        self._oldest = dict.fromkeys(KINDS, 0.0)
        self._opened = self._failed = 0

    def note_age(self, client: Client) -> None:
        self._oldest[client.kind] = max(self._oldest[client.kind], client.age)

    async def run(self) -> dict[str, Any]:
        """Run it; connections opened and refused, still open, and the oldest of each kind, in seconds."""
        until = time.monotonic() + self._seconds
        dripping = asyncio.create_task(self._drip())
        tried = 0
        while time.monotonic() < until:
            # All of them once, then those that were closed.
            at_most = self._count - tried if tried < self._count else round(self._again * LOOK)
            missing = min(self._count - len(self.open), at_most)
            for start in range(0, missing, BATCH):
                batch = range(tried, tried + min(BATCH, missing - start))
                await asyncio.gather(*map(self._connect, batch))
                tried += len(batch)
            await asyncio.sleep(LOOK)
        dripping.cancel()
        still = list(self.open)
        for client in still:
            self.note_age(client)
            client.transport.abort()
        return {
            "opened": self._opened,
            "failed": self._failed,
            "still_open": len(still),
            "oldest": {kind: round(age, 2) for kind, age in self._oldest.items()},
        }

    async def _connect(self, number: int) -> None:
        kind = KINDS[number % len(KINDS)]
        # Each address has all kinds; none is the one that probes come from.
        at = number // len(KINDS) % self._sources
        source = f"127.0.{1 + at // 250}.{1 + at % 250}"
        try:
            async with asyncio.timeout(5):
                await asyncio.get_running_loop().create_connection(
                    lambda: Client(self, kind), "127.0.0.1", self._port, local_addr=(source, 0)
                )
            self._opened += 1
        except (OSError, TimeoutError):
            self._failed += 1

    async def _drip(self) -> None:
        while True:
            await asyncio.sleep(1)
            for client in list(self.open):
                client.drip()


if __name__ == "__main__":
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    given = json.loads(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, given["count"] + 200), hard))
    print(json.dumps(asyncio.run(Flood(**given).run())))
