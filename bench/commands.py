"""What a command of the console costs; a list is meant to stay under 0.5 s, whatever lies behind it.

    .venv/bin/python -m bench.commands [--database sqlite|postgresql|both] [--runs N]

Lists are asked of a database with N runs (1,000,000), 1,000 orgs, 10,001 definitions, 100,000
skips and as many rows of audit. Each time is that of a process from its start to its end,
the best of a few; "processor" is what that process used.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.history import history

ROUNDS = 5
MOST = 0.5
HELP = ("--help", "runs --help")
LISTS = (
    "runs list",
    "runs list --limit 1000 -o json",
    "runs list --org org_7",
    "runs list --definition d3",
    "runs list --definition rare",
    "runs list --state succeeded",
    "runs list --state refused",
    "runs list --state skipped",
    "runs list --state waiting",
    "runs list --since 1h",
    "runs list --since 20d --state refused",
    "runs list --org org_7 --state failed",
    "runs list --org org_7 --state refused",
    "runs list --org org_0 --definition rare --state failed",
    "runs list --definition rare --state failed",
    "runs list --definition d3 --state refused",
    "skips list",
    "skips list --org org_7",
    "skips list --definition rare",
    "definitions list",
    "definitions list --org org_7",
    "definitions list --state paused",
    "orgs list",
    "audit list",
    "audit list --org org_7 --since 1d",
)


def measure(folder: Path, command: str) -> tuple[float, float]:
    """Wall and processor seconds of one command, the best of a few rounds."""
    best = (float("inf"), float("inf"))
    for _ in range(ROUNDS):
        began = time.perf_counter()
        whole = [sys.executable, "-m", "worker", *command.split()]
        process = subprocess.Popen(whole, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{command} ended with {process.returncode}")
        best = min(best, (time.perf_counter() - began, usage.ru_utime + usage.ru_stime))
    return best


def report(folder: Path, commands: tuple[str, ...]) -> int:
    """Print what each costs; how many took too long."""
    late = 0
    for command in commands:
        wall, cpu = measure(folder, command)
        late += wall > MOST
        print(f"{command:56} {wall:6.3f} s wall  {cpu:6.3f} s processor{'  LATE' if wall > MOST else ''}")
    return late


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--database", choices=["sqlite", "postgresql", "both"], default="both")
    options.add_argument("--runs", type=int, default=1_000_000)
    given = options.parse_args()
    late = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        late += report(folder, HELP)
        for dialect in ("sqlite", "postgresql") if given.database == "both" else (given.database,):
            with history(dialect, given.runs) as url:
                (folder / "worker.toml").write_text(f'[database]\nurl = "{url}"\n')
                print(f"{dialect}, {given.runs} runs")
                late += report(folder, LISTS)
    raise SystemExit(f"{late} took more than {MOST} s" if late else 0)


if __name__ == "__main__":
    main()
