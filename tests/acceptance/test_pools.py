"""Pools with a real worker: runs wait for one of their pool, and go only where their token allows."""

from __future__ import annotations

from tests.fakes.handlers import read_journal
from tests.fakes.site import Site, application, definition, wait_until

RULES = '[pools.eu]\nrequires = { region = "eu" }'


def test_runs_go_where_their_pool_is_served_and_their_token_allows_it(site: Site, journal) -> None:
    params = {"params": {"journal": str(journal)}}
    site.add_orgs(
        application("org_eu", properties={"region": "eu"}),
        application("org_us", properties={"region": "us"}),
        pool="eu",
    )
    site.configure(execution='pools = ["default", "eu"]', extra=RULES)
    worker = site.start_worker()
    site.apply(
        definition("org_eu", "note", "acme.note", **params)
        + definition("org_us", "note", "acme.note", **params)
        + definition("org_eu", "trained", "acme.note", pool="eu-gpu", **params)
    )
    for org, name in (("org_eu", "note"), ("org_us", "note"), ("org_eu", "trained")):
        site.cli("definitions", "run", org, name)

    allowed, refused = site.wait_for_end("org_eu", "note"), site.wait_for_end("org_us", "note")
    assert (allowed["state"], allowed["pool"]) == ("succeeded", "eu")
    assert (refused["state"], refused["reason"], refused["detail"]) == ("refused", "pool_mismatch", "region")
    assert site.attempts(refused["id"])[0]["handler_started_at"] is None
    assert [line["org"] for line in read_journal(journal)] == ["org_eu"]

    waiting = wait_until(
        lambda: [run for run in site.runs("org_eu", "trained") if run["reason"] == "no_pool"],
        "a run whose pool is not served",
    )
    assert "no worker or host serves pool eu-gpu" in site.cli("runs", "why", waiting[0]["id"]).out
    assert site.cli("runs", "list", "--pool", "eu-gpu", "-o", "id").out.split() == [waiting[0]["id"]]
    assert "eu-gpu" in site.cli("doctor", check=False).out
    listed = {row["name"]: row for row in site.cli("pools", "list", "-o", "json").json()}
    assert (listed["eu-gpu"]["waiting"], listed["eu-gpu"]["workers"]) == (1, 0)
    assert listed["eu"]["requires"] == {"region": "eu"}

    checked = site.cli("orgs", "check", "org_us", check=False)
    assert checked.code == 1
    assert "runs of note are refused in pool eu: it requires region = eu" in checked.out
    assert "region" not in site.cli("orgs", "check", "org_eu").err

    # Rules stay with the database: this worker has none in its configuration.
    assert site.stop_worker(worker) == 0
    site.configure(execution='pools = ["eu", "eu-gpu"]')
    site.start_worker()
    assert site.wait_for_end("org_eu", "trained")["state"] == "succeeded"
    again = site.cli("runs", "retry", refused["id"], "-o", "id").out.strip()
    run = wait_until(
        lambda: [each for each in site.runs("org_us") if each["id"] == again and each["finished_at"]],
        "the end of the retry",
    )
    assert (run[0]["state"], run[0]["reason"]) == ("refused", "pool_mismatch")
