"""A handler that nothing can interrupt is gone soon after its timeout, with all it started."""

from __future__ import annotations

import time

import pytest

from tests.faults.cluster import Cluster, alive

TIMEOUT = 2.0
GRACE = 1.0


@pytest.mark.parametrize("handler", ["spin", "spin_async", "sleep_in_c"])
def test_it_is_gone_within_timeout_and_grace_and_a_second(on_file: Cluster, handler: str) -> None:
    cluster = on_file
    keys = {"timeout": "2s", "cancel_grace": "1s", "max_attempts": 1}
    cluster.start(cluster.define("org_acme", handler, f"fault.{handler}", **keys))
    cluster.up()
    run = str(cluster.run_now(handler)["id"])
    start = cluster.wait_for(lambda: cluster.lines("start", run), "its start")[0]

    cluster.wait_for(lambda: not alive(start["pid"]), "its end", TIMEOUT + GRACE + 5.0)
    lasted = time.time() - start["at"]

    assert TIMEOUT <= lasted <= TIMEOUT + GRACE + 1.0
    ended = cluster.wait_for_end(definition=handler)
    assert (ended["state"], ended["reason"], ended["attempt"]) == ("failed", "timed_out", 1)
