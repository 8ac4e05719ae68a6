"""Definitions change while a worker runs: templates, backfills, failures that pause, runs that overlap."""

from __future__ import annotations

import json
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import pairwise

from tests.fakes.handlers import read_journal
from tests.fakes.site import NEVER, application, definition, toml_value, wait_until


def template(name: str, handler: str, schedule: str, orgs: str, **keys: object) -> str:
    lines = [f"{key} = {toml_value(value)}" for key, value in keys.items()]
    head = [f'name = "{name}"', f'handler = "{handler}"', f'schedule = "{schedule}"', f"orgs = {orgs}"]
    return "\n".join(["[[template]]", *head, *lines, ""])


def test_a_new_org_inherits_within_five_seconds_and_a_change_reaches_all(site, journal):
    worker = site.start_worker()
    site.wait_for_handlers("acme.note")
    params = {"journal": str(journal)}
    site.apply(template("export", "acme.note", "every 1s", '{ tags = ["pro"] }', params=params))

    site.add_orgs(*(application(f"org_{n}") for n in range(3)), tags=["pro"])
    site.add_orgs(application("org_free"))
    since = time.monotonic()
    wait_until(
        lambda: (
            {run["org"] for run in site.runs() if run["state"] == "succeeded"} == {"org_0", "org_1", "org_2"}
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
    assert shown["orgs_done"] == shown["orgs_total"] == 4

    site.cli("templates", "close", "export")
    assert site.cli("definitions", "list", "--definition", "export", "-o", "json").json() == []
    assert site.stop_worker(worker) == 0


def test_many_orgs_follow_by_the_worker_alone(site, monkeypatch):
    """A command that was interrupted after its first transaction: the worker carries the rest."""
    monkeypatch.setattr("worker.cli.apply.apply_templates", lambda session, database: None)
    lines = [json.dumps({"code": f"org_{n:04}", "name": "n", "issuer": "main"}) for n in range(500)]
    site.cli("orgs", "import", "-", stdin="\n".join(lines))
    site.apply(template("export", "acme.note", "@hourly", '"all"', params={"journal": "/dev/null"}))
    first = site.cli("templates", "show", "export", "-o", "json").json()
    assert (first["orgs_done"], first["orgs_total"], first["materialised_at"]) == (200, 500, None)

    worker = site.start_worker()
    wait_until(
        lambda: site.cli("templates", "show", "export", "-o", "json").json()["materialised_at"],
        "all orgs to have it",
    )
    count = site.query("SELECT count(*) AS n FROM definitions WHERE closed_at IS NULL")
    assert count[0]["n"] == 500
    assert "template.progress" in site.log_text()
    assert site.stop_worker(worker) == 0


def test_a_backfill_runs_every_instant_of_the_past_once(short_site, journal):
    site = short_site
    worker = site.start_worker()
    site.add_orgs(application("org_acme"))
    site.wait_for_handlers("acme.note")
    site.apply(definition("org_acme", "report", "acme.note", "0 * * * *", params={"journal": str(journal)}))
    until = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=2)
    start = until - timedelta(hours=24)
    command = (
        *("definitions", "backfill", "org_acme", "report"),
        *("--from", start.isoformat(), "--until", until.isoformat(), "--limit", "4", "-o", "json"),
    )

    made = site.cli(*command).json()
    assert (made["instants"], made["state"]) == (24, "running")

    def state() -> str:
        return site.cli("definitions", "backfills", "--org", "org_acme", "-o", "json").json()[0]["state"]

    wait_until(lambda: state() == "done", "the backfill to be done", timeout=60)
    again = site.cli(*command).json()

    assert (again["id"], again["made"], again["ended"]) == (made["id"], 24, 24)
    runs = [run for run in site.runs() if run["origin"] == "backfill"]
    assert Counter(run["state"] for run in runs) == {"succeeded": 24}
    assert len({run["scheduled_for"] for run in runs}) == 24
    # An hour that begins meanwhile makes a run of the schedule; nothing else writes.
    written = {entry["run"] for entry in read_journal(journal)}
    scheduled = {str(run["id"]) for run in site.runs() if run["origin"] == "schedule"}
    assert written - scheduled == {str(run["id"]) for run in runs}
    starts = sorted((run["started_at"], 1) for run in runs)
    moves = sorted(starts + [(run["finished_at"], -1) for run in runs])
    on = most = 0
    for _, move in moves:
        on += move
        most = max(most, on)
    assert most <= 4
    assert site.stop_worker(worker) == 0


def test_a_definition_that_keeps_failing_is_paused_by_the_worker(site):
    worker = site.start_worker()
    site.add_orgs(application("org_acme"))
    site.wait_for_handlers("acme.os_exit")
    site.apply(
        definition("org_acme", "bad", "acme.os_exit", "every 1s", max_attempts=1, pause_after_failures=2)
    )

    def shown() -> dict[str, object]:
        return site.cli("definitions", "show", "org_acme", "bad", "-o", "json").json()

    wait_until(lambda: shown()["state"] == "paused", "the pause")

    paused = shown()
    assert paused["paused_by"] == "worker"
    assert str(paused["pause_note"]).startswith("2 failures in a row")
    assert paused["next_fire_at"] is None
    assert "definition.paused" in site.log_text()
    resumed = site.cli("definitions", "resume", "org_acme", "bad", "-o", "json").json()
    assert resumed["consecutive_failures"] == 0
    assert site.stop_worker(worker) == 0


def test_replace_ends_the_old_run_before_the_new_one_starts(short_site, journal):
    site = short_site
    site.start_worker()
    site.add_orgs(application("org_acme"))
    site.wait_for_handlers("acme.steps")
    params = {"journal": str(journal), "steps": 1000}
    site.apply(
        definition(
            "org_acme",
            "long",
            "acme.steps",
            "every 2s",
            spread="off",
            overlap="replace",
            cancel_grace="1s",
            params=params,
        )
    )

    def replaced() -> bool:
        return len([run for run in site.runs() if run["reason"] == "replaced" and run["started_at"]]) >= 2

    wait_until(replaced, "two runs that were replaced", timeout=40)
    site.cli("definitions", "pause", "org_acme", "long")

    started = sorted((run for run in site.runs() if run["started_at"]), key=lambda run: run["started_at"])
    for old, new in pairwise(started):
        assert (old["state"], old["reason"]) == ("cancelled", "replaced")
        assert str(old["finished_at"]) <= str(new["started_at"])
    assert site.query("SELECT * FROM skips") == []


def test_queue_one_starts_the_one_that_was_held(short_site, journal):
    site = short_site
    site.start_worker()
    site.add_orgs(application("org_acme"))
    site.wait_for_handlers("acme.steps")
    params = {"journal": str(journal), "steps": 22}
    site.apply(
        definition(
            "org_acme", "long", "acme.steps", "every 1s", spread="off", overlap="queue_one", params=params
        )
    )

    wait_until(
        lambda: len([run for run in site.runs() if run["state"] == "succeeded"]) >= 2, "two runs", timeout=40
    )
    site.cli("definitions", "pause", "org_acme", "long")

    first, second, *_ = site.runs()
    assert str(first["finished_at"]) <= str(second["started_at"])
    waiting = [run for run in site.runs() if run["state"] == "waiting"]
    assert len(waiting) <= 1
    skipped = sum(row["count"] for row in site.query('SELECT "count" FROM skips'))
    assert skipped >= 2


def test_an_edit_reaches_the_worker_within_two_seconds(site_on_either, journal):
    site = site_on_either
    worker = site.start_worker()
    site.add_orgs(application("org_acme"))
    site.wait_for_handlers("acme.note")
    keys = {"spread": "off", "overlap": "allow", "params": {"journal": str(journal)}}
    site.apply(definition("org_acme", "tick", "acme.note", **keys))

    site.cli("definitions", "edit", "org_acme", "tick", "schedule=every 1s", "--revision", "1")
    edited_at = time.monotonic()
    wait_until(lambda: site.runs(), "the first run of the new revision")
    assert time.monotonic() - edited_at < 2

    refused = site.cli(
        "definitions", "edit", "org_acme", "tick", "priority=1", "--revision", "1", check=False
    )
    assert refused.code == 5
    site.cli("definitions", "edit", "org_acme", "tick", f"schedule={NEVER}", "--revision", "2")
    time.sleep(2)
    made = len(site.runs())
    time.sleep(2)
    assert len(site.runs()) == made
    assert {run["revision"] for run in site.runs()} == {2}
    assert site.stop_worker(worker) == 0
