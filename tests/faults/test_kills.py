"""Workers, zygotes and runs are killed and stopped at random under load; then the history is judged."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import pytest

from tests.fakes.site import application
from tests.faults.cluster import Cluster, Target

PERIOD = 2.0  # of the load's schedules, in seconds


@dataclass(frozen=True)
class Amount:
    """How much befalls a cluster: kills and stops of each kind of process."""

    kills: dict[Target, int]
    stops: dict[Target, int]

    def faults(self) -> list[tuple[str, Target]]:
        return [
            *(("kill", target) for target, count in self.kills.items() for _ in range(count)),
            *(("stop", target) for target, count in self.stops.items() for _ in range(count)),
        ]


FULL = Amount({"worker": 20, "zygote": 16, "child": 26}, {"worker": 9, "zygote": 5, "child": 8})
SHORT = Amount({"worker": 3, "zygote": 2, "child": 3}, {"worker": 2, "zygote": 1, "child": 1})


def load(cluster: Cluster) -> None:
    """Four orgs with a definition each that is due every two seconds and runs for one or more.

    For workers that are up: what is lost has to find a free slot at once.
    """
    orgs = [f"org_{number}" for number in range(4)]
    cluster.add_orgs(*map(application, orgs))
    text = ""
    for number, org in enumerate(orgs):
        name, params = f"load{number}", {"steps": 8 + 2 * number}
        keys = {"misfire": "all", "overlap": "allow", "spread": "off"}
        text += f'[[org]]\ncode = "{org}"\nname = "{org}"\nissuer = "main"\nmax_concurrent_runs = 1000\n'
        text += cluster.define(org, name, "fault.steps", "every 2s", params=params, **keys)
        cluster.periods[name] = PERIOD
    cluster.apply(text)


def end_load(cluster: Cluster) -> None:
    """Nothing fires any more; what is there comes to its end."""
    for name in cluster.periods:
        cluster.cli("definitions", "pause", f"org_{name[-1]}", name)


class Storm:
    """One fault after another, on whatever process of the wanted kind there is."""

    def __init__(self, cluster: Cluster, workers: list[subprocess.Popen[bytes]], seed: int) -> None:
        self.cluster = cluster
        self.workers = workers
        self.random = random.Random(seed)

    def strike(self, faults: list[tuple[str, Target]], again: Callable[[int], None]) -> None:
        """All faults in random order; `again` replaces a killed worker by its number."""
        self.random.shuffle(faults)
        for kind, target in faults:
            number, process = self.cluster.wait_for(lambda target=target: self.pick(target), f"a {target}")
            worker = self.workers[number]
            try:
                if kind == "kill":
                    self.cluster.kill(worker, target, process)
                else:
                    with self.cluster.stopped(worker, target, process):
                        time.sleep(self.duration(target))
            except psutil.NoSuchProcess:  # it came to its end by itself just now
                faults.append((kind, target))
                continue
            if (kind, target) == ("kill", "worker"):
                again(number)
            time.sleep(self.random.uniform(0.1, 0.8))

    def pick(self, target: Target) -> tuple[int, psutil.Process] | None:
        numbers = list(range(len(self.workers)))
        self.random.shuffle(numbers)
        for number in numbers:
            if found := self.cluster.processes(self.workers[number], target):
                return number, self.random.choice(found)
        return None

    def duration(self, target: Target) -> float:
        # Of a worker every third time longer than its lease.
        if target == "worker" and self.random.random() < 0.34:
            return 1.3 * self.cluster.lease
        return self.random.uniform(0.1, 0.6) * self.cluster.lease


def seed() -> int:
    """Another one each time; printed with a failure, and given back by FAULTS_SEED."""
    given = int(os.environ.get("FAULTS_SEED", random.randrange(1_000_000)))
    print(f"FAULTS_SEED={given}")
    return given


def wait_for_the_end(cluster: Cluster) -> None:
    end_load(cluster)
    cluster.wait_for(cluster.all_ended, "the end of all runs", 60.0)


@pytest.mark.timeout(900)
def test_several_workers_on_postgresql_lose_nothing(on_server: Cluster, full: bool) -> None:
    cluster, amount = on_server, FULL if full else SHORT
    workers = [cluster.start_worker() for _ in range(3)]
    cluster.wait_for(lambda: all(map(cluster.offers, workers)), "three workers", 60.0)
    load(cluster)
    storm = Storm(cluster, workers, seed())

    def again(number: int) -> None:
        workers[number] = cluster.start_worker()
        cluster.wait_for(lambda: cluster.row_of(workers[number]), "a worker in the place of the killed one")

    storm.strike(amount.faults(), again)

    wait_for_the_end(cluster)
    cluster.assert_kept()
    assert len(cluster.faults) == len(amount.faults())


@pytest.mark.timeout(900)
def test_one_worker_restarted_on_sqlite_loses_nothing(on_file: Cluster, full: bool) -> None:
    cluster, amount = on_file, FULL if full else SHORT
    workers = [cluster.up()]
    load(cluster)
    storm = Storm(cluster, workers, seed())

    def again(number: int) -> None:
        workers[number] = cluster.up()

    storm.strike(amount.faults(), again)

    wait_for_the_end(cluster)
    cluster.assert_kept()
    assert len(cluster.faults) == len(amount.faults())
