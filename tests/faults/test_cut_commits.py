"""The answer to a COMMIT is lost, and the commit is there: nothing is stuck, nothing done twice."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta

import pytest

from tests.faults.cluster import Cluster, instants
from tests.faults.conftest import MakeCluster
from tests.faults.proxy import Proxy
from tests.faults.watches import cutter

# A piece of the statement's text that no other transaction of the worker has.
MARKS = {
    "admit": "pg_advisory_xact_lock",
    "finish": "DELETE FROM live_runs",
    "renew": "UPDATE workers SET renewed_at",
}


@pytest.fixture
def cluster(cluster_at: MakeCluster, migrated_postgres_url: str, proxy: Proxy) -> Cluster:
    """Its workers go through the proxy; the test itself does not."""
    made = cluster_at(migrated_postgres_url)
    made.behind(proxy.port)
    return made


@pytest.mark.simulated
@pytest.mark.parametrize("verb", MARKS)
def test_the_lost_answer_to_a_commit_costs_no_run_and_doubles_none(
    cluster: Cluster, proxy: Proxy, verb: str
) -> None:
    count = 20
    keys = {"misfire": "all", "overlap": "allow", "spread": "off"}
    cluster.start(cluster.define("org_acme", "note", "fault.note", "every 1s", **keys))
    worker = cluster.up()
    cluster.wait_for(lambda: len(cluster.lines("note")) >= 2, "runs before the fault")

    cut = proxy.watch = cutter(MARKS[verb], count)
    proxy.become("reset")
    proxy.become("pass")
    cluster.wait_for(lambda: cut.left == 0, f"{count} lost answers", 120.0)
    seen = len(cluster.lines("note"))
    cluster.wait_for(lambda: len(cluster.lines("note")) >= seen + 2, "runs after the fault")
    cluster.cli("definitions", "pause", "org_acme", "note")
    cluster.wait_for(cluster.all_ended, "the end of all runs")

    assert worker.poll() is None
    history = cluster.history()
    cluster.assert_kept()
    # Only what was admitted without an answer was tried twice, and ran in the second try only.
    outcomes = Counter(attempt["outcome"] for attempt in history.attempts)
    assert set(outcomes) <= {"succeeded", "handed_back"}
    assert max(Counter(line["run"] for line in cluster.lines("note")).values()) == 1
    assert (outcomes["handed_back"] > 0) == (verb == "admit")
    stuck = [
        attempt["ended_at"] - attempt["started_at"]
        for attempt in instants(cluster.query("SELECT * FROM attempts"))
        if attempt["outcome"] == "handed_back"
    ]
    assert max(stuck, default=timedelta(0)) <= timedelta(seconds=2 * cluster.renew + 1.0)
