"""Measures what 100,000 orgs cost before their first run: import, a template, lists, and a restart.

    .venv/bin/python -m bench.onboarding [--database sqlite|postgresql|both] [--orgs N] [--nice N]

Each line is a process from its start to its end: seconds of wall and of processor time, of the process
and of PostgreSQL. A list is asked five times and the best counts, after each org has a run. Ends with 1
if the processor time of a line is above its target: on a machine with nothing else to do, wall and
processor time differ little.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from sqlalchemy import select, text

from bench.history import FIRST, SECOND
from bench.server import own_server, processor_time
from tests.fakes.plugins import make_plugin
from tests.fakes.ports import free_port
from tests.fakes.postgres import Server
from worker.clock import SystemClock
from worker.ids import RunId, new_id
from worker.model.runs.run import NewRun
from worker.store import firing, schema, tables
from worker.store.database import Database

# Seconds, for 100,000 orgs.
IMPORT = 15.0
MATERIALISE = 20.0
LIST = 0.5
READY = 2.0
ROUNDS = 5
BATCH = 500
LISTS = (
    "orgs list",
    "orgs list --limit 1000 -o json",
    "orgs show org_{last}",
    "definitions list",
    "definitions list --org org_{last}",
    "runs list",
    "runs list --org org_{last}",
    "credentials list",
    "templates list",
    "audit list",
)
TEMPLATE = """\
[[template]]
name = "nightly-report"
orgs = "all"
handler = "bench.report"
schedule = "0 9 * * *"
timezone = "Europe/Berlin"
scopes = ["read:kb"]
timeout = "20m"
params = { format = "pdf", recipients = ["ops@example.com"] }
"""
HANDLERS = """\
from worker import job


@job("bench.report")
def report(ctx):
    return None
"""


@dataclass(frozen=True)
class Cost:
    """Seconds: from start to end, of the process with its children, and of the database server."""

    wall: float
    processor: float
    server: float

    @property
    def total(self) -> float:
        return self.processor + self.server

    def line(self, what: str, target: float | None) -> str:
        aim = "" if target is None else f"  target {target:g} s{'  MISSED' if self.total > target else ''}"
        times = f"{self.wall:7.2f} s wall  {self.processor:7.2f} s processor  {self.server:7.2f} s server"
        return f"{what:40.40} {times}{aim}"


class Site:
    """A folder with settings and a database, and the commands that are measured on it."""

    def __init__(self, folder: Path, url: str, server: Server | None) -> None:
        self.folder, self.url, self._server = folder, url, server
        self.port = free_port()
        self.missed = 0
        secrets_dir = folder / "secrets"
        secrets_dir.mkdir(mode=0o700)
        (folder / "worker.toml").write_text(
            f'secrets_dir = "{secrets_dir}"\n[database]\nurl = "{url}"\n'
            '[issuers.main]\nprofile = "kinde"\nurl = "http://127.0.0.1:1"\n'
            'audience = "https://api.bench.example"\n'
            f'[web]\nlisten = "127.0.0.1:{self.port}"\n[log]\nlevel = "warning"\nstyle = "json"\n'
        )
        make_plugin(
            folder / "plugins",
            dist="orgworker-bench",
            modules={"orgworker_bench": HANDLERS},
            entry_points={"bench.report": "orgworker_bench:report"},
        )
        self.command("keys", "generate")

    def command(self, *arguments: str) -> Cost:
        """The cost of one command."""
        began, server = time.perf_counter(), self._server_cpu()
        process = self._start(*arguments)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log = (self.folder / "log").read_text()[-2000:]
            raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}: {log}")
        processor = usage.ru_utime + usage.ru_stime
        return Cost(time.perf_counter() - began, processor, self._server_cpu() - server)

    def report(self, what: str, cost: Cost, target: float | None = None) -> None:
        """Print a line, and count it if it missed its target."""
        print(cost.line(what, target), flush=True)
        self.missed += target is not None and cost.total > target

    def ready(self) -> Cost:
        """The cost of a worker from its start until `/readyz` answers 200."""
        began, server = time.perf_counter(), self._server_cpu()
        process = self._start("run")
        try:
            while not self._is_ready():
                if process.poll() is not None:
                    raise SystemExit(f"the worker has ended: {(self.folder / 'log').read_text()[-2000:]}")
                time.sleep(0.01)
            wall = time.perf_counter() - began
            return Cost(wall, processor_time(process.pid), self._server_cpu() - server)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)

    def add_runs(self) -> None:
        """Add a waiting run of each definition, and let PostgreSQL know the size of its tables."""
        database = Database.open(self.url, clock=SystemClock(), role="bench", deadline=600.0)
        definitions = tables.definitions
        with database.autocommit() as connection:
            found = connection.execute(select(definitions.c.id, definitions.c.org_id)).all()
            at = database.now(connection) + timedelta(days=1)
        for part in range(0, len(found), BATCH):
            runs = [
                NewRun(
                    id=RunId(new_id()),
                    org_id=org_id,
                    definition_id=definition_id,
                    revision=1,
                    handler="bench.report",
                    origin="manual",
                    scheduled_for=at,
                    available_at=at,
                    idempotency_key=new_id(),
                    serial=True,
                    isolation="child",
                )
                for definition_id, org_id in found[part : part + BATCH]
            ]
            with database.transaction() as connection:
                firing.write(connection, runs)
        if database.dialect == "postgresql":
            with database.autocommit() as connection:
                connection.execute(text("VACUUM ANALYZE"))
        database.close()

    def materialised(self) -> tuple[int, int]:
        """How many definitions the template made, and how many orgs are left."""
        database = Database.open(self.url, clock=SystemClock(), role="bench")
        with database.autocommit() as connection:
            made = connection.execute(text("SELECT count(*) FROM definitions")).scalar_one()
            query = "SELECT orgs_total - orgs_done FROM templates WHERE materialised_at IS NULL"
            left = connection.execute(text(query)).scalar() or 0
        database.close()
        return made, left

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        environment = os.environ | {"PYTHONPATH": str(self.folder / "plugins")}
        whole = [sys.executable, "-m", "worker", *arguments]
        with (self.folder / "log").open("wb") as log:
            return subprocess.Popen(whole, cwd=self.folder, env=environment, stdout=log, stderr=log)

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        return False

    def _server_cpu(self) -> float:
        if self._server is None or self._server.pid is None:
            return 0.0
        return processor_time(self._server.pid)


@contextlib.contextmanager
def site_on(dialect: str) -> Iterator[Site]:
    """An empty installation."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orgworker-bench-")))
        server = stack.enter_context(own_server()) if dialect == "postgresql" else None
        url = server.url() if server else f"sqlite:///{folder / 'worker.db'}"
        schema.upgrade(url)
        yield Site(folder, url, server)


def orgs_file(folder: Path, count: int) -> Path:
    """The lines of `orgs import`."""
    path = folder / "orgs.jsonl"
    with path.open("w") as file:
        for number in range(count):
            name = f"{FIRST[number % len(FIRST)]} {SECOND[number % len(SECOND)]} {number}"
            client = {"client_id": f"m2m-{number:08x}", "client_secret": secrets.token_urlsafe(32)}
            plan = "enterprise" if number % 10 == 0 else "team"
            line = {"code": f"org_{number}", "name": name, "issuer": "main", "tags": [plan]} | client
            file.write(json.dumps(line) + "\n")
    return path


def best(site: Site, arguments: str) -> Cost:
    """The cheapest of a few calls."""
    return min((site.command(*arguments.split()) for _ in range(ROUNDS)), key=lambda cost: cost.total)


def measure(site: Site, orgs: int) -> None:
    share = orgs / 100_000
    file = str(orgs_file(site.folder, orgs))
    site.report(f"orgs import of {orgs}", site.command("orgs", "import", file), IMPORT * share)
    site.report("the same file again", site.command("orgs", "import", file), IMPORT * share)
    template = site.folder / "template.toml"
    template.write_text(TEMPLATE)
    site.report("apply of a template", site.command("apply", str(template)), MATERIALISE * share)
    if site.materialised() != (orgs, 0):
        raise SystemExit(f"definitions and orgs that are left: {site.materialised()}")
    site.add_runs()
    last = str(orgs - 1)
    for command in LISTS:
        named = command.replace("{last}", last)
        site.report(named, best(site, named), LIST)
    readies = [site.ready() for _ in range(3)]
    site.report("worker until /readyz", min(readies, key=lambda cost: cost.wall), READY)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--database", choices=["sqlite", "postgresql", "both"], default="both")
    options.add_argument("--orgs", type=int, default=100_000)
    options.add_argument("--nice", type=int, default=0, help="of all processes; below 0 needs root")
    given = options.parse_args()
    os.setpriority(os.PRIO_PROCESS, 0, given.nice)
    missed = 0
    for dialect in ("sqlite", "postgresql") if given.database == "both" else (given.database,):
        with site_on(dialect) as site:
            print(f"{dialect}, {given.orgs} orgs, load {os.getloadavg()[0]:.0f}", flush=True)
            measure(site, given.orgs)
            missed += site.missed
    raise SystemExit(f"{missed} targets were missed" if missed else 0)


if __name__ == "__main__":
    main()
