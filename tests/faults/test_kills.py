"""Workers, zygotes and runs are killed and stopped at random under load; then the history is judged."""

from __future__ import annotations

import psycopg
import pytest

from tests.faults.cluster import Cluster
from tests.faults.storm import Amount, Storm, load, seed, wait_for_the_end
from worker.store.dialect import CHANNEL

FULL = Amount({"worker": 20, "zygote": 16, "child": 26}, {"worker": 9, "zygote": 5, "child": 8})
SHORT = Amount({"worker": 3, "zygote": 2, "child": 3}, {"worker": 2, "zygote": 1, "child": 1})


@pytest.mark.simulated
@pytest.mark.timeout(900)
def test_several_workers_on_postgresql_lose_nothing(on_server: Cluster) -> None:
    cluster, amount = on_server, FULL
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


def test_the_other_workers_hear_of_runs_that_were_recovered(on_server: Cluster) -> None:
    """Its finder may have no slot for them; else they waited for one more poll of whoever has."""
    cluster = on_server
    workers = [cluster.up(), cluster.up()]
    cluster.start(cluster.define("org_acme", "acts", "fault.steps", params={"steps": 600}))
    run = str(cluster.run_now("acts")["id"])
    [started] = cluster.wait_for(lambda: cluster.lines("start", run), "the run")
    [row] = cluster.query("SELECT worker_id FROM live_runs WHERE id = ?", run)
    [owner] = [worker for worker in workers if cluster.id_of(worker) == str(row["worker_id"])]
    [process] = cluster.processes(owner, "worker")

    with psycopg.connect(cluster.database_url, autocommit=True) as listener:
        listener.execute(f"LISTEN {CHANNEL}")
        cluster.kill(owner, "worker", process)
        cluster.wait_for(lambda: len(cluster.lines("start", run)) > 1, "its next attempt")
        heard = list(listener.notifies(timeout=5.0, stop_after=1))

    assert started["attempt"] == 1
    assert heard
