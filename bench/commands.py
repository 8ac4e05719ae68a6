"""What a command of the console costs: `python -m bench.commands`; a list is meant to stay under 0.5 s."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 5
COMMANDS = (("--help",), ("runs", "list"), ("orgs", "list", "-o", "json"))


def measure(folder: Path, *arguments: str) -> tuple[float, float]:
    """Wall and processor seconds of one command, the best of a few rounds."""
    best = (float("inf"), float("inf"))
    for _ in range(ROUNDS):
        began = time.perf_counter()
        command = [sys.executable, "-m", "worker", *arguments]
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
        best = min(best, (time.perf_counter() - began, usage.ru_utime + usage.ru_stime))
    return best


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-m", "worker", "db", "upgrade"], cwd=folder, check=True)
        for command in COMMANDS:
            wall, cpu = measure(folder, *command)
            print(f"{' '.join(command):24} {wall:6.3f} s wall  {cpu:6.3f} s processor")


if __name__ == "__main__":
    main()
