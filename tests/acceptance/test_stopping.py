"""A run is stopped by hand, by its timeout or with its org, and the reason says which it was."""

from __future__ import annotations

import time

import pytest

from tests.fakes.handlers import read_journal
from tests.fakes.site import application, definition

# A renewal, the grace, and what a busy machine needs to write it.
SOON = 0.5 + 1.0 + 4.0


@pytest.fixture
def running(site_on_either, journal):
    """A worker that has a run of hours on, and one that waits behind it; the org takes one at a time."""
    site = site_on_either
    site.add_orgs(application("org_a"))
    params = {"journal": str(journal), "steps": 10_000}
    keys = {"params": params, "cancel_grace": "1s", "overlap": "allow"}
    site.apply(
        '[[org]]\ncode = "org_a"\nissuer = "main"\nmax_concurrent_runs = 1\n'
        + definition("org_a", "long", "acme.steps", **keys)
        + definition("org_a", "short", "acme.steps", timeout="1s", max_attempts=1, **keys)
    )
    site.start_worker()
    site.wait_for_handlers("acme.steps")
    return site


def start(site, name: str) -> str:
    run = site.cli("definitions", "run", "org_a", name, "-o", "json").json()
    return run["id"]


def ended(site, definition: str, asked: float) -> tuple[str, str]:
    run = site.wait_for_end(definition=definition)
    assert time.monotonic() - asked < SOON
    return run["state"], run["reason"]


def silent(journal) -> bool:
    before = len(read_journal(journal))
    time.sleep(0.5)
    return len(read_journal(journal)) == before


def test_a_run_that_is_cancelled_ends_within_a_renewal_and_its_grace(running, journal):
    run = start(running, "long")
    running.wait_for_state("long", "running")

    running.cli("runs", "cancel", run)

    assert ended(running, "long", time.monotonic()) == ("cancelled", "requested")
    assert silent(journal)
    assert running.cli("runs", "cancel", run, check=False).code == 5


def test_a_run_past_its_timeout_fails_as_timed_out(running, journal):
    start(running, "short")
    running.wait_for_state("short", "running")

    assert ended(running, "short", time.monotonic() + 1.0) == ("failed", "timed_out")
    assert silent(journal)


def test_a_suspended_orgs_runs_are_cancelled_and_none_starts_until_it_is_resumed(running, journal):
    start(running, "long")
    running.wait_for_state("long", "running")
    start(running, "short")

    running.cli("orgs", "suspend", "org_a", "--note", "unpaid")

    # What waits at once, what is on within a renewal.
    [waiting] = running.runs(definition="short")
    assert (waiting["state"], waiting["reason"]) == ("cancelled", "suspended")
    assert ended(running, "long", time.monotonic()) == ("cancelled", "suspended")
    assert silent(journal)
    assert running.cli("definitions", "run", "org_a", "long", check=False).code == 5
    audited = running.query("SELECT action, detail FROM audit WHERE action LIKE 'org.%' ORDER BY id")
    assert any("suspend" in row["action"] for row in audited)

    running.cli("orgs", "resume", "org_a")
    start(running, "long")
    running.wait_for_state("long", "running")
