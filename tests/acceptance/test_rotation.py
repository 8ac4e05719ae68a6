"""Secrets and keys change under load, and no run fails for it; watched from outside."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from tests.fakes.site import Site, application, definition, wait_until
from worker.demo.provider import Fault, Provider

ORGS = [f"org_{number}" for number in range(4)]


@pytest.fixture(scope="module")
def loaded(shared_site: Callable[..., Site], provider: Provider) -> Site:
    """Four orgs with a run each a second, under tokens of ten seconds, and a worker that has begun."""
    site = shared_site('inline = ["acme-jobs"]')
    provider.misbehave(None, "jwks")
    site.add_orgs(*(application(org, lifetime=10) for org in ORGS))
    params = {"journal": str(site.out / "journal")}
    site.apply(
        "".join(
            definition(org, "note", "acme.inline", "every 1s", spread="off", params=params) for org in ORGS
        )
    )
    site.start_worker()
    wait_until(lambda: succeeded(site) >= 4, "the first runs")
    return site


def succeeded(site: Site) -> int:
    count: int = site.query("SELECT COUNT(*) AS n FROM runs WHERE state = 'succeeded'")[0]["n"]
    return count


def held_up(site: Site) -> list[object]:
    """Runs that ended in another way than they should, with what they say."""
    wrong = [run for run in site.runs() if run["state"] in ("failed", "refused", "cancelled")]
    return [(run["org"], run["state"], run["reason"], run["detail"]) for run in wrong]


def go_on(site: Site, runs: int) -> None:
    """Until so many more runs of all orgs have succeeded."""
    wanted = succeeded(site) + runs
    wait_until(lambda: succeeded(site) >= wanted, f"{runs} more runs", timeout=40)


def rotate(site: Site, org: str, client_id: str, secret: str, quiet: str = "2s") -> None:
    site.cli(
        *("credentials", "rotate", org, "--client-id", client_id, "--secret-file", "-", "--quiet", quiet),
        stdin=secret,
    )


def test_a_secret_is_rotated_with_overlap_and_with_a_gap_under_load(loaded: Site, provider: Provider):
    """With overlap the old secret is good until the command ends; in a gap neither is for a while."""
    provider.add(application("org_0", client_id="m2m-new", client_secret="secret-new", lifetime=10))
    rotate(loaded, "org_0", "m2m-new", "secret-new")
    used = provider.token_requests["m2m-org_0"]
    go_on(loaded, 12)

    # The gap: the old secret is revoked, and the new one comes here three seconds later.
    provider.add(application("org_1", client_secret="replaced", lifetime=10))
    time.sleep(3)
    rotate(loaded, "org_1", "m2m-org_1", "replaced")
    go_on(loaded, 12)

    assert held_up(loaded) == []
    # Nobody has asked with the retired generation since.
    assert provider.token_requests["m2m-org_0"] == used
    assert provider.token_requests["m2m-new"] > 0
    for org in ("org_0", "org_1"):
        listed = loaded.cli("credentials", "list", org, "-o", "json").json()
        assert [(row["generation"], row["state"]) for row in listed] == [(2, "active"), (1, "retired")]


def test_the_issuers_key_is_rotated_also_when_it_is_published_late(loaded: Site, provider: Provider):
    before = provider.requests["jwks"]
    provider.keys.rotate()
    go_on(loaded, 12)

    provider.keys.rotate(publish=False)
    late = threading.Timer(5, provider.keys.publish)
    late.start()
    late.join()
    go_on(loaded, 12)

    assert held_up(loaded) == []
    assert provider.requests["jwks"] - before <= 4


def test_an_outage_of_the_issuer_fails_no_run_and_is_caught_up(loaded: Site, provider: Provider):
    """Tokens of ten seconds run out meanwhile: runs wait, the issuer is hardly asked, and all go on."""
    before = provider.requests["token"]
    provider.misbehave(Fault(status=503))
    wait_until(lambda: waiting_without_token(loaded) == len(ORGS), "all orgs without a token")
    asked = provider.requests["token"] - before
    provider.misbehave(None)
    [last] = loaded.query("SELECT MAX(id) AS id FROM runs")
    newer = "SELECT COUNT(DISTINCT org_id) AS n FROM runs WHERE state = 'succeeded' AND id > ?"
    wait_until(lambda: loaded.query(newer, last["id"])[0]["n"] == len(ORGS), "runs of every org", timeout=60)

    assert held_up(loaded) == []
    assert asked <= 20


def waiting_without_token(site: Site) -> int:
    """The number of orgs."""
    waiting = (
        "SELECT COUNT(DISTINCT org_id) AS n FROM live_runs WHERE state = 'waiting' AND reason = 'no_token'"
    )
    count: int = site.query(waiting)[0]["n"]
    return count
