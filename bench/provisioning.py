"""Measures and proves provisioning: orgs of a faulty provider, from nothing to a verified credential each.

    .venv/bin/python -m bench.provisioning [fill|kills|both] [--database sqlite|postgresql] [--orgs N]

`fill` takes over 10,000 orgs of a fake built from Kinde's OpenAPI document, which throttles, fails, is
slow and cuts responses off after it carried the request out. `kills` takes over 200 orgs and kills the
command at 200 random points. Afterwards there must be exactly one application for each org, verified,
with its secret sealed here, and no orphan. Exit 1 if anything is wrong, or if an org took more than five
requests and one for each scope.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bench.server import own_server
from tests.fakes.cli import Completed
from tests.fakes.kinde.faults import Script
from tests.fakes.provisioning import MAX_REQUESTS, Fleet, fleet
from worker.store import schema

SEED = 14


@contextlib.contextmanager
def database(dialect: str) -> Iterator[str]:
    """A migrated database; empty for an SQLite file."""
    if dialect == "sqlite":
        yield ""
        return
    with own_server() as server, server.new_database(server.template("migrated", schema.upgrade)) as url:
        yield url


def used() -> float:
    """Processor seconds of the commands so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def errors(calls: list[Completed]) -> Counter[str]:
    """Why orgs failed in one call, without their codes."""
    rows = [json.loads(line) for call in calls for line in call.out.splitlines()]
    texts = (row["error"] for row in rows if row.get("error"))
    return Counter(re.sub(r"org_\d+|[0-9a-f]{16,}", "…", text) for text in texts)


def judged(made: Fleet, before: int) -> list[str]:
    """Print the requests of an org; returns what is wrong."""
    each = (made.requests() - before) / len(made.codes)
    wrong = made.wrongs()
    print(f"  requests of an org, carried out: {each:.2f} of at most {MAX_REQUESTS}", flush=True)
    if each > MAX_REQUESTS:
        wrong.append(f"{each:.2f} requests of an org")
    orphans = made.run("orgs", "sync", "--orphans", "-o", "json", fork=False).checked("orphans").json()
    wrong += [f"an orphan: {row['name']}" for row in orphans]
    return wrong + made.undocumented()


def fill(orgs: int, dialect: str, concurrency: int) -> list[str]:
    """Take over many orgs of a faulty provider."""
    with (
        tempfile.TemporaryDirectory() as folder,
        database(dialect) as url,
        fleet(Path(folder), orgs, url, concurrency=concurrency) as made,
    ):
        made.kinde.script = Script(
            SEED, throttle=0.001, error=0.01, late_error=0.005, slow=0.01, cut=0.005, tokens=True
        )
        before, began, processor = made.requests(), time.monotonic(), used()
        calls = made.finish(timeout=7200, fork=False)
        took = time.monotonic() - began
        print(f"{orgs} orgs, {dialect}, load {os.getloadavg()[0]:.0f}: {took:.0f} s", flush=True)
        print(f"  calls: {len(calls)}, exit codes {[call.code for call in calls]}")
        for error, times in errors(calls).most_common(10):
            print(f"  {times} times: {error}")
        print(f"  processor time of the commands: {used() - processor:.0f} s")
        print(f"  faults: {dict(made.kinde.script.done)}")
        return judged(made, before)


def kills(orgs: int, count: int, dialect: str, seed: int, *, fork: bool) -> list[str]:
    """Take over some orgs with a command that is killed at random points; `fork` saves its imports."""
    with (
        tempfile.TemporaryDirectory() as folder,
        database(dialect) as url,
        # Two at a time: the kills are spread over all orgs, not only over the first few.
        fleet(Path(folder), orgs, url, concurrency=2) as made,
    ):
        made.kinde.script = Script(seed, error=0.01, late_error=0.01, cut=0.01, tokens=True)
        began = time.monotonic()
        done = made.kill_often(count, seed, fork=fork)
        left = orgs - len(made.stored())
        ends = Counter(made.calls)
        calls = made.finish(fork=fork)
        print(f"{orgs} orgs, {dialect}, killed at {done} random points: {time.monotonic() - began:.0f} s")
        print(f"  exit codes {dict(ends)}; {left} orgs were left, which took {len(calls)} more calls")
        wrong = made.wrongs()
        print(f"  requests of an org, restarts included: {made.requests() / orgs:.2f}", flush=True)
        orphans = made.run("orgs", "sync", "--orphans", "-o", "json", fork=False).checked("orphans").json()
        wrong += [f"an orphan: {row['name']}" for row in orphans]
        return wrong + ([] if done == count else [f"only {done} kills"])


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("what", nargs="?", choices=["fill", "kills", "both"], default="both")
    options.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    options.add_argument("--orgs", type=int, default=10_000, help="of fill")
    options.add_argument("--concurrency", type=int, default=8)
    options.add_argument("--kills", type=int, default=200, help="and as many orgs")
    options.add_argument("--seed", type=int, default=SEED, help="of the kills")
    options.add_argument("--forked", action="store_true", help="kill forks of one interpreter")
    given = options.parse_args()
    # Of requests that the fake cuts off.
    logging.disable(logging.CRITICAL)
    wrong: list[str] = []
    if given.what != "kills":
        wrong += fill(given.orgs, given.database, given.concurrency)
    if given.what != "fill":
        wrong += kills(given.kills, given.kills, given.database, given.seed, fork=given.forked)
    for text in wrong[:50]:
        print(f"WRONG {text}")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
