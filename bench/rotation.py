"""Measures and proves the rotation of a fleet under load, killed at random points.

    .venv/bin/python -m bench.rotation [--database sqlite|postgresql] [--orgs N] [--kills N] [--every SECONDS]
        [--rate N]

A worker runs two definitions of each of 1,000 orgs: a short run every `--every` seconds, and a longer one
that holds its token for twice as long. Meanwhile `credentials rotate` exchanges all credentials, and is
killed at 50 random points. Afterwards each org must have one application at the provider, a new one with
the same scopes and properties; no run may have failed, waited for its token for more than a second, or
used a token whose application was deleted. Exit 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
from pathlib import Path

from bench.provisioning import database
from tests.fakes.rotating import rotating

SEED = 14


def rotate(orgs: int, kills: int, dialect: str, every: int, rate: int) -> list[str]:
    """Rotate some orgs under load; prints numbers, and returns what is wrong."""
    with (
        tempfile.TemporaryDirectory() as folder,
        database(dialect) as url,
        rotating(Path(folder), orgs, url, every=every, rate=rate, fork=False) as made,
    ):
        print(f"{orgs} orgs have applications; load {os.getloadavg()[0]:.0f}", flush=True)
        made.warm_up(timeout=20 * every)
        before, began = made.fleet.requests(), time.monotonic()
        done = made.kill_often(kills, SEED, most=max(10, 8 * orgs // max(1, kills)), fork=False)
        killed_in = time.monotonic() - began
        calls = made.finish(timeout=7200, fork=False)
        took, each = time.monotonic() - began, (made.fleet.requests() - before) / orgs
        print(f"  {done} kills in {killed_in:.0f} s, then {calls} calls; {took:.0f} s in all")
        print(f"  requests of an org, workers and restarts included: {each:.2f}")
        time.sleep(2 * every)
        wrong = made.wrongs()
        for name, count in made.counts().items():
            print(f"  {name}: {count}", flush=True)
        orphans = made.fleet.run("orgs", "sync", "--orphans", "-o", "json", fork=False)
        wrong += [f"an orphan: {row['name']}" for row in orphans.checked("orphans").json()]
        return wrong + ([] if done == kills else [f"only {done} kills"])


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--database", choices=["sqlite", "postgresql"], default="postgresql")
    options.add_argument("--orgs", type=int, default=1000)
    options.add_argument("--kills", type=int, default=50)
    options.add_argument("--every", type=int, default=30, help="seconds between runs of a definition")
    options.add_argument("--rate", type=int, default=100, help="max_requests_per_second of the issuer")
    given = options.parse_args()
    # Of requests whose client is killed.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    wrong = rotate(given.orgs, given.kills, given.database, given.every, given.rate)
    for text in wrong[:50]:
        print(f"WRONG {text}")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
