"""Measures a run that starts many others: until they are stored, until all have ended, and what it uses.

    .venv/bin/python -m bench.children [--database sqlite|postgresql] [--children N] [--workers N]
        [--handler bench.inline|bench.child] [--peer VENV]

Beside it, the same number of runs without a parent, by the same workers. With `--peer`, DBOS runs as many
child workflows of one workflow on a PostgreSQL like ours: VENV has `pip install dbos 'psycopg[binary]'`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path

from sqlalchemy import func, select

from bench.installation import Installation, installation
from bench.server import own_server
from worker.store import tables


def measure(made: Installation, args: argparse.Namespace) -> float:
    """Prints what it measured; returns the seconds until the parent had all results."""
    runs, links = tables.runs, tables.children
    kind = "inline" if args.handler == "bench.inline" else "child"
    made.configure(slots=200 if kind == "inline" else 0, children=8)
    params = {"handler": args.handler, "children": args.children}
    made.define("bench.tree", spec={"params": params, "overlap": "allow", "isolation": None})
    with made.workers(args.workers) as working:
        made.add_backlog(1, args.handler, kind, vacuum=False)
        made.wait_for_end(1)
        made.add_backlog(1, "bench.tree", "child", vacuum=False)
        cpu, began = working.cpu(), time.monotonic()
        while True:
            with made.database.autocommit() as connection:
                stored = connection.execute(select(func.count()).select_from(links)).scalar_one()
            if stored == args.children:
                break
            time.sleep(0.02)
        at = time.monotonic() - began
        made.wait_for_end(args.children + 2)
        with made.database.autocommit() as connection:
            of_tree = runs.c.handler == "bench.tree"
            result = connection.execute(select(runs.c.result, runs.c.attempt).where(of_tree)).one()
            created = func.min(runs.c.created_at), func.max(runs.c.created_at), func.max(runs.c.finished_at)
            first, last, end = connection.execute(select(*created).where(runs.c.origin == "child")).one()
        print(f"stored {at:.1f} s after the parent was made, from the first to the last {last - first}")
        print(f"all children had ended {(end - first).total_seconds():.1f} s after the first was stored")
        whole = time.monotonic() - began
        print(f"the parent: {result.result}, {result.attempt} attempts, {whole:.1f} s")
        print(f"processor: {1e6 * (working.cpu() - cpu) / args.children:.0f} us a child")
        made.add_backlog(args.children, args.handler, kind, vacuum=False)
        cpu, began = working.cpu(), time.monotonic()
        made.wait_for_end(2 * args.children + 2)
        print(
            f"as many runs without a parent: {time.monotonic() - began:.1f} s, "
            f"{1e6 * (working.cpu() - cpu) / args.children:.0f} us each"
        )
    return whole


def dbos(venv: Path, children: int, ours: float) -> None:
    """The same in DBOS, and how many times as long it took."""
    script = Path(__file__).with_name("peer_dbos_children.py")
    with own_server() as server, server.new_database() as url:
        command = [str(venv / "bin" / "python"), str(script), url, str(children)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"DBOS: {done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(
        f"DBOS: started in {found['started']:.1f} s, the parent had all results after "
        f"{found['ended']:.1f} s, {found['ended'] / ours:.1f} times as long; "
        f"{1e6 * found['cpu'] / children:.0f} us a child"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="postgresql")
    parser.add_argument("--children", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--handler", default="bench.inline")
    parser.add_argument("--peer", type=Path, metavar="VENV")
    args = parser.parse_args()
    with installation(args.database, orgs=1) as made:
        ours = measure(made, args)
    if args.peer is not None:
        dbos(args.peer, args.children, ours)


if __name__ == "__main__":
    main()
