"""Measures runs on a host: how soon they start, and what thousands inline cost it.

    .venv/bin/python -m bench.host_runs [starts] [inline] [--database sqlite|postgresql]

One worker with no slots of its own answers one host, over loopback. `starts` adds runs one by one and reads
from the database when each was admitted and when its handler was called, as the worker heard of it; also
for a worker that runs them itself.
`inline` has the host hold sleeping runs. `bench.hosts` measures the renewals of many hosts.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
from sqlalchemy import select

from bench.installation import Installation, installation
from bench.runs import ENTRY_POINTS, HANDLERS, WARM_UP, load, running, spread, used
from tests.fakes.plugins import make_plugin
from tests.fakes.ports import free_port
from worker.features.hosts.operations import add_host
from worker.store import tables

# Seconds until a host has read its catalogue.
CATALOGUE = 5.0


def configure(made: Installation) -> int:
    """Let the worker run nothing itself, and answer hosts; returns the port."""
    port = free_port()
    made.configure(slots=0, extra='drain = "1s"')
    with (made.folder / "worker.toml").open("a") as file:
        file.write(f'[attempts]\nlisten = "127.0.0.1:{port}"\n')
    return port


@contextlib.contextmanager
def host(made: Installation, port: int, *, slots: int) -> Iterator[psutil.Process]:
    """A host with so many inline slots."""
    folder = made.folder / "host"
    folder.mkdir()
    token = folder / "token"
    token.write_text(str(add_host(made.database, "h1", "default", actor="bench")["token"]))
    token.chmod(0o600)
    (folder / "host.toml").write_text(
        f"""\
[host]
control = ["http://127.0.0.1:{port}"]
token_file = "{token}"
[execution]
max_inline = {slots}
inline = ["orgworker-bench"]
drain = "1s"
[log]
level = "warning"
"""
    )
    command = [sys.executable, "-m", "worker", "--config", str(folder / "host.toml"), "host"]
    environment = os.environ | {"PYTHONPATH": str(made.folder / "plugins")}
    with (folder / "host.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        time.sleep(CATALOGUE)
        if process.poll() is not None:
            raise SystemExit((folder / "host.log").read_text())
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def measure_starts(dialect: str, count: int) -> None:
    """Runs in children, then inline, one after another; on a worker, then on a host."""
    for handler, isolation in (("bench.child", "child"), ("bench.inline", "inline")):
        for where in ("worker", "host"):
            with installation(dialect, orgs=1) as made, contextlib.ExitStack() as stack:
                made.configure(slots=10, children=50)
                port = configure(made) if where == "host" else 0
                made.define(handler, spec={"overlap": "allow", "isolation": isolation})
                stack.enter_context(made.workers())
                if where == "host":
                    stack.enter_context(host(made, port, slots=10))
                for number in range(count):
                    made.add_backlog(1, handler, isolation, vacuum=False)
                    while made.ended() <= number:
                        made.check()
                        time.sleep(0.01)
                seconds = started_after(made)[WARM_UP:]
            shown = spread("admitted until called", seconds)
            print(f"{dialect}: {count} runs one by one on a {where}, {isolation}: {shown}; {load()}")


def started_after(made: Installation) -> list[float]:
    """Seconds from the admission of each run until its handler was called."""
    attempts = tables.attempts
    query = select(attempts.c.started_at, attempts.c.handler_started_at).order_by(attempts.c.started_at)
    with made.database.autocommit() as connection:
        return [(called - admitted).total_seconds() for admitted, called in connection.execute(query)]


def measure_inline(dialect: str, count: int, *, seconds: float) -> None:
    """Measure an idle host, then one with sleeping runs."""
    with installation(dialect, orgs=100) as made:
        make_plugin(
            made.folder / "plugins",
            dist="orgworker-bench",
            modules={"bench_jobs": HANDLERS},
            entry_points=ENTRY_POINTS,
        )
        port = configure(made)
        made.define("bench.inline", spec={"overlap": "allow"})
        with made.workers() as working, host(made, port, slots=count) as process:
            worker = psutil.Process(working.processes[0].pid)
            before, idle = process.memory_full_info().uss, used(process, seconds)
            control, worker_idle = worker.memory_full_info().uss, used(worker, seconds)
            made.add_backlog(count, "bench.inline", "inline")
            while running(made) < count:
                time.sleep(0.5)
            time.sleep(CATALOGUE)
            held, busy = process.memory_full_info().uss, used(process, seconds)
            kept, worker_busy = worker.memory_full_info().uss, used(worker, seconds)
    print(
        f"{dialect}: {count} sleeping inline runs on a host: {(held - before) / count / 1024:.1f} KiB each "
        f"there, {(kept - control) / count / 1024:.1f} KiB at its worker; CPU of the host {busy * 100:.1f} % "
        f"of a processor with them, {idle * 100:.1f} % without, of its worker {worker_busy * 100:.1f} % and "
        f"{worker_idle * 100:.1f} %; {load()}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="*", default=["starts", "inline"])
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="postgresql")
    parser.add_argument("--starts", type=int, default=200)
    parser.add_argument("--inline", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=20.0)
    given = parser.parse_args()
    if "starts" in given.what:
        measure_starts(given.database, given.starts)
    if "inline" in given.what:
        measure_inline(given.database, given.inline, seconds=given.seconds)


if __name__ == "__main__":
    main()
