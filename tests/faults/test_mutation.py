"""The suite itself on trial: with the fence taken out of one statement, the checker objects."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.faults.checker import judge
from tests.faults.cluster import Cluster
from tests.faults.conftest import MakeCluster
from tests.faults.proxy import Proxy
from tests.faults.watches import holder

STEPS = 4
# The whole stop has to be shorter than the ten seconds after which the held statement's own client gives up.
LEASE = 1.6
RENEW = 0.4
UNCOMMITTED = """
SELECT pid FROM pg_stat_activity WHERE datname = current_database()
AND state = 'idle in transaction' AND query LIKE '%INSERT INTO checkpoints%'
"""
# The held statement leaves its transaction idle for longer than a worker's session may be.
PATIENT = "application_name=patient&options=-c%20idle_in_transaction_session_timeout=0"
# Sessions of the first worker that are within a transaction.
BUSY = """
SELECT pid FROM pg_stat_activity WHERE datname = current_database()
AND application_name = 'patient' AND state <> 'idle'
"""


@pytest.mark.parametrize("launcher", ["worker", "tests.faults.launcher"])
def test_a_late_save_is_refused_and_without_its_fence_objected_to(
    cluster_at: MakeCluster, migrated_postgres_url: str, proxy: Proxy, launcher: str
) -> None:
    """A save is on its way while its worker loses the run; it arrives when the next owner has saved more."""
    cluster = cluster_at(migrated_postgres_url, lease=LEASE, renew=RENEW)
    cluster.launcher = launcher
    third, done = cluster.folder / "third", cluster.folder / "done"
    params = {"third": str(third), "until": str(done), "steps": STEPS, "pause": 0.02}
    cluster.start(cluster.define("org_acme", "steps", "fault.steps", params=params))
    held = proxy.watch = holder("INSERT INTO checkpoints")
    held.left = 0
    cluster.behind(proxy.port, PATIENT)
    first = cluster.up()
    run = str(cluster.run_now("steps")["id"])
    cluster.wait_for(lambda: cluster.saved(run, 1) == 2, "the second step")
    cluster.write_settings()
    second = cluster.up()

    held.left = 1
    third.touch()
    cluster.wait_for(lambda: held.left == 0, "the third save, on its way")
    with stopped(cluster, first):
        cluster.wait_for(lambda: cluster.saved(run, 2) == STEPS, "all steps in the second attempt")
        proxy.let_go()
        cluster.wait_for(lambda: cluster.query(UNCOMMITTED), "the late save in the database")
    cluster.wait_for(lambda: not cluster.query(UNCOMMITTED), "its commit")
    cluster.wait_for(lambda: len(cluster.rows_of(first)) == 2, "the next incarnation of the first worker")
    done.touch()
    cluster.wait_for(cluster.all_ended, "the end of the run")

    objections = judge(cluster.history())
    if launcher == "worker":
        assert objections == []
    else:
        assert any("overwritten late" in found for found in objections), objections
    assert second.poll() is None


@contextmanager
def stopped(cluster: Cluster, worker: subprocess.Popen[bytes]) -> Iterator[None]:
    """Stopped while the save is all that it has under way.

    A renewal that is cut off in the middle would keep its locks for as long as the save is held.
    """
    while True:
        with cluster.stopped(worker, "worker", cluster.processes(worker, "worker")[0]):
            busy = len(cluster.query(BUSY))
            assert busy, "the save was given up before the worker was stopped with nothing else under way"
            if busy == 1:
                yield
                return
        time.sleep(0.1)  # a renewal comes to its end, and the next one is later
