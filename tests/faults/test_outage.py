"""PostgreSQL cannot be reached for far longer than a lease: runs freeze, thaw and finish."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest

from tests.faults.cluster import Cluster
from tests.faults.conftest import MakeCluster
from tests.faults.proxy import Mode, Proxy

LEASE = 5.0
RENEW = 1.0


@pytest.fixture
def cluster(cluster_at: MakeCluster, migrated_postgres_url: str, proxy: Proxy) -> Cluster:
    """Its workers go through the proxy; the test itself does not."""
    made = cluster_at(migrated_postgres_url, lease=LEASE, renew=RENEW)
    made.behind(proxy.port)
    return made


@pytest.mark.parametrize("mode", ["refuse", "hang"])
def test_runs_freeze_thaw_and_finish_through_an_outage(
    cluster: Cluster, proxy: Proxy, full: bool, mode: Mode
) -> None:
    """Two workers, so that one could take the other's runs; timeouts do not count frozen time."""
    done = cluster.folder / "done"
    params = {"until": str(done), "steps": 200, "pause": 0.1}
    names = [("effects", "fault.effects"), ("effects2", "fault.effects"), ("saving", "fault.steps")]
    cluster.start(
        *(cluster.define("org_acme", name, handler, params=params, timeout="40s") for name, handler in names)
    )
    workers = [cluster.up(), cluster.up()]
    runs = [str(cluster.run_now(name)["id"]) for name, _ in names]
    for run in runs:
        cluster.wait_for(lambda run=run: cluster.lines(run=run), "the run's start")

    began = time.time()
    proxy.become(mode)
    time.sleep(60.0 if full else 15.0)
    ended = time.time()
    frozen = [line for line in cluster.lines() if began + LEASE < line["at"] < ended]
    proxy.become("pass")

    for run in runs:
        cluster.wait_for(
            lambda run=run: [line for line in cluster.lines(run=run) if line["at"] > ended], "the thawed run"
        )
    done.touch()
    cluster.wait_for(cluster.all_ended, "the ends of all runs", 60.0)
    cluster.assert_kept()
    assert frozen == []
    outcomes = [(row["attempt"], row["outcome"]) for row in cluster.query("SELECT * FROM attempts")]
    assert outcomes == [(1, "succeeded")] * 3
    for worker in workers:
        cluster.drain(worker)


def test_connections_that_fall_silent_cost_no_lease(cluster: Cluster, proxy: Proxy) -> None:
    """After a failover the old connections answer no more and do not end; others are found in time."""
    done = cluster.folder / "done"
    params = {"until": str(done)}
    cluster.start(cluster.define("org_acme", "effects", "fault.effects", params=params))
    workers = [cluster.up(), cluster.up()]
    run = str(cluster.run_now("effects")["id"])
    cluster.wait_for(lambda: cluster.lines(run=run), "the run's start")
    # Both workers are in contact for long enough to take each other's runs.
    time.sleep(LEASE + 0.5)

    began = time.time()
    proxy.stall()
    time.sleep(3 * LEASE)
    done.touch()

    cluster.wait_for(cluster.all_ended, "the end of the run")
    cluster.assert_kept()
    assert [(row["attempt"], row["outcome"]) for row in cluster.attempts(run)] == [(1, "succeeded")]
    assert max_gap([line["at"] for line in cluster.lines("effect", run) if line["at"] > began]) < LEASE
    assert all(worker.poll() is None for worker in workers)


def max_gap(instants: list[float]) -> float:
    return max(later - earlier for earlier, later in pairwise(instants))
