"""Measures commands; a list should stay under 0.5 s, whatever the size of the history.

    .venv/bin/python -m bench.commands [--database sqlite|postgresql|both] [--runs N] [--nice N]

Lists are asked of a database with N runs (1,000,000), 1,000 orgs, 10,001 definitions, 100,000
skips and as many rows of audit. Each time is that of a process from its start to its end,
the best of a few; "processor" is what that process used. Other commands are timed beside them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from bench.history import history

ROUNDS = 5
# On a shared machine, a slow command is timed again.
MAX_ROUNDS = 12
MAX_SECONDS = 0.5
# The exit code of a check that reports a problem: the machine has no room for a million runs a month.
FAILED = 1
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
    "definitions backfills",
    "orgs list",
    "orgs list --state paused",
    "credentials list",
    "credentials list org_7",
    "templates list",
    "handlers list",
    "audit list",
    "audit list --org org_7 --since 1d",
)
# Commands that read much more than a page; RUN is a failed one.
OTHERS = ("runs show RUN", "runs why RUN", "doctor", "check")


def measure(folder: Path, command: str, most: float) -> tuple[float, float]:
    """Wall and processor seconds of one command: the best of a few rounds, or of more while above `most`."""
    best = (float("inf"), float("inf"))
    for number in range(MAX_ROUNDS):
        if number >= ROUNDS and best[0] <= most:
            break
        began = time.perf_counter()
        whole = [sys.executable, "-m", "worker", *command.split()]
        process = subprocess.Popen(whole, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in (0, FAILED):
            raise SystemExit(f"{command} ended with {process.returncode}")
        wall, processor = time.perf_counter() - began, usage.ru_utime + usage.ru_stime
        best = min(best[0], wall), min(best[1], processor)
    return best


def report(folder: Path, commands: Iterable[str], *, most: float = MAX_SECONDS) -> int:
    """Print the cost of each; returns how many took longer than `most` seconds."""
    late = 0
    for command in commands:
        wall, cpu = measure(folder, command, most)
        late += wall > most
        line = f"{command:56.56} {wall:6.3f} s wall  {cpu:6.3f} s processor"
        print(line + ("  LATE" if wall > most else ""), flush=True)
    return late


def failed_run(folder: Path) -> str:
    """The id of the newest run that failed."""
    asked = ("runs", "list", "--state", "failed", "--limit", "1", "-o", "id")
    command = [sys.executable, "-m", "worker", *asked]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--database", choices=["sqlite", "postgresql", "both"], default="both")
    options.add_argument("--runs", type=int, default=1_000_000)
    options.add_argument("--nice", type=int, default=0, help="of the commands; below 0 needs root")
    given = options.parse_args()
    late = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        late += report(folder, HELP)
        for dialect in ("sqlite", "postgresql") if given.database == "both" else (given.database,):
            with history(dialect, given.runs) as url:
                (folder / "worker.toml").write_text(f'[database]\nurl = "{url}"\n')
                print(f"{dialect}, {given.runs} runs, load {os.getloadavg()[0]:.0f}", flush=True)
                os.setpriority(os.PRIO_PROCESS, 0, given.nice)
                late += report(folder, LISTS)
                run = failed_run(folder)
                report(folder, (command.replace("RUN", run) for command in OTHERS), most=float("inf"))
                os.setpriority(os.PRIO_PROCESS, 0, max(given.nice, 0))
                print(f"load {os.getloadavg()[0]:.0f}", flush=True)
    raise SystemExit(f"{late} took more than {MAX_SECONDS} s" if late else 0)


if __name__ == "__main__":
    main()
