"""Measures what 20 rollouts over 10,000 orgs cost an admission and the start of a run.

    .venv/bin/python -m bench.rollout_starts [--database sqlite|postgresql] [--orgs N] [--rounds N]

Batches of 100 runs take turns: one whose definitions have no rollout, then one whose have. Both are
admitted, started and ended in the same database, which has the rollouts all the time; only ratios of one
call travel to another machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict

from bench.admission import end, load, spread
from bench.filling import HANDLER, Filled, filled
from worker.clock import SystemClock
from worker.ids import WorkerId
from worker.model.rollouts.rollout import RolloutBook, VersionAsk
from worker.model.runs.run import AdmittedRun, Isolation
from worker.store import rollouts
from worker.store.database import Database
from worker.store.ring_walk import RingWalk
from worker.store.sql import statements

ROLLOUTS, BATCH, WARM = 20, 100, 4
TAGS = json.dumps(["pro"])


def add_rollouts(made: Filled) -> RolloutBook:
    """Rollouts that run, each of other definitions: `digest-0`, …"""
    book = RolloutBook()
    with made.database.transaction() as connection:
        at = made.database.now(connection)
        for number in range(ROLLOUTS):
            values = {
                "definitions": f"digest-{number}",
                "from_handler": HANDLER,
                "to_handler": f"{HANDLER}_2",
                "orgs": {"tags": ["pro"]},
                "flag": None,
                "steps": ["50%", "100%"],
                "auto": False,
                "watch": {"failed": "+2 points"},
            }
            rollouts.put(connection, f"rollout-{number}", values, None, at=at, actor="bench")
        for row in rollouts.every(connection).values():
            began = {"state": "running", "step": 1, "began_at": at, "step_began_at": at}
            rollouts.change(connection, row["id"], began)
        book.take(rollouts.known(connection))
    return book


def start(database: Database, book: RolloutBook, runs: list[AdmittedRun], *, rolled: bool) -> None:
    """What an attempt does for its version: find the rollout of its definition, and keep the version."""
    asked = []
    for number, run in enumerate(runs):
        name = f"digest-{number % ROLLOUTS}" if rolled else "nightly"
        rollout = book.find(name, run.handler, tags_json=TAGS, issuer="main")
        if rollout is not None:
            given = run.id, run.fencing_token, run.attempt, run.origin, run.org_id, rollout.id, True, None
            asked.append(VersionAsk(*given))
    if asked:
        with database.transaction() as connection:
            kept = rollouts.keep_versions(connection, asked)
        if len(kept) != len(runs):
            raise SystemExit(f"{len(runs) - len(kept)} runs got no version")


def measure(made: Filled, worker_id: WorkerId, rounds: int) -> None:
    book, free = add_rollouts(made), dict[Isolation, int](child=0, inline=BATCH)
    database = Database.open(made.url, clock=SystemClock(), role="worker")
    admission = RingWalk(database, worker_id)
    took: dict[tuple[str, bool], list[float]] = defaultdict(list)
    for number in range(2 * (rounds + WARM)):
        rolled = bool(number % 2)
        marks, used = [time.perf_counter()], [time.process_time()]
        runs = admission.admit({HANDLER: None}, free)
        marks.append(time.perf_counter())
        start(database, book, runs, rolled=rolled)
        marks.append(time.perf_counter())
        used.append(time.process_time())
        with database.transaction() as connection:
            accepted = statements(connection).finish(
                connection, worker_id, [end(run, again=False) for run in runs]
            )
        if not len(accepted) == len(runs) == BATCH:
            raise SystemExit(f"{len(accepted)} of {BATCH} runs ended")
        if number >= 2 * WARM:
            took["admit", rolled].append(marks[1] - marks[0])
            took["start", rolled].append(marks[2] - marks[1])
            took["both, processor", rolled].append(used[1] - used[0])
            took["all", rolled].append(time.perf_counter() - marks[0])
    for what in ("admit", "start", "both, processor", "all"):
        plain, rolled_out = took[what, False], took[what, True]
        more = statistics.median(rolled_out) - statistics.median(plain)
        print(
            f"{what} of {BATCH}: without {spread(plain)}, with {spread(rolled_out)}; "
            f"{1e6 * more / BATCH:+.0f} us a run; {load()}",
            flush=True,
        )
    database.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="postgresql")
    parser.add_argument("--orgs", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=40)
    given = parser.parse_args()
    with filled(given.database) as made:
        made.add_orgs(given.orgs)
        made.add_waiting(2 * BATCH * (given.rounds + WARM))
        made.settle()
        measure(made, made.add_worker(), given.rounds)


if __name__ == "__main__":
    main()
