"""Measures what a token costs that no worker has: processor and memory of the worker for each org.

    .venv/bin/python -m bench.cold_tokens [--orgs N] [--slots N] [--rounds N] [--database sqlite|postgresql]
        [--before CHECKOUT]   the same with the code of another checkout, in turn
        [--trace]             what keeps the memory, by line (slower)
        [--profile FILE]      cProfile's output

One process does what a worker does for a run without a token: it looks into the table of shared tokens,
reserves the request, reads and opens the org's secret, requests, verifies and enforces the token, seals and
stores it. The development provider is a process of its own on loopback. The least of the rounds counts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import delete

from bench.filling import Filled, filled
from bench.tokens import AUDIENCE, applications, provider
from worker.ids import new_id
from worker.store import credentials, tables
from worker.tokens.sealing import KeyRing

HERE = Path(__file__).parents[1]


def add_credentials(made: Filled, ring: KeyRing, apps: Sequence[dict[str, Any]]) -> None:
    at = datetime.now(UTC)
    rows = []
    for org_id, app in zip(made.orgs, apps, strict=True):
        id_ = new_id()
        sealed, key_id = ring.seal(app["client_secret"], org_id=org_id, credential_id=id_)
        rows.append(
            {"id": id_, "org_id": org_id, "generation": 1, "client_id": app["client_id"], "sealed": sealed}
            | {"key_id": key_id, "kind": "client_secret", "state": "active", "created_at": at}
            | {"created_by": "bench", "reference": None}
        )
    with made.database.transaction() as connection:
        credentials.add(connection, rows)


def run(checkout: Path, task: dict[str, Any]) -> dict[str, float]:
    """What one worker process with the code of this checkout took."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("cold_worker.py"))],
        input=json.dumps(task),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        text=True,
        check=True,
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--orgs", type=int, default=2_000)
    parser.add_argument("--slots", type=int, default=500, help="runs that wait for a token at a time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="postgresql")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--profile", metavar="FILE", default="")
    given = parser.parse_args()
    checkouts = {"before": given.before} if given.before else {}
    checkouts["after" if given.before else "worker"] = HERE
    apps = applications(given.orgs)
    best: dict[str, dict[str, float]] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orgworker-bench-")))
        url = stack.enter_context(provider(apps, folder))
        made = stack.enter_context(filled(given.database))
        made.add_orgs(given.orgs)
        ring = KeyRing.generate(folder / "keyring")
        add_credentials(made, ring, apps)
        task = {
            "url": url,
            "audience": AUDIENCE,
            "database": made.url,
            "keyring": str(ring.path),
            "orgs": [(id_, app["org_code"]) for id_, app in zip(made.orgs, apps, strict=True)],
            "slots": given.slots,
            "trace": given.trace,
            "profile": given.profile,
        }
        for _ in range(given.rounds):
            for name, checkout in checkouts.items():
                with made.database.transaction() as connection:
                    connection.execute(delete(tables.access_tokens))
                found = run(checkout, task)
                known = best.setdefault(name, found)
                best[name] = {key: min(value, known[key]) for key, value in found.items()}
    print(f"{'':8}{'processor':>12}{'wall':>10}{'resident':>12}{'traced':>12}   requests an org")
    for name, found in best.items():
        print(
            f"{name:8}{1e3 * found['processor']:>9.2f} ms{1e3 * found['seconds']:>7.2f} ms"
            f"{found['resident'] / 1024:>9.1f} KB{found['traced'] / 1024:>9.1f} KB   {found['requested']:.3f}"
        )
    print(f"{given.orgs} orgs, {given.database}, load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
