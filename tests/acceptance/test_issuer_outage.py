"""98 orgs at one issuer: broken applications stop no other org, and an outage costs little."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.fakes.site import Site, application, definition, wait_until
from worker.demo.applications import Fault
from worker.demo.provider import Provider

ORGS = [f"org_{number:02}" for number in range(98)]
BROKEN, HONEST = ORGS[:3], ORGS[3:]


@pytest.fixture
def many(site: Site, provider: Provider, journal: Path) -> Site:
    """98 orgs with a run each every ten seconds, under tokens of 15 s; the worker is not started yet."""
    provider.faults.clear()
    site.configure(execution='inline = ["acme-jobs"]')
    site.add_orgs(*(application(org, lifetime=15) for org in ORGS))
    site.apply(
        "".join(
            definition(org, "note", "acme.inline", "every 10s", params={"journal": str(journal)})
            for org in ORGS
        )
    )
    return site


def succeeded_since(site: Site, at: str) -> set[str]:
    """The orgs of which a run was admitted after that time and succeeded."""
    rows = site.query(
        "SELECT DISTINCT code FROM attempts JOIN orgs ON orgs.id = org_id"
        " WHERE outcome = 'succeeded' AND started_at > ?",
        at,
    )
    return {row["code"] for row in rows}


@pytest.mark.parametrize("fault", [Fault(status=503), Fault(delay=60)], ids=["status", "hang"])
def test_three_broken_applications_stop_no_other_org(many: Site, provider: Provider, fault: Fault) -> None:
    """They ask before the others, and again and again; every honest org has its token within five seconds."""
    for org in BROKEN:
        provider.misbehave(fault, f"m2m-{org}")
        many.cli("definitions", "run", org, "note")
    many.start_worker()
    wait_until(lambda: succeeded_since(many, "") >= set(HONEST), "a run of each honest org", timeout=60)
    time.sleep(10)  # for a second token of most

    assert succeeded_since(many, "") == set(HONEST)
    waited = many.query(
        "SELECT max(julianday(token_ready_at) - julianday(started_at)) * 86400 AS seconds FROM attempts"
    )
    assert waited[0]["seconds"] <= 5.0
    without = many.query(
        "SELECT DISTINCT code FROM attempts JOIN orgs ON orgs.id = org_id WHERE outcome = 'no_token'"
    )
    assert {row["code"] for row in without} <= set(BROKEN)


def test_twenty_seconds_of_outage_cost_little_and_all_orgs_run_again(many: Site, provider: Provider) -> None:
    """At most 110 requests; 75 s after it began, each org has had a run again."""
    many.start_worker()
    wait_until(lambda: succeeded_since(many, "") == set(ORGS), "a run of each org", timeout=60)
    before, began = provider.requests["token"], time.monotonic()
    provider.misbehave(Fault(status=503))
    time.sleep(20)
    provider.misbehave(None)
    asked = provider.requests["token"] - before
    [now] = many.query("SELECT strftime('%Y-%m-%dT%H:%M:%fZ', 'now') AS text")

    wait_until(
        lambda: succeeded_since(many, now["text"]) == set(ORGS),
        "a run of each org after the outage",
        timeout=75 - (time.monotonic() - began),
    )

    assert asked <= 110
    log = many.log_text()
    assert log.count("issuer.paused") == log.count("issuer.resumed") == 1
    assert not many.query("SELECT * FROM attempts WHERE outcome NOT IN ('succeeded', 'no_token')")
