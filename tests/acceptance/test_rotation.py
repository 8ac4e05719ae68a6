"""Secrets and keys change under load, and no run fails for it; watched from outside."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from tests.fakes.plugins import make_plugin
from tests.fakes.site import Site, application, definition, wait_until
from worker.demo.provider import Fault, Provider
from worker.operations.properties import _record
from worker.settings import load
from worker.wiring import open_database

ORGS = [f"org_{number}" for number in range(4)]


@pytest.fixture
def loaded(site: Site, provider: Provider) -> Iterator[Site]:
    """Four orgs with a run each a second, under tokens of six seconds, and a worker that has begun."""
    provider.misbehave(None, "jwks")
    site.add_orgs(*(application(org, lifetime=6) for org in ORGS))
    site.configure(execution='inline = ["acme-jobs"]')
    params = {"journal": str(site.out / "journal")}
    site.apply(
        "".join(
            definition(org, "note", "acme.inline", "every 1s", spread="off", params=params) for org in ORGS
        )
    )
    worker = site.start_worker()
    wait_until(lambda: succeeded(site) >= 4, "the first runs")
    yield site
    site.stop_worker(worker)


WATCHER = """
import asyncio
from worker import job

@job("acme.watch", scopes={"read:kb"})
async def watch(ctx):
    while not ctx.flag("agent-v2"):
        await ctx.token()
        await asyncio.sleep(0.1)
    return {"client_id": ctx.claims.client_id}
"""
QUICK = {"spread": "off", "params": {"url": "http://127.0.0.1:9/", "seconds": 0}}


def install_watcher(site: Site) -> None:
    """A handler that goes on until a flag is on, asking for its token all the while."""
    entry_points = {"acme.watch": "acme_watch:watch"}
    make_plugin(site.plugins, dist="acme-watch", modules={"acme_watch": WATCHER}, entry_points=entry_points)


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
    provider.add(application("org_0", client_id="m2m-new", client_secret="secret-new", lifetime=6))
    rotate(loaded, "org_0", "m2m-new", "secret-new")
    used = provider.token_requests["m2m-org_0"]
    go_on(loaded, 12)

    # The gap: the old secret is revoked, and the new one comes here three seconds later.
    provider.add(application("org_1", client_secret="replaced", lifetime=6))
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
    """Tokens of six seconds run out meanwhile: runs wait, the issuer is hardly asked, and all go on."""
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


def test_what_leaked_is_dropped_with_its_tokens_at_once(site: Site, provider: Provider):
    """Its tokens would live for a day; two seconds after the command nobody acts under one."""
    site.add_orgs(application("org_leak"))
    site.apply(definition("org_leak", "note", "acme.poll", "every 1s", **QUICK))
    site.start_worker()
    wait_until(lambda: succeeded(site) >= 2, "the first runs")
    provider.add(application("org_leak", client_id="m2m-safe", client_secret="safe-secret"))
    site.cli(
        "credentials",
        "add",
        "org_leak",
        "--no-verify",
        "--client-id",
        "m2m-safe",
        "--secret-file",
        "-",
        stdin="safe-secret",
    )
    assert provider.token_requests["m2m-safe"] == 0  # the cached token is good for a day

    site.cli("credentials", "retire", "org_leak", "1", "--now")
    seen = len(site.runs())
    wait_until(lambda: len(site.runs()) >= seen + 3, "later runs")

    newer = [run["id"] for run in site.runs()[seen + 1 :] if run["state"] == "succeeded"]
    clients = {attempt["claims"]["client_id"] for run in newer for attempt in site.attempts(run)}
    assert clients == {"m2m-safe"}
    assert provider.token_requests["m2m-safe"] == 1
    assert held_up(site) == []
    [row] = site.query("SELECT sealed FROM credentials WHERE generation = 1")
    assert row["sealed"] is None


def test_a_property_that_was_changed_here_is_in_the_next_token(site: Site, provider: Provider):
    """A token would live for a day. The control: without a change, later runs use the same one."""
    app = application("org_property")
    site.add_orgs(app)
    site.apply(definition("org_property", "note", "acme.poll", "every 1s", **QUICK))
    site.start_worker()
    wait_until(lambda: succeeded(site) >= 2, "the first runs")
    go_on(site, runs=3)
    assert provider.token_requests[app.client_id] == 1

    database = open_database(load(str(site.settings), {}, site.process_environment()))
    try:
        with database.transaction() as connection:
            _record(connection, "org_property", "plan", is_set=True, actor="kim", database=database)
    finally:
        database.close()

    wait_until(lambda: provider.token_requests[app.client_id] == 2, "another token")
    go_on(site, runs=3)
    assert provider.token_requests[app.client_id] == 2
    assert held_up(site) == []


def test_a_new_secret_releases_at_once_what_waits_for_a_token(site: Site):
    site.add_orgs(application("org_parked"), secret="not-the-secret")
    site.apply(
        definition("org_parked", "note", "acme.note", "@yearly", params={"journal": str(site.out / "j")})
    )
    site.start_worker()
    site.cli("definitions", "run", "org_parked", "note")
    site.wait_for_state("note", "waiting", attempt=1)

    began = time.monotonic()
    site.cli(
        *("credentials", "add", "org_parked", "--client-id", "m2m-org_parked", "--secret-file", "-"),
        stdin="secret-of-org_parked",
    )
    run = site.wait_for_end("org_parked")

    # It would have been tried again a minute after the first rejection.
    assert run["state"] == "succeeded"
    assert time.monotonic() - began < 10


def test_claims_and_flags_of_a_running_run_follow_its_newest_token(site: Site, provider: Provider):
    site.add_orgs(application("org_flag", lifetime=6))
    install_watcher(site)
    site.apply(definition("org_flag", "watch", "acme.watch", "@yearly"))
    site.start_worker()
    site.cli("definitions", "run", "org_flag", "watch")
    site.wait_for_state("watch", "running")

    provider.add(application("org_flag", lifetime=6, flags={"agent-v2": True}))
    run = site.wait_for_end(definition="watch", timeout=30)

    assert (run["state"], run["result"]) == ("succeeded", {"client_id": "m2m-org_flag"})


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(replace={"org_code": "org_other"}), "org_mismatch"),
        (Fault(replace={"scope": ""}), "scope_missing"),
    ],
)
def test_a_renewed_token_that_no_longer_holds_ends_a_running_run(
    site: Site, provider: Provider, fault: Fault, reason: str
):
    """The claims of a run are those of its newest token."""
    site.add_orgs(application("org_turns", lifetime=6))
    install_watcher(site)
    site.apply(definition("org_turns", "watch", "acme.watch", "@yearly"))
    site.start_worker()
    site.cli("definitions", "run", "org_turns", "watch")
    site.wait_for_state("watch", "running")
    provider.misbehave(fault, "m2m-org_turns")

    run = site.wait_for_end(definition="watch", timeout=30)

    provider.misbehave(None, "m2m-org_turns")
    assert (run["state"], run["reason"]) == ("refused", reason)
