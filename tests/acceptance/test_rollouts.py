"""A rollout on a real worker that is killed: a version that becomes worse at a known instant is halted."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import on_either
from tests.fakes.site import Site, application, wait_until
from worker.clock import from_text

# As many as a gate can run; ORGS = 300 is what the benchmark page has.
ORGS = 60
FILE = """
[[template]]
name = "digest"
orgs = "all"
handler = "acme.v1"
schedule = "every 5s"
params = {{ worse = "{worse}" }}

[[rollout]]
name = "digest-v2"
definitions = "digest"
from = "acme.v1"
to = "acme.v2"
steps = ["40%", "100%"]
watch = {{ failed = "+2 points", refused = "+1 point" }}
"""


def counted(site: Site, where: str = "1 = 1") -> int:
    [row] = site.query(f"SELECT count(*) AS n FROM run_versions WHERE {where}")
    return int(row["n"])


def wait_for(probe: Callable[[], Any], what: str) -> Any:
    return wait_until(probe, what, timeout=240.0)


@pytest.mark.timeout(900)
@on_either
def test_a_version_that_becomes_worse_is_halted(site_on_either: Site):
    site = site_on_either
    site.configure(execution='lease = "6s"\nrenew = "1s"\npoll = "500ms"\ninline = ["acme-jobs"]')
    worse = site.out / "worse"
    site.add_orgs(*(application(f"org_{number}") for number in range(ORGS)))
    worker = site.start_worker()
    site.wait_for_handlers("acme.v1", "acme.v2")
    site.apply(FILE.format(worse=worse))
    ended = "SELECT count(*) AS n FROM runs WHERE state IS NOT NULL"
    wait_for(lambda: site.query(ended)[0]["n"] >= 3 * ORGS, "a time before")

    site.cli("rollouts", "advance", "digest-v2", "--reason", "try it")
    wait_for(lambda: counted(site, "counted") > ORGS, "runs of both versions")
    assert counted(site, "side = 'to'") > 0
    worker.kill()
    worker.wait()
    began = time.time()
    worse.touch()
    site.start_worker()
    wait_for(
        lambda: site.query("SELECT state FROM rollouts")[0]["state"] == "halted", "the rollout to be halted"
    )
    [rollout] = site.query("SELECT * FROM rollouts")
    halted_at = rollout["halted_at"]
    wait_for(lambda: _later(site, halted_at) >= ORGS, "runs after the halt")

    assert rollout["halted_by"] == "worker"
    instant = from_text(halted_at) if isinstance(halted_at, str) else halted_at
    assert instant.timestamp() >= began
    # No run that starts after the halt has the new version, and each has one, by which all its attempts ran.
    assert site.query("SELECT run_id FROM run_versions WHERE started_at > ? AND side = 'to'", halted_at) == []
    assert (
        site.query(
            "SELECT r.id FROM runs r JOIN attempts a ON a.run_id = r.id "
            "LEFT JOIN run_versions v ON v.run_id = r.id "
            "WHERE v.run_id IS NULL AND a.attempt = 1 AND a.handler_started_at > ?",
            rollout["began_at"],
        )
        == []
    )
    assert (
        site.query(
            "SELECT v.run_id FROM run_versions v JOIN attempts a ON a.run_id = v.run_id "
            "WHERE a.handler <> v.handler AND a.handler_started_at IS NOT NULL"
        )
        == []
    )
    # The evidence is a recount of the runs.
    shown = site.cli("rollouts", "show", "digest-v2", "-o", "json").json()
    totals = shown["evidence"]["totals"]
    rows = site.query(
        "SELECT v.side, count(*) AS runs, count(DISTINCT v.org_id) AS orgs, "
        "sum(CASE WHEN r.state = 'failed' THEN 1 ELSE 0 END) AS failed "
        "FROM run_versions v JOIN runs r ON r.id = v.run_id "
        "WHERE v.counted AND v.step = 1 AND r.state IN ('succeeded', 'failed') "
        "AND NOT (r.state = 'failed' AND r.reason = 'lost') GROUP BY v.side"
    )
    assert {row["side"] for row in rows} == {"from", "to"}
    for row in rows:
        of = totals[row["side"]]
        assert (of["orgs"], of["metrics"]["failed"]["runs"]) == (row["orgs"], row["runs"])
        assert of["metrics"]["failed"]["total"] == row["failed"]
    # No org has moved twice: once on the new version, it has no run of the old one before the halt.
    assert (
        site.query(
            "SELECT o.org_id FROM run_versions o "
            "JOIN run_versions n ON n.org_id = o.org_id AND n.side = 'to' "
            "WHERE o.why = 'step' AND o.side = 'from' AND o.started_at > n.started_at AND o.started_at < ?",
            halted_at,
        )
        == []
    )
    [moved] = site.query("SELECT id FROM run_view WHERE handler = 'acme.v1' ORDER BY id DESC LIMIT 1")
    assert "digest-v2" in site.cli("runs", "why", str(moved["id"])).out


def _later(site: Site, at: Any) -> int:
    return int(site.query("SELECT count(*) AS n FROM run_versions WHERE started_at > ?", at)[0]["n"])
