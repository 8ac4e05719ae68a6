"""Measures the console: every page, warm, over a database of 10,000 orgs and 1,000,000 runs.

    .venv/bin/python -m bench.console [--database sqlite|postgresql|both] [--orgs N] [--runs N] [--rounds N]

Milliseconds are those of the application in this process, from the request to the last byte, with
authentication and database; "cpu" is the processor time of this process, SQLite included. kB are of
the gzipped page. Each statement of a page is recorded and explained: one without LIMIT, and one that
reads a large table from end to end, is a fault. It exits 1 if a page has a fault, or exceeds 50 ms
(p50), 60 kB or 4 requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import hashlib
import os
import re
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import Engine, event, text

from bench.history import FAILED, history
from worker import settings
from worker.clock import SystemClock
from worker.features.console.wiring import ConsolePages
from worker.kit.web.health import Health
from worker.store.database import Database
from worker.store.lists import DEFINITIONS
from worker.telemetry.metrics import Metrics

TOKEN = "token-of-the-benchmark"  # noqa: S105 - of a database that this program fills
MAX_MS = 50.0
MAX_KB = 60.0
MAX_REQUESTS = 4
# Rows that one scan may read and leave out.
MAX_REMOVED = 100
# Tables that grow with orgs, runs or time.
LARGE = frozenset(
    (
        *("runs", "run_ends", "attempts", "run_logs", "skips", "audit", "orgs", "definitions", "org_words"),
        *("definition_revisions", "schedule", "credentials", "rollup_hours", "rollup_days", "checkpoints"),
        "failing_definitions",
    )
)
ORG = "org_7"
SEARCHES = (
    *("acme", "acme 7", "org:org_7", "state:failed", "state:failed,refused since:1d", "handler:http.request"),
    *('cause:"OSError: disk"', "org:org_7 state:failed", "definition:d3 state:failed", "state:waiting"),
    *("definition:rare state:refused", "77 state:failed", "acme definition:d3 state:failed cause:disk"),
    *("worker:bench", "worker:nobody", "definition:d3 revision:1", "disk", "disk 400500", "acme full"),
)
# Tabs of lists.
TABS = (
    *("/orgs?broken=true", "/orgs?state=active", "/definitions?org=org_7"),
    *(f"/definitions?state={state}" for state in DEFINITIONS.states),
)


@dataclass
class Statement:
    """A statement that a page sent, and what the database says it would read."""

    sql: str
    faults: list[str] = field(default_factory=list)


@dataclass
class Page:
    """What one page cost."""

    path: str
    status: int
    ms: list[float]
    cpu_ms: float
    kilobytes: float
    requests: int
    statements: list[Statement]

    def statement_faults(self) -> list[str]:
        """What is wrong with its statements, each once."""
        return list(dict.fromkeys(fault for statement in self.statements for fault in statement.faults))

    def faults(self) -> list[str]:
        """Everything that is too much."""
        found = self.statement_faults()
        if self.status not in (200, 303):
            found.append(f"status {self.status}")
        if statistics.median(self.ms) > MAX_MS:
            found.append(f"{statistics.median(self.ms):.0f} ms")
        if self.kilobytes > MAX_KB:
            found.append(f"{self.kilobytes:.0f} kB")
        if self.requests > MAX_REQUESTS:
            found.append(f"{self.requests} requests")
        return found


class Recorder:
    """Records and explains each statement of every engine while it is `on`."""

    def __init__(self, *, strict: bool = False) -> None:
        self.statements: list[Statement] = []
        self._strict = strict
        self._known: dict[str, Statement] = {}
        self._explaining = False

    @contextlib.contextmanager
    def on(self) -> Iterator[list[Statement]]:
        self.statements = []
        event.listen(Engine, "before_cursor_execute", self._executing)
        try:
            yield self.statements
        finally:
            event.remove(Engine, "before_cursor_execute", self._executing)

    def _executing(
        self, connection: Any, cursor: Any, sql: str, parameters: Any, context: Any, many: bool
    ) -> None:
        if not re.match(r"\s*(SELECT|WITH)\b", sql, re.IGNORECASE) or not re.search(r"\bFROM\b", sql):
            return
        known = self._known.get(sql)
        if known is None:
            known = self._known[sql] = Statement(sql)
            if "LIMIT" not in sql.upper():
                known.faults.append(f"no LIMIT: {one_line(sql)}")
            explain = (
                explained_by_postgresql if connection.dialect.name == "postgresql" else explained_by_sqlite
            )
            scanned = explain(connection.connection.driver_connection, sql, parameters, self._strict)
            known.faults += [f"reads all of {table}: {one_line(sql)}" for table in scanned]
        self.statements.append(known)


def one_line(sql: str) -> str:
    return " ".join(sql.split())[:300]


def explained_by_sqlite(raw: Any, sql: str, parameters: Any, strict: bool) -> list[str]:
    """The large tables that the plan reads from end to end, not in the order of an index."""
    plan = [row[3] for row in raw.cursor().execute(f"EXPLAIN QUERY PLAN {sql}", parameters).fetchall()]
    aliases = {alias: table for table, alias in re.findall(r"\b(\w+)(?: AS)? (\w+)\b", sql)}
    found = []
    for line in plan:
        scan = re.match(r"SCAN (\w+)(?! (?:USING|VIRTUAL))$", line)
        if scan is not None and (aliases.get(scan[1]) in LARGE or scan[1] in LARGE):
            found.append(f"{scan[1]} ({line})")
    return found


def explained_by_postgresql(raw: Any, sql: str, parameters: Any, strict: bool) -> list[str]:
    """The large tables of which the plan has a sequential scan; `strict` forbids it one on small ones."""
    with raw.cursor() as cursor:
        if strict:
            cursor.execute("SET LOCAL enable_seqscan = off")
        cursor.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {sql}", parameters)
        (plan,) = cursor.fetchone()
        if strict:
            cursor.execute("SET LOCAL enable_seqscan = on")
    found: list[str] = []

    def walk(node: dict[str, Any]) -> None:
        # Without a condition, a filter over an index reads as much as one over the table.
        over_index = "Index" in node["Node Type"] and "Index Cond" not in node
        filtered = over_index and node.get("Rows Removed by Filter", 0) > MAX_REMOVED
        if (node["Node Type"] == "Seq Scan" or filtered) and node.get("Relation Name") in LARGE:
            found.append(node["Relation Name"])
        for child in node.get("Plans", ()):
            walk(child)

    walk(plan[0]["Plan"])
    return found


@contextlib.asynccontextmanager
async def asking(url: str) -> AsyncIterator[tuple[httpx.AsyncClient, Any]]:
    """A client of the web application over this database, in this process, and its routes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "worker.toml"
        digest = hashlib.sha256(TOKEN.encode()).hexdigest()
        file.write_text(
            f'[database]\nurl = "{url}"\n[web]\ncalls_per_second = 100000\n'
            f'[[web.operators]]\nname = "bench"\nrole = "admin"\ntoken_sha256 = "{digest}"\n'
        )
        given = settings.load(str(file), environ={})
        async with contextlib.AsyncExitStack() as stack:
            health = Health(Metrics(version="bench", top_orgs=0))
            app = await ConsolePages(given, SystemClock(), health).application(stack)
            transport = httpx.ASGITransport(app, client=("127.0.0.1", 40000), raise_app_exceptions=False)
            headers = {"authorization": f"Bearer {TOKEN}", "accept-encoding": "gzip"}
            client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8470", headers=headers)
            yield await stack.enter_async_context(client), app


def routes_of(app: Any) -> list[str]:
    """The paths of all pages: what GET takes outside of the API, static files and health."""
    while not hasattr(app, "routes"):
        app = app._app  # a middleware
    skipped = ("/api", "/live/", "/static", "/docs", "/livez", "/readyz", "/metrics", "/log", "/healthz")
    paths = [
        route.path
        for route in app.routes
        if "GET" in (getattr(route, "methods", None) or ()) and not route.path.startswith(skipped)
    ]
    return sorted(dict.fromkeys(paths))


def paths_of(app: Any, run: str) -> list[str]:
    """An address for each page, of an org, a definition and a failed run with a long log, and searches."""
    filled = []
    for path in routes_of(app):
        address = re.sub(r"\{org(:\w+)?\}", ORG, path)
        address = re.sub(r"\{(name|definition)(:\w+)?\}", "d3", address)
        address = re.sub(r"\{(run|id|run_id)(:\w+)?\}", run, address)
        # Of the runs of a search.
        address += {"/retry": "?q=state%3Afailed", "/cancel": "?q=state%3Awaiting"}.get(address, "")
        if "{" not in address and not address.endswith(("/live", "/events", "/log.txt")):
            filled.append(address)
    if "/search" in filled:
        filled += [str(httpx.URL("/search", params={"q": query})) for query in SEARCHES]
        filled += TABS
    return filled


async def measure(client: httpx.AsyncClient, recorder: Recorder, path: str, rounds: int) -> Page:
    """Ask for a page: once to record its statements, once more to warm up, then timed."""
    with recorder.on() as statements:
        response = await client.get(path)
    await client.get(path)
    ms = []
    used = time.process_time()
    for _ in range(rounds):
        began = time.perf_counter()
        response = await client.get(path)
        ms.append((time.perf_counter() - began) * 1000)
    cpu_ms = (time.process_time() - used) * 1000 / rounds
    body = response.content
    loaded = set(re.findall(r'(?:src|href)="(/static/[^"]+)"', response.text))
    size = len(gzip.compress(body, 6)) / 1000
    return Page(path, response.status_code, ms, cpu_ms, size, 1 + len(loaded), list(statements))


def a_failed_run(url: str) -> str:
    """The failed run whose log is long."""
    database = Database.open(url, clock=SystemClock(), role="bench")
    try:
        with database.autocommit() as connection:
            query = text("SELECT run_id FROM run_logs WHERE seq = 1 LIMIT 1")
            return str(connection.execute(query).scalar_one())
    finally:
        database.close()


async def measure_all(url: str, *, rounds: int, strict: bool = False) -> list[Page]:
    """Every page once; `strict` is for small databases, whose planner prefers sequential scans."""
    run = a_failed_run(url)
    async with asking(url) as (client, app):
        recorder = Recorder(strict=strict)
        return [await measure(client, recorder, path, rounds) for path in paths_of(app, run)]


def report(dialect: str, pages: Sequence[Page]) -> bool:
    """Print a line for each page and its faults; whether there is none."""
    print(f"{dialect}: load {os.getloadavg()[0]:.1f}, {datetime.now():%Y-%m-%d %H:%M}")
    print(f"  {'cpu ms':>7} {'p50 ms':>7} {'max ms':>7} {'kB':>6} {'requests':>8} {'statements':>10}  page")
    for page in pages:
        shown = page.path.replace("%3A", ":").replace("+", " ")
        shown = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "RUN", shown)
        print(
            f"  {page.cpu_ms:7.1f} {statistics.median(page.ms):7.1f} {max(page.ms):7.1f} "
            f"{page.kilobytes:6.1f} {page.requests:8} {len(page.statements):10}  {shown}"
        )
        for fault in page.faults():
            print(f"          FAULT {fault}")
    return not any(page.faults() for page in pages)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--database", choices=("sqlite", "postgresql", "both"), default="both")
    parser.add_argument("--orgs", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=1_000_000, help=f"more than {FAILED}")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--url", help="measure this database, which `bench.history.fill` has filled")
    given = parser.parse_args()
    fine = True
    if given.url:
        return 0 if report(given.url, asyncio.run(measure_all(given.url, rounds=given.rounds))) else 1
    dialects = ("sqlite", "postgresql") if given.database == "both" else (given.database,)
    for dialect in dialects:
        with history(dialect, given.runs, given.orgs) as url:
            fine = report(dialect, asyncio.run(measure_all(url, rounds=given.rounds))) and fine
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
