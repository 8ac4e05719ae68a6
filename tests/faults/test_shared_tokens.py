"""`kill -9` of the worker that requests a token for all: another one requests it within a lease."""

from __future__ import annotations

import time

from tests.fakes.site import application
from tests.faults.conftest import MakeCluster
from worker.demo.provider import Fault, Provider

LEASE = 20.0
CLIENT = "m2m-org_acme"


def test_another_worker_requests_the_token_of_a_killed_one(
    cluster_at: MakeCluster, migrated_postgres_url: str, provider: Provider
) -> None:
    """One request more, and the run of the killed worker shares it too."""
    cluster = cluster_at(migrated_postgres_url, lease=LEASE)
    # One run a worker, so that both need the token.
    cluster.execution = "max_children = 1"
    cluster.write_settings()
    cluster.add_orgs(application("org_acme"))
    definitions = [cluster.define("org_acme", name, "fault.note") for name in ("one", "two")]
    cluster.apply("\n".join(definitions), "--allow-unknown-handlers")
    workers = {cluster.id_of(worker): worker for worker in (cluster.up(), cluster.up())}
    # Its contact of a whole lease is time that has to pass, and no state to wait for.
    time.sleep(LEASE + 1)
    provider.misbehave(Fault(delay=8.0, times=1), CLIENT)
    before = provider.token_requests[CLIENT]
    for name in ("one", "two"):
        cluster.run_now(name)
    running = "SELECT DISTINCT worker_id FROM live_runs WHERE state = 'running'"
    cluster.wait_for(lambda: len(cluster.query(running)) == 2, "a run on each worker")
    cluster.wait_for(lambda: provider.token_requests[CLIENT] == before + 1, "the first request")
    [reserved] = cluster.query("SELECT reserved_by FROM access_tokens")
    fetcher = workers[reserved["reserved_by"]]

    cluster.kill(fetcher, "worker", cluster.processes(fetcher, "worker")[0])
    killed_at = time.monotonic()
    cluster.wait_for(lambda: provider.token_requests[CLIENT] == before + 2, "the second request")
    requested_after = time.monotonic() - killed_at
    cluster.wait_for(cluster.all_ended, "the end of both runs", timeout=3 * LEASE)

    assert requested_after <= LEASE
    assert provider.token_requests[CLIENT] == before + 2
    assert {run["state"] for run in cluster.runs()} == {"succeeded"}
