"""A load on a cluster, and a storm of faults that come over its processes while it is carried."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

from tests.fakes.site import application
from tests.faults.cluster import Cluster, Load, Target

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


# For workers that are up: what is lost has to find a free slot at once.
STEPS = tuple(Load("fault.steps", PERIOD, {"steps": 8 + 2 * number}) for number in range(4))


def load(cluster: Cluster, loads: Sequence[Load] = STEPS) -> None:
    """Begin the loads: `load0` in `org_0`, and so on; those of STEPS take a second or more of every two."""
    cluster.add_orgs(*(application(f"org_{number}") for number in range(len(loads))))
    cluster.periods |= {f"load{number}": one.period for number, one in enumerate(loads)}
    cluster.loads = loads
    cluster.apply(definitions(cluster, enabled=True))


def definitions(cluster: Cluster, *, enabled: bool) -> str:
    """The cluster's loads as a file for `apply`."""
    text = ""
    keys = {"misfire": "all", "overlap": "allow", "spread": "off", "enabled": enabled}
    for number, one in enumerate(cluster.loads):
        org = f"org_{number}"
        text += f'[[org]]\ncode = "{org}"\nname = "{org}"\nissuer = "main"\nmax_concurrent_runs = 1000\n'
        placed = keys if one.pool is None else keys | {"pool": one.pool}
        text += cluster.define(
            org, f"load{number}", one.handler, f"every {one.period:g}s", params=one.params, **placed
        )
    return text


def end_load(cluster: Cluster) -> None:
    """Nothing fires any more; what is there comes to its end."""
    cluster.apply(definitions(cluster, enabled=False))


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
            self.befall(kind, target, again)
            time.sleep(self.random.uniform(0.1, 0.8))

    def befall(self, kind: str, target: Target, again: Callable[[int], None]) -> None:
        """One fault, on the next process if the first came to its end by itself just now."""
        number, process = self.cluster.wait_for(lambda: self.pick(target), f"a {target}")
        worker = self.workers[number]
        try:
            if kind == "kill":
                self.cluster.kill(worker, target, process)
            else:
                with self.cluster.stopped(worker, target, process):
                    time.sleep(self.duration(target))
        except psutil.NoSuchProcess:
            self.befall(kind, target, again)
            return
        if (kind, target) == ("kill", "worker"):
            again(number)

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
