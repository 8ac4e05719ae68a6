"""Measures the start of a run on a host: from its admission until its handler is called.

    .venv/bin/python -m bench.placing [--placer pull temporal] [--runs N] [--burst N] [--isolation NAME]

A worker, a host and, for the placer temporal, a Temporal dev server on this machine; PostgreSQL, which notes
each admission by a trigger. First runs come one by one, a moment after the end of the one before; then
`--burst` runs come at once, for which the host has slots. The handler returns the time at which it is called.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench.server import own_server, processor_time
from tests.fakes.hosts import Hosts
from tests.fakes.plugins import make_plugin
from tests.fakes.ports import free_port
from tests.fakes.site import Site, application, definition, wait_until
from tests.fakes.temporal import DevServer
from worker.clock import SystemClock
from worker.demo.provider import serve_provider
from worker.ids import RunId, new_id
from worker.model.runs.run import NewRun
from worker.store import firing
from worker.store.database import Database
from worker.store.dialect import hint

HANDLERS = """\
import time
from worker import job


@job("bench.child")
async def child(ctx):
    return {"at": time.time()}


@job("bench.inline", isolation="inline")
async def inline(ctx):
    return {"at": time.time()}
"""
NOTE = """
CREATE TABLE noted (run uuid, at timestamptz);
CREATE FUNCTION note() RETURNS trigger AS $$ BEGIN
  INSERT INTO noted VALUES (NEW.id, clock_timestamp()); RETURN NULL; END $$ LANGUAGE plpgsql;
CREATE TRIGGER note AFTER UPDATE ON live_runs FOR EACH ROW
  WHEN (OLD.state = 'waiting' AND NEW.state = 'running') EXECUTE FUNCTION note();
"""
SETTINGS = """\
[attempts]
listen = "127.0.0.1:{port}"
[pools.gpu]
placer = "{placer}"
[temporal]
address = "{address}"
"""
# Seconds between two runs that come one by one.
APART = 0.05
WARM_UP = 10


class Place:
    """A worker and a host of the pool `gpu`, and a definition whose runs execute there."""

    def __init__(self, site: Site, database: Database, isolation: str) -> None:
        self.site = site
        self.database = database
        self.isolation = isolation
        row = site.query("SELECT d.id, d.org_id FROM definitions d")[0]
        self._definition, self._org = str(row["id"]), str(row["org_id"])

    def insert(self, count: int) -> list[str]:
        """Let that many runs wait."""
        now = datetime.now(UTC)
        runs = [
            NewRun(
                id=RunId(new_id()),
                org_id=self._org,  # type: ignore[arg-type]
                definition_id=self._definition,  # type: ignore[arg-type]
                revision=1,
                handler=f"bench.{self.isolation}",
                origin="manual",
                scheduled_for=now,
                available_at=now,
                idempotency_key=new_id(),
                isolation=self.isolation,  # type: ignore[arg-type]
                serial=False,
                pool="gpu",
            )
            for _ in range(count)
        ]
        with self.database.transaction() as connection:
            firing.write(connection, runs)
            hint(connection)
        return [run.id for run in runs]

    def latencies(self, ids: Sequence[str]) -> list[float]:
        """Seconds from admission until the handler was called, once all of these runs have ended."""

        def ended() -> bool:
            rows = self.site.query("SELECT count(*) AS n FROM runs WHERE state IS NOT NULL")
            return bool(rows[0]["n"] >= self._ended + len(ids))

        wait_until(ended, "the runs to end", timeout=120)
        self._ended += len(ids)
        rows = self.site.query(
            """SELECT r.state, (r.result->>'at')::float8 - extract(epoch FROM n.at) AS took
               FROM runs r JOIN noted n ON n.run = r.id WHERE r.id = ANY(%s::uuid[])""",
            ids,
        )
        wrong = [row for row in rows if row["state"] != "succeeded"]
        if wrong or len(rows) != len(ids):
            raise RuntimeError(
                f"{len(wrong)} runs did not succeed, {len(rows)} of {len(ids)} were admitted once"
            )
        return [float(row["took"]) for row in rows]

    _ended = 0


@contextlib.contextmanager
def place(placer: str, isolation: str, slots: int) -> Iterator[tuple[Place, int]]:
    """Everything started and warm; also the pid of the worker."""
    with own_server() as server, tempfile.TemporaryDirectory(prefix="orgworker-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        provider, thread = serve_provider()
        temporal = DevServer(folder)
        with thread, server.new_database() as url:
            site = Site(folder, url, provider)
            port = free_port()
            extra = SETTINGS.format(port=port, placer=placer, address=temporal.address)
            site.configure(execution='poll = "1s"\ninline = ["bench-jobs"]', extra=extra)
            targets = {f"bench.{kind}": f"bench_jobs:{kind}" for kind in ("child", "inline")}
            make_plugin(
                site.plugins, dist="bench-jobs", modules={"bench_jobs": HANDLERS}, entry_points=targets
            )
            site.migrate()
            hosts = Hosts(site, port)
            try:
                if placer == "temporal":
                    temporal.start()
                worker = site.start_worker()
                site.wait_for_handlers("bench.child")
                hosts.start(
                    pool="gpu",
                    execution=f'max_children = {slots}\nmax_inline = {slots}\ninline = ["bench-jobs"]',
                )
                site.add_orgs(application("org_acme"), max_concurrent_runs=100_000)
                site.apply(definition("org_acme", "run", f"bench.{isolation}", pool="gpu"))
                database = Database.open(url, clock=SystemClock())
                with database.transaction() as connection:
                    connection.exec_driver_sql(NOTE)
                made = Place(site, database, isolation)
                made.latencies(made.insert(WARM_UP))
                yield made, worker.pid
                database.close()
            finally:
                hosts.close()
                site.close()
                temporal.stop()


def spread(seconds: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50_ms": cuts[49] * 1000, "p95_ms": cuts[94] * 1000, "max_ms": max(seconds) * 1000}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--placer", nargs="+", default=["pull", "temporal"], choices=["pull", "temporal"])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--burst", type=int, default=300)
    parser.add_argument("--isolation", default="child", choices=["child", "inline"])
    options = parser.parse_args()
    for placer in options.placer:
        with place(placer, options.isolation, max(options.burst, 50)) as (made, pid):
            before = processor_time(pid)
            singles: list[float] = []
            for _ in range(options.runs):
                singles += made.latencies(made.insert(1))
                time.sleep(APART)
            cpu = processor_time(pid) - before
            result = {"placer": placer, "load": round(os.getloadavg()[0], 1), "one by one": spread(singles)}
            result["worker cpu per run, ms"] = round(cpu / options.runs * 1000, 1)
            if options.burst:
                began = time.monotonic()
                result["burst"] = spread(made.latencies(made.insert(options.burst)))
                result["burst, runs/s"] = round(options.burst / (time.monotonic() - began), 1)
            print(json.dumps(result, default=lambda value: round(value, 1)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
