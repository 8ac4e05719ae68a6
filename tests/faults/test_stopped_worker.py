"""SIGSTOP of a worker's own pid: its lease passes while its runs' processes stay awake."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from tests.faults.cluster import Cluster


def test_no_effect_of_a_stopped_workers_runs_comes_later_than_its_lease(on_server: Cluster) -> None:
    """The zygote freezes the run and its own child; what wakes up again is killed before it acts."""
    cluster = on_server
    done = cluster.folder / "done"
    cluster.start(
        *(cluster.define("org_acme", f"e{n}", "fault.effects", params={"until": str(done)}) for n in range(3))
    )
    first = cluster.up()
    runs = [cluster.run_now(f"e{n}")["id"] for n in range(3)]
    for run in runs:
        cluster.wait_for(lambda run=run: cluster.lines("grandchild", str(run)), "a process of the run's own")
    second = cluster.up()
    # Its contact of a whole lease is time that has to pass, and no state to wait for.
    time.sleep(cluster.lease + 0.5)

    stopped_at = time.time()
    identity = cluster.id_of(first)
    with cluster.stopped(first, "worker", cluster.processes(first, "worker")[0]):
        time.sleep(1.3 * cluster.lease)
    continued_at = datetime.now(UTC)
    for run in runs:
        cluster.wait_for(lambda run=run: cluster.lines("start", str(run))[1:], "the second attempt")
    # The fenced worker has had the time of several renewals to do something wrong.
    time.sleep(4 * cluster.renew)
    done.touch()
    cluster.wait_for(cluster.all_ended, "the end of all runs")

    before = [line["at"] for line in cluster.lines() if line["attempt"] == 1]
    assert max(before) <= stopped_at + cluster.lease + 1.0
    cluster.assert_kept()
    by_first = cluster.query("SELECT * FROM attempts WHERE worker_id = ? ORDER BY run_id", identity)
    assert [(row["attempt"], row["outcome"]) for row in by_first] == [(1, "lost")] * 3
    assert not [
        row
        for row in cluster.query("SELECT * FROM run_logs")
        if row["attempt"] == 1 and row["at"] > continued_at
    ]
    # It begins anew, and carries what comes next.
    cluster.drain(second)
    cluster.run_now("e0")
    at_once = "SELECT * FROM attempts WHERE attempt = 1 AND outcome = 'succeeded'"
    again = cluster.wait_for(lambda: cluster.query(at_once), "a run of the first worker")
    assert str(again[0]["worker_id"]) == cluster.id_of(first) != identity
