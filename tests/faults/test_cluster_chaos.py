"""Four workers on one PostgreSQL, and all that can befall them, in one run; then it is judged."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile
from typing import Any

import pytest

from tests.fakes.postgres import Server
from tests.faults.checker import Fault
from tests.faults.cluster import Cluster, Load
from tests.faults.conftest import MakeCluster
from tests.faults.proxy import Proxy
from tests.faults.storm import STEPS, Amount, Storm, load, seed, wait_for_the_end

WORKERS = 4
SESSIONS = """
SELECT pid, client_port FROM pg_stat_activity
WHERE datname = current_database() AND application_name LIKE 'orgworker %'
"""
BEGUN = """
SELECT id, attempt, worker_id FROM live_runs WHERE state = 'running' AND handler = 'fault.acts'
AND started_at > clock_timestamp() - interval '1 second'
"""
STARTS = """
SELECT min(started_at) AS first FROM (
  SELECT started_at FROM attempts UNION ALL SELECT started_at FROM live_runs WHERE state = 'running') s
WHERE started_at > ?
"""


@dataclass(frozen=True)
class Plan:
    """How much befalls the cluster, and for how many seconds its database is away."""

    processes: Amount
    database: dict[str, int]
    outage: float = 0.0


FULL = Plan(
    Amount({"worker": 12, "zygote": 10, "child": 16}, {"worker": 8, "zygote": 6, "child": 10}),
    {"terminate": 15, "fast": 2, "immediate": 2, "outage": 1, "partition": 3},
    outage=30.0,
)
# What else befalls the database, the simulation shows.
SHORT = Plan(
    Amount({"worker": 1, "zygote": 1, "child": 1}, {"worker": 1, "zygote": 1, "child": 1}),
    {"terminate": 1, "immediate": 1, "partition": 1},
)


@pytest.fixture
def proxies(own_postgres: Server) -> Iterator[list[Proxy]]:
    """Between each worker and PostgreSQL."""
    with ExitStack() as stack:
        yield [stack.enter_context(Proxy(own_postgres.port)) for _ in range(WORKERS)]


class Chaos(Storm):
    """A storm that also comes over the database and the way to it."""

    def __init__(self, cluster: Cluster, server: Server, proxies: list[Proxy], seed: int) -> None:
        super().__init__(cluster, [], seed)
        self.server = server
        self.proxies = proxies
        self.outages: list[tuple[datetime, datetime]] = []
        self.first_starts: list[float] = []
        for number in range(WORKERS):
            self.workers.append(self.start(number))
        cluster.wait_for(lambda: all(map(cluster.offers, self.workers)), "all workers", 60.0)

    def start(self, number: int) -> subprocess.Popen[bytes]:
        environment = self.cluster.environment
        through = self.server.url().replace(f":{self.server.port}/", f":{self.proxies[number].port}/")
        environment["WORKER_DATABASE__URL"] = through
        try:
            return self.cluster.start_worker()
        finally:
            del environment["WORKER_DATABASE__URL"]

    def again(self, number: int) -> None:
        worker = self.workers[number] = self.start(number)
        self.cluster.wait_for(lambda: self.cluster.row_of(worker), "a worker in the place of the killed one")

    def come(self, plan: Plan) -> None:
        """All of the plan in random order."""
        faults: list[tuple[str, Any]] = [
            *plan.processes.faults(),
            *((kind, "database") for kind, count in plan.database.items() for _ in range(count)),
        ]
        self.random.shuffle(faults)
        for kind, target in faults:
            match kind:
                case "terminate":
                    self.terminate(self.random.randint(1, 3))
                case "fast":
                    self.away(signal.SIGINT, 0.0)
                case "immediate":
                    self.away(signal.SIGQUIT, 0.0)
                case "outage":
                    self.away(signal.SIGINT, plan.outage)
                case "partition":
                    self.part()
                case _:
                    self.befall(kind, target, self.again)
            time.sleep(self.random.uniform(0.1, 0.8))

    def terminate(self, count: int) -> None:
        """End sessions of workers, whatever they are doing."""
        owners = {port: number for number, proxy in enumerate(self.proxies) for port in list(proxy.ports)}
        sessions = [row for row in self.cluster.query(SESSIONS) if row["client_port"] in owners]
        for session in self.random.sample(sessions, min(count, len(sessions))):
            worker = self.cluster.id_of(self.workers[owners[session["client_port"]]])
            self.cluster.query("SELECT pg_terminate_backend(?)", session["pid"])
            self.cluster.faults.append(Fault("terminate", "session", worker, datetime.now(UTC)))

    def away(self, how: signal.Signals, seconds: float) -> None:
        """Stop PostgreSQL and start it again after so many seconds; then something starts soon."""
        began = datetime.now(UTC)
        self.server.stop(how)
        self.cluster.disconnect()
        gone = datetime.now(UTC)
        # An outage is time that has to pass.
        time.sleep(seconds)
        self.server.start()
        back = datetime.now(UTC)
        self.cluster.faults.append(Fault("outage", "database", "", began, back))
        self.outages.append((gone, back))
        first = self.cluster.wait_for(lambda: self.cluster.query(STARTS, gone)[0]["first"], "a new start")
        self.first_starts.append((first - back).total_seconds())

    def part(self) -> None:
        """Nothing passes between one worker and the database, without a word, until another has its run."""
        # What it has just begun would still act then, if nothing froze it.
        number, begun = self.cluster.wait_for(self.begun, "a run to be parted")
        worker, proxy = self.workers[number], self.proxies[number]
        run, identity, at = str(begun["id"]), str(begun["worker_id"]), datetime.now(UTC)
        proxy.become("hang")
        self.cluster.wait_for(
            lambda: [line for line in self.cluster.lines("start", run) if line["attempt"] > begun["attempt"]],
            "another attempt at the silent worker's run",
        )
        proxy.become("pass")
        self.cluster.faults.append(Fault("partition", "worker", identity, at, datetime.now(UTC)))
        self.cluster.wait_for(
            lambda: worker.poll() is None and self.cluster.id_of(worker) != identity, "its next incarnation"
        )

    def begun(self) -> tuple[int, dict[str, Any]] | None:
        """A run that was begun just now, and the number of its worker."""
        numbers = {self.cluster.id_of(worker): number for number, worker in enumerate(self.workers)}
        for row in self.cluster.query(BEGUN):
            if str(row["worker_id"]) in numbers:
                return numbers[str(row["worker_id"])], row
        return None


@pytest.mark.timeout(1200)
def test_four_workers_lose_and_double_nothing_whatever_befalls_them(
    cluster_at: MakeCluster, own_postgres: Server, proxies: list[Proxy], full: bool
) -> None:
    # With the default poll: the two seconds below are promised for it.
    cluster, plan = cluster_at(own_postgres.url(), poll=1.0), FULL if full else SHORT
    chaos = Chaos(cluster, own_postgres, proxies, seed())
    # Something to start within each second; and what acts for longer than a lease and asks nobody.
    load(cluster, [*STEPS, Load("fault.note", 1.0), Load("fault.acts", 1.0, {"seconds": 6})])

    chaos.come(plan)

    wait_for_the_end(cluster)
    cluster.assert_kept()
    befell = Counter(fault.kind for fault in cluster.faults)
    outcomes = Counter(attempt["outcome"] for attempt in cluster.query("SELECT outcome FROM attempts"))
    told = [
        (back - gone, lines_between(path.read_text(), gone, back))
        for gone, back in chaos.outages
        for path in cluster.logs.values()
    ]
    print(dict(befell), dict(outcomes))
    print("first starts after", [round(first, 2) for first in chaos.first_starts], "s")
    print("most lines of one worker", max((len(lines), away.total_seconds()) for away, lines in told))
    assert befell["kill"] + befell["stop"] == len(plan.processes.faults())
    assert befell["outage"] == len(chaos.outages) == len(chaos.first_starts)
    assert befell["partition"] and befell["terminate"]
    assert outcomes["lost"] or not full
    assert max(chaos.first_starts) <= 2.0, chaos.first_starts
    for away, lines in told:
        # Runs that were admitted just before get their tokens all the same: one request an org.
        requested = Counter(line["org"] for line in lines if line["event"] == "token.requested")
        assert max(requested.values(), default=1) == 1, lines
        others = [line["event"] for line in lines if line["event"] != "token.requested"]
        # That it is lost, that the lease is late, that the runs are frozen; else a line a second.
        assert len(others) <= max(3.0, away.total_seconds()), others


def lines_between(text: str, since: datetime, until: datetime) -> list[dict[str, Any]]:
    """What one worker wrote in an outage, which for it is over when it says so."""
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    during = [line for line in lines if since <= datetime.fromisoformat(line["at"]) <= until]
    return list(takewhile(lambda line: line["event"] != "database.back", during))
