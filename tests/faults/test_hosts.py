"""Two workers, two hosts in each of two pools, and all that can befall them; then the history is judged."""

from __future__ import annotations

import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fakes.hosts import opened_hosts
from tests.fakes.ports import free_port
from tests.fakes.postgres import Server
from tests.fakes.temporal import DevServer
from tests.faults.checker import Fault, History
from tests.faults.cluster import Cluster, Load, Target
from tests.faults.conftest import MakeCluster
from tests.faults.proxy import Proxy
from tests.faults.storm import Storm, load, seed, wait_for_the_end

POOLS = ("eu", "gpu")
WORKERS = HOSTS = 2
# A run of which pool has begun just now, on a host.
BEGUN = """
SELECT l.id, l.attempt, l.worker_id FROM live_runs l JOIN workers w ON w.id = l.worker_id
WHERE l.state = 'running' AND l.handler = 'fault.acts' AND w.host_id IS NOT NULL
AND l.started_at > clock_timestamp() - interval '1500 milliseconds'
"""


@dataclass(frozen=True)
class Plan:
    """How much befalls each kind of process, and how often what is between them fails."""

    kills: dict[str, int]
    stops: dict[str, int]
    others: dict[str, int]

    def faults(self) -> list[tuple[str, str]]:
        return [
            *(("kill", target) for target, count in self.kills.items() for _ in range(count)),
            *(("stop", target) for target, count in self.stops.items() for _ in range(count)),
            *((kind, "") for kind, count in self.others.items() for _ in range(count)),
        ]


FULL = Plan(
    {"control": 30, "host": 50, "zygote": 30, "child": 30},
    {"control": 30, "host": 40, "zygote": 20, "child": 20},
    {"outage": 5, "partition": 25, "engine_kill": 10, "engine_stop": 10},
)
SHORT = Plan(
    {"control": 1, "host": 2, "zygote": 1, "child": 1},
    {"control": 1, "host": 1, "zygote": 1},
    {"outage": 1, "partition": 1, "engine_kill": 1},
)


@dataclass
class Host:
    """A host, and what stands between it and each worker."""

    name: str
    pool: str
    ways: list[Proxy]
    process: subprocess.Popen[bytes] | None = None


@dataclass
class Fleet(Storm):
    """A storm over workers, hosts, Temporal, and the ways between them."""

    cluster: Cluster
    server: Server
    engine: DevServer
    stack: ExitStack
    number: int
    hosts: list[Host] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(self.cluster, [], self.number)
        self.processes = self.stack.enter_context(opened_hosts(self.cluster))
        self.ports = [free_port() for _ in range(WORKERS)]
        for number in range(WORKERS):
            self.workers.append(self.start_worker(number))
        self.cluster.wait_for(lambda: all(map(self.cluster.offers, self.workers)), "all workers", 60.0)
        for pool in POOLS:
            for number in range(HOSTS):
                self.hosts.append(self.add_host(f"{pool}-{number}", pool))
        self.cluster.wait_for(
            lambda: all(self.cluster.offers(self.process_of(host)) for host in self.hosts), "all hosts", 60.0
        )

    def start_worker(self, number: int) -> subprocess.Popen[bytes]:
        environment = self.cluster.environment
        environment["WORKER_ATTEMPTS__LISTEN"] = f"127.0.0.1:{self.ports[number]}"
        try:
            return self.cluster.start_worker()
        finally:
            del environment["WORKER_ATTEMPTS__LISTEN"]

    def add_host(self, name: str, pool: str) -> Host:
        host = Host(name, pool, [self.stack.enter_context(Proxy(port)) for port in self.ports])
        self.start_host(host)
        return host

    def start_host(self, host: Host) -> None:
        ports = [way.port for way in host.ways]
        host.process = self.processes.start(host.name, host.pool, "max_children = 100", ports=ports)
        self.cluster.logs[host.process] = self.processes.log(host.name)

    def process_of(self, host: Host) -> subprocess.Popen[bytes]:
        assert host.process is not None
        return host.process

    def come(self, plan: Plan) -> None:
        """All of the plan in random order."""
        faults = plan.faults()
        self.random.shuffle(faults)
        for kind, target in faults:
            match kind:
                case "outage":
                    self.without_database(self.random.uniform(0.0, 2.0))
                case "partition":
                    self.part()
                case "engine_kill":
                    self.without_engine(self.engine.stop, self.engine.start, self.random.uniform(0.0, 3.0))
                case "engine_stop":
                    self.without_engine(self.engine.pause, self.engine.resume, self.random.uniform(0.5, 4.0))
                case _:
                    self.strike_one(kind, target)
            time.sleep(self.random.uniform(0.1, 0.8))

    def strike_one(self, kind: str, target: str) -> None:
        """SIGKILL or SIGSTOP of a worker, or of a host or one of its processes."""
        hosted: Target = "worker" if target == "host" else target  # type: ignore[assignment]
        below: Target = "worker" if target == "control" else hosted
        found = self.cluster.wait_for(lambda: self.pick_of(target, below), f"a {target}")
        owner, process = found
        try:
            if kind == "kill":
                self.cluster.kill(owner, below, process)
            else:
                with self.cluster.stopped(owner, below, process):
                    time.sleep(self.duration(below))
        except psutil.NoSuchProcess:
            self.strike_one(kind, target)
            return
        if (kind, below) == ("kill", "worker"):
            self.again(owner) if target == "control" else self.host_again(owner)

    def pick_of(self, target: str, below: Target) -> tuple[subprocess.Popen[bytes], psutil.Process] | None:
        owners = self.workers if target == "control" else [self.process_of(host) for host in self.hosts]
        for owner in self.random.sample(owners, len(owners)):
            if self.cluster.row_of(owner) and (found := self.cluster.processes(owner, below)):
                return owner, self.random.choice(found)
        return None

    def again(self, killed: subprocess.Popen[bytes]) -> None:
        number = self.workers.index(killed)
        worker = self.workers[number] = self.start_worker(number)
        self.cluster.wait_for(lambda: self.cluster.row_of(worker), "a worker in the place of the killed one")

    def host_again(self, killed: subprocess.Popen[bytes]) -> None:
        host = next(host for host in self.hosts if host.process is killed)
        self.start_host(host)
        process = self.process_of(host)
        self.cluster.wait_for(lambda: self.cluster.row_of(process), "a host in the place of the killed one")

    def without_database(self, seconds: float) -> None:
        """Stop PostgreSQL, and start it again after so many seconds."""
        began = datetime.now(UTC)
        self.server.stop(signal.SIGINT)
        self.cluster.disconnect()
        # An outage is time that has to pass.
        time.sleep(seconds)
        self.server.start()
        self.cluster.faults.append(Fault("outage", "database", "", began, datetime.now(UTC)))

    def without_engine(self, end: Callable[[], None], begin: Callable[[], None], seconds: float) -> None:
        """Temporal is killed or stopped, and goes on after so many seconds."""
        began = datetime.now(UTC)
        end()
        # An outage is time that has to pass.
        time.sleep(seconds)
        begin()
        self.cluster.faults.append(Fault("outage", "engine", "", began, datetime.now(UTC)))

    def part(self) -> None:
        """Nothing passes between one host and the workers, without a word, until another has its run."""
        host, begun = self.cluster.wait_for(self.begun, "a run of a host to be parted")
        run, identity, at = str(begun["id"]), str(begun["worker_id"]), datetime.now(UTC)
        for way in host.ways:
            way.become("hang")
        self.cluster.wait_for(
            lambda: [line for line in self.cluster.lines("start", run) if line["attempt"] > begun["attempt"]],
            "another attempt at the silent host's run",
        )
        for way in host.ways:
            way.become("pass")
        self.cluster.faults.append(Fault("partition", "worker", identity, at, datetime.now(UTC)))
        process = self.process_of(host)
        self.cluster.wait_for(
            lambda: process.poll() is None and self.cluster.id_of(process) != identity, "its next incarnation"
        )

    def begun(self) -> tuple[Host, dict[str, Any]] | None:
        owners = {
            self.cluster.id_of(process): host
            for host in self.hosts
            if self.cluster.row_of(process := self.process_of(host))
        }
        for row in self.cluster.query(BEGUN):
            if str(row["worker_id"]) in owners:
                return owners[str(row["worker_id"])], row
        return None


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[DevServer]:
    """A Temporal server."""
    made = DevServer(tmp_path)
    made.start()
    yield made
    made.stop()


@pytest.mark.timeout(3600)
def test_runs_on_hosts_survive_whatever_befalls_workers_hosts_engine_and_network(
    cluster_at: MakeCluster, own_postgres: Server, engine: DevServer, full: bool
) -> None:
    tables = (
        f'[pools.gpu]\nplacer = "temporal"\n[temporal]\naddress = "{engine.address}"\nplace_timeout = "5s"\n'
    )
    cluster = cluster_at(own_postgres.url(), poll=1.0, execution=tables)
    # `place_timeout`, and the pause after it.
    cluster.placing["gpu"] = timedelta(seconds=7)
    plan = FULL if full else SHORT
    with ExitStack() as stack:
        fleet = Fleet(cluster, own_postgres, engine, stack, seed())
        loads = [
            Load("fault.steps", 2.0, {"steps": 8 + 2 * number}, pool=pool)
            for number in range(2 if full else 1)
            for pool in (*POOLS, "default")
        ]
        load(cluster, [*loads, *(Load("fault.acts", 1.0, {"seconds": 6}, pool=pool) for pool in POOLS)])

        fleet.come(plan)

        wait_for_the_end(cluster)
        cluster.assert_kept()
    history = cluster.history()
    assert effects_after_cut_off(history) == []
    assert runs_in_a_wrong_pool(cluster) == []
    befell = Counter(fault.kind for fault in cluster.faults)
    print(dict(befell), Counter(attempt["outcome"] for attempt in history.attempts))
    assert befell["kill"] == sum(plan.kills.values())
    assert befell["stop"] == sum(plan.stops.values())
    assert befell["partition"] == plan.others["partition"]


def effects_after_cut_off(history: History) -> list[str]:
    """What a run of a silent host did later than a lease and a second after the silence began."""
    owners = {(row["run_id"], row["attempt"]): row["worker_id"] for row in history.attempts}
    late = []
    for fault in history.faults:
        if fault.kind != "partition":
            continue
        last = fault.at + history.lease + timedelta(seconds=1)
        for line in history.journal:
            owner = owners.get((line["run"], line["attempt"]))
            if owner == fault.worker and last < line["at"]:
                late.append(f"run {line['run']}: {line['who']} at {line['at']}, cut off at {fault.at}")
    return late


def runs_in_a_wrong_pool(cluster: Cluster) -> list[dict[str, Any]]:
    """Attempts by a host of another pool than the run's, or by a worker if the pool is one of hosts."""
    return cluster.query(
        "SELECT r.id, r.pool, h.pool AS by FROM attempts a JOIN runs r ON r.id = a.run_id "
        "JOIN workers w ON w.id = a.worker_id LEFT JOIN hosts h ON h.id = w.host_id "
        "WHERE a.handler_started_at IS NOT NULL AND r.pool <> COALESCE(h.pool, 'default')"
    )
