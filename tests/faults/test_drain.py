"""SIGTERM: what cannot end in time is handed back before exit code 0, and goes on from its checkpoint."""

from __future__ import annotations

import json
import subprocess
from datetime import timedelta

import pytest

from tests.faults.cluster import Cluster, instants
from tests.faults.conftest import MakeCluster
from tests.faults.storm import end_load, load

DRAIN = 'drain = "2s"'


@pytest.fixture
def cluster(cluster_at: MakeCluster, migrated_url: str) -> Cluster:
    """Workers with two seconds to drain, on either database."""
    return cluster_at(migrated_url, execution=DRAIN)


def begin(cluster: Cluster) -> subprocess.Popen[bytes]:
    """A worker in the middle of a run that saves and of one that swallows cancellation, each of an hour."""
    params = {"steps": 36_000, "pause": 0.1}
    cluster.start(
        *(cluster.define("org_acme", name, f"fault.{name}", params=params, max_attempts=1) for name in RUNS)
    )
    worker = cluster.up()
    for name in RUNS:
        run = str(cluster.run_now(name)["id"])
        cluster.wait_for(lambda run=run: cluster.saved(run, 1) >= 3, f"three steps of {name}")
    return worker


RUNS = ("polite", "deaf")


def test_a_drain_hands_back_before_the_worker_ends_and_counts_nothing(cluster: Cluster) -> None:
    worker = begin(cluster)

    cluster.drain(worker, timeout=2.0 + 5.0)

    assert [line for line in cluster.log_text().splitlines() if '"level": "error"' in line] == []
    runs = cluster.runs()
    assert [(run["state"], run["reason"], run["attempt"]) for run in runs] == [
        ("waiting", "handed_back", 1)
    ] * 2
    outcomes = [row["outcome"] for row in cluster.query("SELECT * FROM attempts")]
    assert outcomes == ["handed_back"] * 2
    # With one try allowed they go on all the same, each from what it saved.
    cluster.up()
    for run in map(str, (run["id"] for run in runs)):
        cluster.wait_for(lambda run=run: cluster.saved(run, 2), "the second attempt")
        start = next(line for line in cluster.lines("start", run) if line["attempt"] == 2)
        assert start["first"] >= cluster.saved(run, 1) >= 3
    swallowed = cluster.lines("swallowed")
    assert swallowed and all(line["attempt"] == 1 for line in swallowed)
    assert [line["reason"] for line in cluster.lines("handed_back")] == ["drain"]


def test_another_worker_goes_on_within_a_poll(cluster_at: MakeCluster, migrated_postgres_url: str) -> None:
    cluster = cluster_at(migrated_postgres_url, execution=DRAIN)
    first = begin(cluster)
    second = cluster.up()

    cluster.drain(first, timeout=2.0 + 5.0)

    cluster.wait_for(lambda: len(cluster.lines("start")) == 4, "two second attempts")
    seconds = instants(cluster.query("SELECT id, worker_id, started_at FROM live_runs ORDER BY id"))
    ended = {row["run_id"]: row for row in instants(cluster.query("SELECT * FROM attempts"))}
    for live in seconds:
        assert live["worker_id"] == cluster.id_of(second)
        assert ended[live["id"]]["outcome"] == "handed_back"
        assert live["started_at"] - ended[live["id"]]["ended_at"] <= timedelta(seconds=cluster.poll + 1.0)


def busy(cluster: Cluster, worker: subprocess.Popen[bytes]) -> bool:
    return bool(cluster.query("SELECT id FROM live_runs WHERE worker_id = ?", cluster.id_of(worker)))


@pytest.mark.timeout(600)
def test_rolling_restarts_under_load_lose_nothing(on_server: Cluster, full: bool) -> None:
    cluster = on_server
    workers = [cluster.up(), cluster.up()]
    load(cluster)

    for number in range(20 if full else 4):
        old, new = workers[number % 2], cluster.up()
        cluster.wait_for(lambda old=old: busy(cluster, old), "a run of the worker that is drained")
        cluster.drain(old, timeout=60.0)
        workers[number % 2] = new

    end_load(cluster)
    cluster.wait_for(cluster.all_ended, "the end of all runs", 60.0)
    cluster.assert_kept()
    outcomes = {row["outcome"] for row in cluster.query("SELECT * FROM attempts")}
    assert outcomes <= {"succeeded", "handed_back"}, json.dumps(sorted(outcomes))
