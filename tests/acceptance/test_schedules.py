"""Definitions applied while a worker runs lead to runs with all that is known of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from tests.fakes.handlers import read_journal
from tests.fakes.site import application, definition, wait_until


def test_definitions_become_runs_and_the_same_file_changes_nothing(site, journal):
    worker = site.start_worker()
    site.add_orgs(application("org_acme"))
    site.wait_for_handlers("acme.note")
    params = {"journal": str(journal)}
    text = definition("org_acme", "tick", "acme.note", "every 2s", spread="off", params=params) + definition(
        "org_acme", "minutely", "acme.note", "* * * * *", params=params
    )

    site.apply(text)
    applied_at = datetime.now(UTC)
    ticks = wait_until(
        lambda: [run for run in site.runs(definition="tick") if run["state"] == "succeeded"][1:],
        "two ticks that succeeded",
    )
    assert ticks

    assert site.apply(text, "-o", "json").json() == []

    manual = site.cli("definitions", "run", "org_acme", "minutely", "-o", "json").json()
    assert manual["origin"] == "manual"

    # A minute may begin at any moment of this test: neither run has to be the first.
    def ended(origin: str) -> list[str]:
        found = site.runs(definition="minutely")
        return [str(run["id"]) for run in found if (run["origin"], run["state"]) == (origin, "succeeded")]

    assert wait_until(lambda: ended("manual"), "the run by hand", timeout=5) == [manual["id"]]
    wait_until(lambda: ended("schedule"), "the run of the next minute", timeout=70)

    runs = site.cli("runs", "list", "--definition", "tick", "--state", "succeeded", "-o", "json").json()
    assert len(runs) >= 2
    for run in runs:
        assert (run["org"], run["handler"], run["revision"]) == ("org_acme", "acme.note", 1)
        assert (run["attempt"], run["fencing_token"], run["result_fencing_token"]) == (1, 1, 1)
        assert run["origin"] == "schedule"
        assert run["reason"] is None
        scheduled_for = datetime.fromisoformat(run["scheduled_for"])
        assert scheduled_for.second % 2 == 0
        assert scheduled_for > applied_at - timedelta(seconds=2)
        times = [run["scheduled_for"], run["started_at"], run["finished_at"]]
        assert times == sorted(times)
        assert all(time.endswith("Z") for time in times)
        assert datetime.fromisoformat(run["result"]["scheduled_for"]) == scheduled_for

    [attempt] = site.cli("runs", "show", runs[0]["id"], "-o", "json").json()["attempts"]
    assert (attempt["attempt"], attempt["fencing_token"], attempt["outcome"]) == (1, 1, "succeeded")
    written = [entry["run"] for entry in read_journal(journal)]
    assert len(written) == len(set(written))
    assert site.stop_worker(worker) == 0


def test_a_request_key_makes_one_run_however_often_it_is_sent(site, journal):
    site.add_orgs(application("org_acme"))
    site.apply(definition("org_acme", "by-hand", "acme.note", params={"journal": str(journal)}))
    site.start_worker()

    command = ("definitions", "run", "org_acme", "by-hand", "--request-key", "K", "-o", "json")
    first = site.cli(*command).json()
    ended = site.wait_for_end(definition="by-hand")
    second = site.cli(*command).json()

    assert ended["state"] == "succeeded", ended
    assert first["id"] == second["id"] == str(ended["id"])
    assert len(read_journal(journal)) == 1
