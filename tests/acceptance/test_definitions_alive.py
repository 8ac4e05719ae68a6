"""Definitions change while a worker runs: templates, backfills, edits."""

from __future__ import annotations

import time
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest

from tests.fakes.handlers import read_journal
from tests.fakes.site import NEVER, application, definition, toml_value, wait_until


def template(name: str, handler: str, schedule: str, orgs: str, **keys: object) -> str:
    lines = [f"{key} = {toml_value(value)}" for key, value in keys.items()]
    head = [f'name = "{name}"', f'handler = "{handler}"', f'schedule = "{schedule}"', f"orgs = {orgs}"]
    return "\n".join(["[[template]]", *head, *lines, ""])


@pytest.fixture(scope="module")
def alive(shared_site):
    """An installation whose worker is up; each test has orgs of its own."""
    site = shared_site('lease = "4s"\nrenew = "500ms"')
    site.start_worker()
    site.wait_for_handlers("acme.note")
    site.add_orgs(*(application(f"org_{name}") for name in ("filled", "edited")))
    return site


def test_a_new_org_inherits_within_five_seconds_and_a_change_reaches_all(alive):
    site = alive
    params = {"journal": str(site.out / "export")}
    others = len(site.query("SELECT id FROM orgs"))
    site.apply(template("export", "acme.note", "every 1s", '{ tags = ["pro"] }', params=params))

    site.add_orgs(*(application(f"org_{n}") for n in range(3)), tags=["pro"])
    site.add_orgs(application("org_free"))
    since = time.monotonic()
    wait_until(
        lambda: (
            {run["org"] for run in site.runs(definition="export") if run["state"] == "succeeded"}
            == {"org_0", "org_1", "org_2"}
        ),
        "a run of each org",
    )
    assert time.monotonic() - since < 10
    listed = site.cli("definitions", "list", "--definition", "export", "-o", "json").json()
    assert {(row["org"], row["template"]) for row in listed} == {(f"org_{n}", "export") for n in range(3)}

    site.apply(template("export", "acme.note", "every 2h", '{ tags = ["pro"] }', params=params))
    listed = site.cli("definitions", "list", "--definition", "export", "-o", "json").json()
    assert {(row["schedule"], row["revision"]) for row in listed} == {("every 2h", 2)}
    (shown,) = site.cli("templates", "list", "-o", "json").json()
    assert (shown["name"], shown["revision"], shown["orgs"]) == ("export", 2, {"tags": ["pro"]})
    assert shown["orgs_done"] == shown["orgs_total"] == 4 + others

    site.cli("templates", "close", "export")
    assert site.cli("definitions", "list", "--definition", "export", "-o", "json").json() == []


def test_a_backfill_runs_every_instant_of_the_past_once(alive):
    site, journal = alive, alive.out / "report"
    site.apply(definition("org_filled", "report", "acme.note", "0 * * * *", params={"journal": str(journal)}))
    until = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=2)
    start = until - timedelta(hours=24)
    command = (
        *("definitions", "backfill", "org_filled", "report"),
        *("--from", start.isoformat(), "--until", until.isoformat(), "--limit", "4", "-o", "json"),
    )

    made = site.cli(*command).json()
    assert (made["instants"], made["state"]) == (24, "running")

    def state() -> str:
        return site.cli("definitions", "backfills", "--org", "org_filled", "-o", "json").json()[0]["state"]

    wait_until(lambda: state() == "done", "the backfill to be done", timeout=60)
    again = site.cli(*command).json()

    assert (again["id"], again["made"], again["ended"]) == (made["id"], 24, 24)
    runs = [run for run in site.runs("org_filled") if run["origin"] == "backfill"]
    assert Counter(run["state"] for run in runs) == {"succeeded": 24}
    assert len({run["scheduled_for"] for run in runs}) == 24
    # An hour that begins meanwhile makes a run of the schedule; nothing else writes.
    written = {entry["run"] for entry in read_journal(journal)}
    scheduled = {str(run["id"]) for run in site.runs("org_filled") if run["origin"] == "schedule"}
    assert written - scheduled == {str(run["id"]) for run in runs}
    starts = sorted((run["started_at"], 1) for run in runs)
    moves = sorted(starts + [(run["finished_at"], -1) for run in runs])
    on = most = 0
    for _, move in moves:
        on += move
        most = max(most, on)
    assert most <= 4


def test_an_edit_reaches_the_worker_within_two_seconds(alive):
    site = alive
    keys = {"spread": "off", "overlap": "allow", "params": {"journal": str(site.out / "edited")}}
    site.apply(definition("org_edited", "tick", "acme.note", **keys))

    site.cli("definitions", "edit", "org_edited", "tick", "schedule=every 1s", "--revision", "1")
    edited_at = time.monotonic()
    wait_until(lambda: site.runs("org_edited"), "the first run of the new revision")
    assert time.monotonic() - edited_at < 2

    refused = site.cli(
        "definitions", "edit", "org_edited", "tick", "priority=1", "--revision", "1", check=False
    )
    assert refused.code == 5
    site.cli("definitions", "edit", "org_edited", "tick", f"schedule={NEVER}", "--revision", "2")
    time.sleep(2)
    made = len(site.runs("org_edited"))
    time.sleep(2)
    assert len(site.runs("org_edited")) == made
    assert {run["revision"] for run in site.runs("org_edited")} == {2}
