"""A token that does not fit is refused with its reason, and its handler is never called."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes.handlers import read_journal
from tests.fakes.site import AUDIENCE, application, definition, wait_until
from worker.demo.provider import Fault

HOSTILE: dict[str, tuple[Fault, str, str | None]] = {
    "other_org": (Fault(replace={"org_code": "org_good"}), "org_mismatch", None),
    "no_org": (Fault(drop=("org_code",)), "org_mismatch", "org_missing"),
    "listed_org": (Fault(replace={"org_code": ["org_listed_org"]}), "token_invalid", None),
    "expired": (Fault(age=90_000), "token_invalid", "expired"),
    "other_issuer": (Fault(replace={"iss": "https://evil.example"}), "token_invalid", "issuer"),
    "other_audience": (Fault(replace={"aud": ["https://evil.example"]}), "token_invalid", "audience"),
    "wider_audience": (Fault(replace={"aud": [AUDIENCE, "https://b.example"]}), "token_invalid", "audience"),
    "forged": (Fault(forged=True), "token_invalid", "signature"),
    "other_client": (Fault(replace={"azp": "m2m-org_good"}), "client_mismatch", None),
    "lost_scope": (Fault(replace={"scope": "", "scp": []}), "scope_missing", "read:kb"),
}


@pytest.fixture(scope="module")
def site(shared_site, provider):
    """One org for each hostile token, one that is fine, and the orgs of the claims' tests; all run once."""
    site = shared_site()
    orgs = {name: application(f"org_{name}") for name in HOSTILE}
    for name, (fault, _, _) in HOSTILE.items():
        provider.misbehave(fault, orgs[name].client_id)
    orgs["good"] = application("org_good", properties={"max_tokens": 1000}, flags={"agent-v2": True})
    orgs["many"] = application("org_many", properties={"max_tokens": "many"}, flags={"agent-v2": True})
    orgs["off"] = application("org_off", flags={"agent-v2": False})
    orgs["absent"] = application("org_absent")
    site.add_orgs(*orgs.values())
    flagged = {"requires_flag": "agent-v2"}
    site.apply(
        "".join(
            definition(
                app.org_code,
                "job",
                "acme.configured",
                "every 2s",
                spread="off",
                params={"journal": str(site.out / "journal")},
                **(flagged if name in ("good", "off", "absent") else {}),
            )
            for name, app in orgs.items()
        )
    )
    site.start_worker()
    return site


def started_handlers(site: Any, run: dict[str, Any]) -> list[Any]:
    entries = read_journal(site.out / "journal")
    started = [row["handler_started_at"] for row in site.attempts(run["id"]) if row["handler_started_at"]]
    return [entry for entry in entries if entry["run"] == str(run["id"])] + started


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_token_is_refused_and_the_handler_not_called(site, name):
    _, reason, detail = HOSTILE[name]

    run = site.wait_for_end(f"org_{name}")

    assert (run["state"], run["reason"]) == ("refused", reason), run["detail"]
    assert detail is None or detail in run["detail"]
    assert started_handlers(site, run) == []
    assert [row["outcome"] for row in site.attempts(run["id"])] == ["refused"]


def test_a_property_that_does_not_fit_is_named(site):
    run = site.wait_for_end("org_many")

    assert (run["state"], run["reason"]) == ("refused", "settings_invalid")
    assert "max_tokens" in run["detail"]
    assert started_handlers(site, run) == []


@pytest.mark.parametrize("org", ["org_off", "org_absent"])
def test_a_flag_that_is_off_or_absent_gates_the_run(site, org):
    run = site.wait_for_end(org)

    assert (run["state"], run["reason"]) == ("skipped", "flag_off")
    assert [row["outcome"] for row in site.attempts(run["id"])] == ["gated"]
    assert started_handlers(site, run) == []


def test_the_neighbour_with_a_good_token_runs(site):
    run = site.wait_for_end("org_good")

    assert (run["state"], run["result"]) == ("succeeded", {"max_tokens": 1000, "flag": True})


def test_a_refused_token_is_never_used_later(site):
    """A few rounds on, still nothing of the hostile orgs has been called."""
    wait_until(lambda: len(site.runs("org_good")) >= 3, "three rounds")

    states = {run["state"] for run in site.runs("org_other_org") if run["finished_at"]}

    assert states == {"refused"}
