"""Alerts of real workers at a real receiver: one a cause and one when it is over, however the world is."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from tests.fakes import hook as hooks
from tests.fakes.hook import Hook
from tests.fakes.ports import free_port
from tests.fakes.site import application, definition, wait_until


def test_what_strikes_while_the_receiver_is_away_and_the_worker_dies_is_told_once_it_is_back(site, journal):
    port = free_port()
    site.configure(extra=hooks.settings(f"http://127.0.0.1:{port}"))
    site.add_orgs(application("org_acme"))
    broken = ("acme.os_exit", "acme.segfault", "acme.wants_file")
    params = {"file": "/nowhere", "journal": str(journal)}
    site.apply(
        "".join(
            definition("org_acme", name[5:], name, params=params, max_attempts=1, retry_backoff="1s")
            for name in broken
        )
    )
    worker = site.start_worker()
    for name in broken:
        site.cli("definitions", "run", "org_acme", name[5:])
    tries = "SELECT COUNT(*) AS causes, SUM(tries) AS tries FROM alerts"
    wait_until(lambda: site.query(tries)[0]["causes"] == 3, "three causes")
    # Not more: the third retry comes after 30 s.
    wait_until(lambda: site.query(tries)[0]["tries"] >= 1, "a post that nobody took")
    worker.kill()
    worker.wait()

    hook = Hook(busy=lambda: len(hook.turned_down) < 2, port=port)
    try:
        site.start_worker()
        wait_until(lambda: len(hook.taken) >= 3, "three alerts", timeout=60)
    finally:
        hook.server.stop()

    assert hook.told() == [("failed", "firing")] * 3
    assert {post.alert["handler"] for post in hook.taken} == set(broken)
    assert len({post.id for post in hook.taken}) == 3
    assert all(post.genuine for post in hook.taken)
    # Three waited, and one post at a time found out whether somebody is there.
    first, second = hook.turned_down
    assert second.at - first.at >= 1


def test_refusals_pauses_and_dead_credentials_arrive_and_so_do_their_ends(site, hook, provider, tmp_path):
    mended, journal = tmp_path / "mended", str(tmp_path / "out" / "journal")
    # All that is said is held against the page of events when the site is closed.
    site.configure(extra=f'{hook.settings()}[log]\nlevel = "debug"')
    site.add_orgs(application("org_odd", properties={"max_tokens": "many"}), application("org_weak"))
    site.add_orgs(application("org_dead"), secret="not-the-secret")
    site.apply(
        definition("org_odd", "digest", "acme.configured", params={"journal": journal})
        + definition(
            "org_weak",
            "import",
            "acme.wants_file",
            params={"file": str(mended), "journal": journal},
            pause_after_failures=1,
        )
        + definition("org_dead", "note", "acme.note", params={"journal": journal})
    )
    worker = site.start_worker()
    for org, name in (("org_odd", "digest"), ("org_weak", "import"), ("org_dead", "note")):
        site.cli("definitions", "run", org, name)

    refused = hook.wait_for("refused", "firing")
    assert (refused["org"], refused["reason"], refused["detail"]) == (
        "org_odd",
        "settings_invalid",
        "max_tokens",
    )
    assert hook.wait_for("paused", "firing")["definition"] == "import"
    assert hook.wait_for("credential_dead", "firing")["org"] == "org_dead"
    # Another worker takes up where this one was: what is open outlives it.
    assert site.stop_worker(worker) == 0
    provider.add(application("org_odd", properties={"max_tokens": "1000"}))
    mended.touch()
    site.cli(
        "credentials",
        "add",
        "org_dead",
        "--client-id",
        "m2m-org_dead",
        "--secret-file",
        "-",
        stdin="secret-of-org_dead",
    )
    site.cli("definitions", "resume", "org_weak", "import")
    for org, name in (("org_odd", "digest"), ("org_weak", "import")):
        site.cli("definitions", "run", org, name)
    site.start_worker()

    for kind in ("refused", "paused", "credential_dead", "failed"):
        assert hook.wait_for(kind, "resolved")["cause"] == hook.wait_for(kind, "firing")["cause"]
        assert hook.told(kind) == [(kind, "firing"), (kind, "resolved")]
    assert all(post.genuine for post in hook.taken)


def test_what_was_not_done_while_no_worker_ran_is_late_once_until_a_retry_has_done_it(
    site, hook, journal, tmp_path
):
    mended, due = tmp_path / "mended", datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=8)
    site.configure(extra=hook.settings())
    site.add_orgs(application("org_acme"))
    site.apply(
        definition(
            *("org_acme", "import", "acme.wants_file", f"at {due:%Y-%m-%dT%H:%M:%SZ}"),
            params={"file": str(mended), "journal": str(journal)},
            max_attempts=1,
            done_within="20s",
        )
    )
    worker = site.start_worker()
    run = site.wait_for_end("org_acme", "import")["id"]
    worker.kill()
    worker.wait()
    deadline = due + timedelta(seconds=20)
    assert site.cli("orgs", "list", "--late", "-o", "json").json() == []
    wait_until(lambda: datetime.now(UTC) > deadline, "the deadline")

    worker = site.start_worker()
    alert = hook.wait_for("late", "firing")

    assert (alert["org"], alert["definition"], alert["newest_run"]) == ("org_acme", "import", run)
    assert (alert["why"], alert["affected"]) == ("failed (error)", 1)
    [org] = site.cli("orgs", "list", "--late", "-o", "json").json()
    assert org["code"] == "org_acme"
    [matter] = [each for each in site.cli("status", "-o", "json").json()["matters"] if each["kind"] == "late"]
    assert matter["subject"]["definitions"] == ["org_acme/import"]
    # Nothing is told again by a worker that starts later.
    assert site.stop_worker(worker) == 0
    site.start_worker()
    mended.touch()
    site.cli("runs", "retry", run)
    hook.wait_for("late", "resolved")
    assert hook.told("late") == [("late", "firing"), ("late", "resolved")]
    assert site.cli("orgs", "list", "--late", "-o", "json").json() == []


def test_a_model_without_a_price_is_told_once_and_its_use_is_shown_as_unpriced(site, hook, journal):
    site.configure(extra=hook.settings())
    orgs = ("org_acme", "org_other")
    site.add_orgs(*(application(org) for org in orgs))
    params = {"model": "house-7b", "steps": 2, "journal": str(journal)}
    site.apply("".join(definition(org, "digest", "acme.spender", params=params) for org in orgs))
    site.start_worker()
    for org in orgs:
        site.cli("definitions", "run", org, "digest")
        assert site.wait_for_end(org, "digest")["state"] == "succeeded"

    alert = hook.wait_for("unpriced", "firing")

    assert "house-7b has no price" in alert["summary"]
    rows = site.cli("usage", "list", "--by", "org,model", "-o", "json").json()
    assert {(row["org"], row["model"], row["unpriced"], row["money"]) for row in rows} == {
        (org, "house-7b", 21, 0) for org in orgs
    }
    assert hook.told("unpriced") == [("unpriced", "firing")]
