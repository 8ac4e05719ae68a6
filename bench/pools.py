"""What runs that wait in another pool cost an admission.

    .venv/bin/python -m bench.pools [--database sqlite|postgresql] [--runs N] [--orgs N]

A third of the runs are the first org's. A worker whose pool has no run walks once around all orgs.
"""

from __future__ import annotations

import argparse
import time

from bench.admission import load, processor
from bench.filling import HANDLER, filled
from worker.clock import SystemClock
from worker.model.runs.run import Isolation
from worker.store.database import Database
from worker.store.ring_walk import RingWalk

CALLS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="postgresql")
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--orgs", type=int, default=100)
    given = parser.parse_args()
    free: dict[Isolation, int] = {"child": 0, "inline": 100}
    with filled(given.database) as made:
        made.add_orgs(given.orgs)
        made.add_waiting(given.runs)
        made.settle()
        database = Database.open(made.url, clock=SystemClock(), role="worker")
        walk = RingWalk(database, made.add_worker(), pools=("another",))
        try:
            walk.admit({HANDLER: None}, free)
            there, here, began = made.server_cpu(), processor(), time.perf_counter()
            for _ in range(CALLS):
                if walk.admit({HANDLER: None}, free):
                    raise SystemExit("a run of another pool was admitted")
            took = time.perf_counter() - began
            here, there = processor() - here, made.server_cpu() - there
        finally:
            database.close()
    per_call = [f"{1e3 * each / CALLS:.1f} ms" for each in (here, there, took)]
    print(
        f"{given.database}: {given.runs} runs of {given.orgs} orgs wait in another pool; an admission takes "
        f"{per_call[0]} of processor time here, {per_call[1]} there, {per_call[2]} in all; {load()}"
    )


if __name__ == "__main__":
    main()
