"""`python -m tests.faults.short_lease … relay`: a relay whose claims hold for `LEASE` seconds."""

from __future__ import annotations

from functools import partialmethod

from worker.app import main
from worker.client import AsyncClient

LEASE, ROUND = 4.0, 1.0

if __name__ == "__main__":
    AsyncClient.relay = partialmethod(AsyncClient.relay, lease=LEASE, round=ROUND)  # type: ignore[assignment]
    main()
