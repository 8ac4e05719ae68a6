"""Measures what parked runs cost, and how soon an answer resumes one, by real workers.

    .venv/bin/python -m bench.parked [--database sqlite|postgresql] [--runs N]
        [--rate N] [--child-rate N] [--seconds N]

N runs wait for an answer. First with none of them, then with all of them: the processes of the
worker, its memory, and the time from making a run until it is admitted. Then five callers
answer runs that go on inline, and runs that go on in processes: from the answer until the
handler of the next attempt is called, by the database's clock and the worker's.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import threading
import time
from datetime import datetime

import psutil
from sqlalchemy import insert, select, text, update

from bench.installation import Installation, Workers, installation
from worker.ids import OrgId, RunId
from worker.operations.answers import answer
from worker.store import tables
from worker.store.dialect import hint

ORGS = 100
CALLERS = 5
# Runs whose admission is timed, one after the other.
TIMED = 50
PART = 5_000


def park(made: Installation, runs: int, handler: str, isolation: str) -> list[RunId]:
    """Make runs that wait for an answer, as their first attempt left them; returns their ids."""
    before = unfinished(made)
    made.add_backlog(runs, handler, isolation)
    orgs = {id_: org for id_, org in unfinished(made).items() if id_ not in before}
    ids, live = sorted(orgs), tables.live_runs
    for start in range(0, runs, PART):
        part = ids[start : start + PART]
        with made.database.transaction() as connection:
            at = made.database.now(connection)
            connection.execute(
                update(live)
                .where(live.c.id.in_(part))
                .values(
                    state="parked",
                    reason="answer",
                    detail="approval",
                    attempt=1,
                    fencing_token=1,
                    available_at=tables.NEVER,
                )
            )
            asked = {"name": "approval", "occurrence": 1, "kind": "answer", "opened_at": at}
            rows = [{"run_id": id_, "org_id": orgs[id_], "pending_attempt": 1} | asked for id_ in part]
            connection.execute(insert(tables.waits), rows)
    if made.database.dialect == "postgresql":
        with made.database.autocommit() as connection:
            connection.execute(text("VACUUM ANALYZE"))
    return ids


def unfinished(made: Installation) -> dict[RunId, OrgId]:
    live = tables.live_runs
    with made.database.autocommit() as connection:
        return {RunId(id_): org for id_, org in connection.execute(select(live.c.id, live.c.org_id))}


def idle(made: Installation, working: Workers, what: str) -> None:
    """Print processes, memory and admission latency of a worker that has nothing else to do."""
    # Tokens, plans and prepared statements.
    ended = made.ended()
    made.add_backlog(ORGS, "bench.inline", "inline", vacuum=False)
    made.wait_for_end(ended + ORGS)
    for number in range(TIMED):
        made.add_backlog(1, "bench.inline", "inline", vacuum=False)
        with made.database.transaction() as connection:
            hint(connection)  # as `definitions run` does; a worker on SQLite polls
        while made.ended() <= ended + ORGS + number:
            time.sleep(0.002)
    runs = tables.runs
    with made.database.autocommit() as connection:
        newest = select(runs.c.created_at, runs.c.started_at).where(runs.c.handler == "bench.inline")
        rows = connection.execute(newest.order_by(runs.c.id.desc()).limit(TIMED)).all()
    delays = [(started - created).total_seconds() for created, started in rows]
    worker = psutil.Process(working.processes[0].pid)
    processes, memory = worker.children(recursive=True), worker.memory_full_info().pss / 1024**2
    print(
        f"{what:<22} {len(processes)} processes beside the worker, which has {memory:.0f} MiB; "
        f"admitted after {spread(delays)}",
        flush=True,
    )


def answers(made: Installation, ids: list[RunId], rate: int, what: str) -> None:
    """Answer these runs from five callers at this rate, and print how soon they go on."""
    began = time.monotonic()

    def call(mine: list[tuple[int, RunId]]) -> None:
        for number, run_id in mine:
            time.sleep(max(0.0, began + number / rate - time.monotonic()))
            answer(made.database, run_id, "approval", {"yes": True}, actor="bench")

    numbered = list(enumerate(ids))
    callers = [threading.Thread(target=call, args=(numbered[n::CALLERS],)) for n in range(CALLERS)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    took = time.monotonic() - began
    delays = [(started - at).total_seconds() for at, started in resumed(made, ids)]
    print(f"{what:<22} {len(ids) / took:.0f} answers/s; goes on after {spread(delays)}", flush=True)


def resumed(made: Installation, ids: list[RunId]) -> list[tuple[datetime, datetime]]:
    """When each of these runs was answered, and when its handler was called again."""
    attempts, waits = tables.attempts, tables.waits
    query = (
        select(attempts.c.run_id, waits.c.answered_at, attempts.c.handler_started_at)
        .join(waits, waits.c.run_id == attempts.c.run_id)
        .where(attempts.c.attempt == 2)
    )
    until, wanted = time.monotonic() + 60, set(ids)
    while True:
        with made.database.autocommit() as connection:
            found = [row for row in connection.execute(query) if row.run_id in wanted]
        if len(found) == len(ids):
            return [(row.answered_at, row.handler_started_at) for row in found]
        if time.monotonic() > until:
            raise SystemExit(f"only {len(found)} of {len(ids)} answered runs went on")
        time.sleep(0.5)


def spread(seconds: list[float]) -> str:
    """Median and 99th percentile in milliseconds, and the load."""
    last = sorted(seconds)[min(len(seconds) - 1, int(0.99 * len(seconds)))]
    middle, load = statistics.median(seconds), os.getloadavg()[0]
    return f"p50 {1e3 * middle:.0f} ms, p99 {1e3 * last:.0f} ms; load {load:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="postgresql")
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--rate", type=int, default=200, help="answers a second to inline runs")
    parser.add_argument("--child-rate", type=int, default=30, help="answers a second to runs in processes")
    parser.add_argument("--seconds", type=int, default=20, help="of each series of answers")
    given = parser.parse_args()
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, {given.database}")
    with installation(given.database, orgs=ORGS) as made:
        made.configure(slots=1000, children=20)
        made.define("bench.inline", spec={"overlap": "allow"})
        with made.workers() as working:
            idle(made, working, "without parked runs")
        inline = park(made, given.runs, "bench.asks", "inline")
        child = park(made, given.child_rate * given.seconds, "bench.asks_child", "child")
        with made.workers() as working:
            idle(made, working, f"with {len(inline) + len(child):,}")
            answers(made, inline[: given.rate * given.seconds], given.rate, "inline")
            answers(made, child, given.child_rate, "in processes")


if __name__ == "__main__":
    main()
