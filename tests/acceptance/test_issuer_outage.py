"""98 orgs at one issuer: broken applications stop no other org, and an outage costs little."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.fakes.site import Site, application, definition, wait_until
from worker.demo.provider import Fault, Provider

ORGS = [f"org_{number:02}" for number in range(98)]
BROKEN = ORGS[:3]
HONEST = ORGS[3:]


@pytest.fixture
def many(site: Site, provider: Provider, journal: Path) -> Site:
    """A worker, and neither org nor definition yet."""
    provider.faults.clear()
    provider.token_requests.clear()
    site.configure(execution='inline = ["acme-jobs"]')
    site.start_worker()
    return site


def let_run(site: Site, journal: Path, orgs: list[str], every: str) -> None:
    """A run of each of these orgs at this interval; not all at the same instant."""
    keys = {"params": {"journal": str(journal)}}
    site.apply("".join(definition(org, "note", "acme.inline", f"every {every}", **keys) for org in orgs))


def succeeded_since(site: Site, at: str) -> set[str]:
    """The orgs of which a run was admitted after that time and succeeded."""
    rows = site.query(
        "SELECT DISTINCT code FROM attempts JOIN orgs ON orgs.id = org_id"
        " WHERE outcome = 'succeeded' AND started_at > ?",
        at,
    )
    return {row["code"] for row in rows}


def without_token(site: Site) -> set[str]:
    """The orgs of which a run had to wait for a token."""
    query = "SELECT DISTINCT code FROM attempts JOIN orgs ON orgs.id = org_id WHERE outcome = 'no_token'"
    return {row["code"] for row in site.query(query)}


@pytest.mark.parametrize("fault", [Fault(status=503), Fault(delay=60)], ids=["status", "hang"])
def test_three_broken_applications_stop_no_other_org(
    many: Site, provider: Provider, journal: Path, fault: Fault
) -> None:
    """They fail before the others ask, and again and again; no honest run has to wait for its token."""
    many.add_orgs(*(application(org, lifetime=6) for org in ORGS))
    for org in BROKEN:
        provider.misbehave(fault, f"m2m-{org}")
    let_run(many, journal, BROKEN, "3s")
    wait_until(lambda: len(without_token(many)) >= 2, "two orgs without a token", timeout=60)
    let_run(many, journal, ORGS, "3s")
    wait_until(lambda: succeeded_since(many, "") >= set(HONEST), "a run of each honest org", timeout=60)
    wait_until(
        lambda: sum(provider.token_requests[f"m2m-{org}"] > 1 for org in HONEST) > len(HONEST) * 0.8,
        "a second token of most",
    )

    assert succeeded_since(many, "") == set(HONEST)
    waited = many.query(
        "SELECT max(julianday(token_ready_at) - julianday(started_at)) * 86400 AS seconds FROM attempts"
    )
    assert waited[0]["seconds"] <= 5.0
    assert without_token(many) <= set(BROKEN)


def test_twenty_seconds_of_outage_cost_little_and_all_orgs_run_again(
    many: Site, provider: Provider, journal: Path
) -> None:
    """At most 110 requests; 75 s after it began, each org has had a run again."""
    many.add_orgs(*(application(org, lifetime=15) for org in ORGS))
    let_run(many, journal, ORGS, "10s")
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
