"""Tokens looked at from the command line, and a provider that the user describes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.fakes.site import Site, application, definition
from worker.demo.provider import Fault, Provider

GOOD, LACKING, FOREIGN = (application(code) for code in ("org_good", "org_lacking", "org_foreign"))


@pytest.fixture(scope="module")
def checked(shared_site: Callable[[str], Site], provider: Provider) -> Site:
    """Three orgs with a definition each: one in order, one without its scope, one whose secret is wrong."""
    site = shared_site("")
    site.add_orgs(
        application("org_good", properties={"max_tokens": 1000}, flags={"agent-v2": True}),
        application("org_lacking", scopes=("write:kb",)),
    )
    site.add_orgs(FOREIGN, secret="canary-wrong-secret")
    for app in (GOOD, LACKING, FOREIGN):
        site.apply(definition(app.org_code, "daily", "acme.configured", "every 15m", max_claims_age="10m"))
    return site


def test_all_orgs_are_checked_and_what_is_wrong_is_said(checked: Site):
    done = checked.cli("orgs", "check", "--all", "--concurrency", "2", "-o", "json", check=False)

    assert done.code == 1
    rows = {row["org"]: row for row in done.json()}
    assert {code: row["ok"] for code, row in rows.items()} == {
        "org_good": True,
        "org_lacking": False,
        "org_foreign": False,
    }
    good = rows["org_good"]
    assert (good["properties"], good["flags"]) == ({"max_tokens": "text"}, {"agent-v2": "boolean"})
    assert (good["scopes"], good["missing"], good["unused"]) == (["read:kb"], [], [])
    assert good["lifetime"] == 86400
    lacking = rows["org_lacking"]
    assert (lacking["missing"], lacking["unused"]) == (["read:kb"], ["write:kb"])
    assert "credentials rotate org_foreign" in done.err
    assert "canary" not in done.out + done.err


def test_one_org_is_checked_for_people(checked: Site):
    done = checked.cli("orgs", "check", "org_good")

    checks = [line.split()[0] for line in done.out.splitlines()[1:]]
    assert checks == [
        *("discovery", "token", "key", "org", "client", "scopes"),
        *("properties", "flags", "lifetime", "clock", "rate", "unread"),
    ]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [([], 2), (["org_good", "--all"], 2), (["org_absent"], 3)],
)
def test_what_cannot_be_checked_says_so(checked: Site, arguments: list[str], code: int):
    assert checked.cli("orgs", "check", *arguments, check=False).code == code


def test_a_generation_is_verified(checked: Site, provider: Provider):
    good = checked.cli("credentials", "verify", "org_good", "1", "-o", "json").json()
    assert (good["ok"], good["generation"], good["client_id"]) == (True, 1, "m2m-org_good")
    listed = checked.cli("credentials", "list", "org_good", "-o", "json").json()
    assert listed[0]["uses"] >= 1 and listed[0]["last_used_at"]

    assert checked.cli("credentials", "verify", "org_foreign", check=False).code == 1
    assert (
        checked.cli("credentials", "list", "org_foreign", "-o", "json").json()[0]["last_error"]
        == "invalid_client"
    )
    assert checked.cli("credentials", "verify", "org_good", "9", check=False).code == 3
    provider.misbehave(Fault(status=503), "m2m-org_good")
    away = checked.cli("credentials", "verify", "org_good", check=False)
    provider.misbehave(None, "m2m-org_good")
    assert away.code == 69


def test_the_token_requests_a_day_are_counted(checked: Site):
    [row] = checked.cli("check", "-o", "json").json()

    assert (row["issuer"], row["orgs"], row["definitions"], row["runs_a_day"]) == ("main", 3, 3, 288)
    # Every quarter of an hour each run wants claims of at most ten minutes: each asks for a token.
    assert row["token_requests_a_day"] == 288
    assert row["problem"] is None


def test_a_rate_that_is_too_low_is_told(checked: Site):
    low = checked.cli("--set", "issuers.main.max_requests_per_second=0.001", "check", check=False)

    assert low.code == 1
    assert "runs will wait for tokens" in low.err


PROFILE = """
name = "ours"
title = "Our own provider"
org_asserted_by = "client"
token = "/oauth2/token"
keys = "/.well-known/jwks"
audience_parameter = "audience"
algorithms = ["RS256"]
org = ["tenant", "id"]
client = ["azp"]
scopes = ["scp"]
scopes_shape = "list"
properties = ["settings"]
flags = ["feature_flags"]
flags_shape = "t_v"
"""


def test_a_profile_of_the_users_own_is_a_file(site: Site, provider: Provider):
    """Another layout of the same claims: the org in a nested claim, the scopes as a list."""
    (site.folder / "ours.toml").write_text(PROFILE)
    site.settings.write_text(site.settings.read_text().replace('profile = "kinde"', 'profile = "ours.toml"'))
    site.add_orgs(application("org_ours", flags={"agent-v2": True}))
    layout = {"tenant": {"id": "org_ours"}, "settings": {"max_tokens": 7}}
    provider.misbehave(Fault(replace=layout, drop=("org_code", "scope")), "m2m-org_ours")
    site.apply(
        definition("org_ours", "once", "acme.configured", "@yearly", params={"journal": str(site.out / "j")})
    )

    [row] = site.cli("orgs", "check", "--all", "-o", "json").json()
    site.start_worker()
    site.cli("definitions", "run", "org_ours", "once")
    run = site.wait_for_end("org_ours")

    provider.misbehave(None, "m2m-org_ours")
    assert (row["ok"], row["properties"], row["scopes"]) == (True, {"max_tokens": "number"}, ["read:kb"])
    assert (run["state"], run["result"]) == ("succeeded", {"max_tokens": 7, "flag": True})


def test_a_profile_that_is_none_is_refused_at_start(site: Site):
    (site.folder / "ours.toml").write_text(PROFILE.replace('"client"\n', '"caller"\n', 1))
    site.settings.write_text(site.settings.read_text().replace('profile = "kinde"', 'profile = "ours.toml"'))

    assert site.start_worker().wait(30) == 78
    assert "its callers choose the org themselves" in site.log_text()
