"""Tokens outlive the worker that requested them: a restart and a second worker request none again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes.handlers import install_handlers
from tests.fakes.site import Site, application, definition, opened, wait_until
from worker.demo.provider import Provider

ORGS = [f"org_{number}" for number in range(3)]


@pytest.fixture
def issued(provider: Provider) -> Callable[[], int]:
    """The number of tokens that the provider issued since the test began."""
    before = len(provider.issued)
    return lambda: len(provider.issued) - before


def install(site: Site, extra: str = "") -> None:
    site.add_orgs(*(application(org) for org in ORGS))
    site.configure(execution='inline = ["acme-jobs"]', extra=extra)
    keys = {"spread": "off", "params": {"journal": str(site.out / "journal")}}
    site.apply("".join(definition(org, "note", "acme.inline", "every 1s", **keys) for org in ORGS))


def run_for_all(site: Site) -> None:
    """Start a worker, and stop it once another run of each org has succeeded."""
    wanted = {org: succeeded(site, org) + 1 for org in ORGS}
    worker = site.start_worker()
    for org, count in wanted.items():
        wait_until(lambda org=org, count=count: succeeded(site, org) >= count, f"a run of {org}")
    site.stop_worker(worker)


def succeeded(site: Site, org: str) -> int:
    return sum(run["state"] == "succeeded" for run in site.runs(org))


def test_a_restart_requests_no_token_again(site: Site, issued: Callable[[], int]):
    install(site)
    run_for_all(site)
    first = issued()

    run_for_all(site)

    assert (first, issued()) == (len(ORGS), len(ORGS))


def test_unless_tokens_are_not_shared(site: Site, issued: Callable[[], int]):
    """The control, and nothing is stored."""
    install(site, extra="[tokens]\nshared = false")
    run_for_all(site)
    run_for_all(site)

    assert issued() == 2 * len(ORGS)
    assert site.query("SELECT COUNT(*) AS n FROM access_tokens") == [{"n": 0}]


def test_dropped_tokens_are_requested_again(site: Site, issued: Callable[[], int]):
    """As after a restored backup."""
    install(site)
    run_for_all(site)

    dropped = site.cli("tokens", "drop", "--all", "-o", "json").json()
    run_for_all(site)

    assert dropped == {"org": None, "dropped": len(ORGS)}
    assert issued() == 2 * len(ORGS)


@pytest.fixture
def postgres_site(tmp_path: Path, provider: Provider, migrated_postgres_url: str) -> Iterator[Site]:
    with opened(Site(tmp_path, migrated_postgres_url, provider)) as made:
        made.configure()
        install_handlers(made.plugins)
        made.migrate()
        yield made


def test_two_workers_share_one_request_per_org(postgres_site: Site, issued: Callable[[], int]):
    site = postgres_site
    install(site)
    workers = [site.start_worker() for _ in range(2)]
    for org in ORGS:
        wait_until(lambda org=org: succeeded(site, org) >= 3, f"runs of {org}")
    for worker in workers:
        site.stop_worker(worker)

    assert issued() == len(ORGS)
