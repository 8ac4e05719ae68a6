"""Runs of a real worker: killed, made by schedules and by hand, followed, stopped, retried."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.fakes.handlers import read_journal
from tests.fakes.site import Site, application, definition, wait_until

STEPS = 20
# A renewal, the grace, and what a busy machine needs to write it.
SOON = 0.5 + 1.0 + 4.0
ORGS = [f"org_{name}" for name in ("a", "b", "c", "d")]
CAUSE = "RuntimeError: no file at try <n>"


@pytest.fixture(scope="module")
def installed(shared_site: Callable[..., Site]) -> Site:
    """An installation whose worker is up; the tests have definitions of their own."""
    site = shared_site('lease = "4s"\nrenew = "500ms"')
    site.add_orgs(application("org_acme"), *(application(org) for org in ORGS))
    site.worker = site.start_worker()  # type: ignore[attr-defined]
    site.wait_for_handlers("acme.note", "acme.steps", "acme.chatty", "acme.wants_file")
    return site


# killed


def begin(site: Site, journal: Path) -> dict[str, object]:
    """Start a run of many steps, and return it once it is in the middle of them."""
    params = {"journal": str(journal), "steps": STEPS}
    site.apply(definition("org_acme", "steps", "acme.steps", params=params))
    site.cli("definitions", "run", "org_acme", "steps")
    wait_until(lambda: len(read_journal(journal, "step")) >= 4, "the fourth step", timeout=30)
    wait_until(lambda: read_journal(journal, "grandchild"), "a process of the run's own")
    return site.runs(definition="steps")[0]


def assert_all_dead(journal: Path) -> None:
    """One second after the kill no process that wrote to the journal is alive, and none writes."""
    time.sleep(1.0)
    entries = read_journal(journal)
    assert not [pid for pid in {entry["pid"] for entry in entries} if alive(pid)]
    time.sleep(0.3)
    assert len(read_journal(journal)) == len(entries)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def assert_gone_on(site: Site, journal: Path, run_id: object) -> None:
    """The run has succeeded as attempt 2, from a step that attempt 1 saved, under a newer fencing token."""
    run = site.wait_for_state("steps", "succeeded", attempt=2, timeout=30)
    assert run["id"] == run_id
    assert (run["fencing_token"], run["result_fencing_token"]) == (2, 2)
    assert run["result"]["attempt"] == 2
    done = [entry["step"] for entry in read_journal(journal, "step") if entry["attempt"] == 1]
    # A step is saved before it is written down.
    assert run["result"]["first"] in (done[-1], done[-1] + 1)
    attempts = [(row["attempt"], row["outcome"], row["fencing_token"]) for row in site.attempts(run_id)]
    assert attempts == [(1, "lost", 1), (2, "succeeded", 2)]
    assert len(site.runs(definition="steps")) == 1


def test_a_killed_workers_run_goes_on_after_the_restart(installed):
    """Nothing of it stays alive; it goes on from its checkpoint."""
    site, journal = installed, installed.out / "steps"
    run = begin(site, journal)

    site.worker.kill()
    site.worker.wait()

    assert_all_dead(journal)
    site.start_worker()
    assert_gone_on(site, journal, run["id"])
    log = json.loads(site.cli("runs", "logs", str(run["id"]), "-o", "json").out)
    [lost] = [line for line in log if line["source"] == "worker"]
    [[dead, by]] = [re.findall(r"worker (\S+)", lost["text"])]
    assert lost["attempt"] == 1
    assert lost["text"].startswith(f"attempt 1 was lost: worker {dead} crashed, last seen ")
    assert (
        f"crashed {lost['text'].split()[-6][:5]} UTC, 1 run recovered by {by}"
        in site.cli("doctor", "-o", "json", check=False).out
    )


# made


def test_a_request_key_makes_one_run_however_often_it_is_sent(installed):
    site = installed
    site.apply(definition("org_acme", "by-hand", "acme.note", params={"journal": str(site.out / "by-hand")}))

    command = ("definitions", "run", "org_acme", "by-hand", "--request-key", "K", "-o", "json")
    first = site.cli(*command).json()
    ended = site.wait_for_end(definition="by-hand")
    second = site.cli(*command).json()

    assert ended["state"] == "succeeded", ended
    assert first["id"] == second["id"] == str(ended["id"])
    assert len(read_journal(site.out / "by-hand")) == 1


def test_definitions_become_runs_and_the_same_file_changes_nothing(installed):
    site, journal = installed, installed.out / "journal"
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
    for name in ("tick", "minutely"):
        site.cli("definitions", "pause", "org_acme", name)


# their logs


@pytest.fixture(scope="module")
def chatty(installed):
    until = str(installed.out / "followed")
    cases = {"crash": {"lines": 2, "crash": True}, "slow": {"lines": 20, "until": until}}
    installed.apply(
        "".join(definition("org_b", name, "acme.chatty", params=params) for name, params in cases.items())
    )
    return installed


def test_a_crash_keeps_its_last_words_and_names_its_signal(chatty):
    site = chatty
    site.cli("definitions", "run", "org_b", "crash")
    run = site.wait_for_end(definition="crash")

    # At once: the end of a run is never seen before its log.
    lines = site.query("SELECT level, text FROM run_logs WHERE run_id = ? ORDER BY attempt, seq", run["id"])

    texts = [line["text"] for line in lines]
    assert texts.index("these are my last words") == 2
    assert "Fatal Python error: Segmentation fault" in texts
    assert lines[-1]["level"] == "error"
    assert "signal SIGSEGV" in texts[-1]
    assert run["detail"] == "signal SIGSEGV"


def test_following_prints_lines_as_they_come_and_ends_with_the_run(chatty):
    site = chatty
    run = site.cli("definitions", "run", "org_b", "slow", "-o", "json").json()

    command = site.command("runs", "logs", run["id"], "-f")
    with subprocess.Popen(command, cwd=site.folder, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        first = following.stdout.readline()
        # The run does not end before.
        (site.out / "followed").touch()
        rest = following.stdout.read().splitlines()

    assert following.returncode == 0
    assert "line 0 " in first
    assert "these are my last words" in rest[-1]
    assert len(rest) == 20
    assert site.runs(definition="slow")[0]["state"] == "succeeded"


# stopped


@pytest.fixture(scope="module")
def running(installed):
    """A run of hours is on, and one waits behind it; the org takes one at a time."""
    site = installed
    params = {"journal": str(site.out / "stopped"), "steps": 10_000}
    keys = {"params": params, "cancel_grace": "1s", "overlap": "allow"}
    site.apply(
        '[[org]]\ncode = "org_a"\nissuer = "main"\nmax_concurrent_runs = 1\n'
        + definition("org_a", "long", "acme.steps", **keys)
        + definition("org_a", "short", "acme.steps", timeout="1s", max_attempts=1, **keys)
    )
    return site


def start(site, name: str) -> str:
    run = site.cli("definitions", "run", "org_a", name, "-o", "json").json()
    return run["id"]


def ended(site, run: str, asked: float) -> tuple[str, str]:
    def found() -> dict:
        return next((row for row in site.runs() if str(row["id"]) == run and row["finished_at"]), {})

    row = wait_until(found, "the end of the run")
    assert time.monotonic() - asked < SOON
    return row["state"], row["reason"]


def silent(site) -> bool:
    journal = site.out / "stopped"
    before = len(read_journal(journal))
    time.sleep(0.5)
    return len(read_journal(journal)) == before


def test_a_run_that_is_cancelled_ends_within_a_renewal_and_its_grace(running):
    run = start(running, "long")
    running.wait_for_state("long", "running")

    running.cli("runs", "cancel", run)

    assert ended(running, run, time.monotonic()) == ("cancelled", "requested")
    assert silent(running)
    assert running.cli("runs", "cancel", run, check=False).code == 5


def test_a_run_past_its_timeout_fails_as_timed_out(running):
    run = start(running, "short")
    running.wait_for_state("short", "running")

    assert ended(running, run, time.monotonic() + 1.0) == ("failed", "timed_out")
    assert silent(running)


def test_a_suspended_orgs_runs_are_cancelled_and_none_starts_until_it_is_resumed(running):
    long = start(running, "long")
    running.wait_for_state("long", "running")
    short = start(running, "short")

    running.cli("orgs", "suspend", "org_a", "--note", "unpaid")

    # What waits at once, what is on within a renewal.
    [waiting] = [run for run in running.runs(definition="short") if str(run["id"]) == short]
    assert (waiting["state"], waiting["reason"]) == ("cancelled", "suspended")
    assert ended(running, long, time.monotonic()) == ("cancelled", "suspended")
    assert silent(running)
    assert running.cli("definitions", "run", "org_a", "long", check=False).code == 5
    audited = running.query("SELECT action, detail FROM audit WHERE action LIKE 'org.%' ORDER BY id")
    assert any("suspend" in row["action"] for row in audited)

    running.cli("orgs", "resume", "org_a")
    again = start(running, "long")
    running.wait_for_state("long", "running")
    running.cli("runs", "cancel", again)
    ended(running, again, time.monotonic())


# retried


@pytest.fixture(scope="module")
def failed(installed):
    """A run of each org that has failed for want of a file."""
    site = installed
    params = {"journal": str(site.out / "wants"), "file": str(site.out / "wanted")}
    site.apply("".join(definition(org, "wants", "acme.wants_file", params=params) for org in ORGS))
    for org in ORGS:
        site.cli("definitions", "run", org, "wants")
        assert site.wait_for_end(org, "wants")["state"] == "failed"
    return site


def test_the_rest_is_retried_only_once_the_canaries_have_succeeded(failed):
    listed = failed.cli("runs", "retry", "--cause", CAUSE, "--dry-run", "-o", "json").json()
    assert [row["org"] for row in listed] == ORGS
    assert len(failed.runs(definition="wants")) == 4

    done = failed.cli("runs", "retry", "--cause", CAUSE, "--canary", "1", check=False)
    assert done.code == 1
    assert "did not succeed" in done.err
    assert "1 of 1 ended; run" in done.err
    assert len(failed.runs(definition="wants")) == 5

    (failed.out / "wanted").touch()
    rows = failed.cli("runs", "retry", "--cause", CAUSE, "--canary", "2", "-o", "json").json()
    assert sorted(row["org"] for row in rows) == ORGS
    assert [row["state"] for row in rows] == ["succeeded", "succeeded", "waiting", "waiting"]
    assert len(failed.runs(definition="wants")) == 9
    ends = ("succeeded", 4), ("failed", 5)
    wait_until(
        lambda: Counter(run["state"] for run in failed.runs(definition="wants")) == dict(ends),
        "the other retries",
    )
    assert failed.cli("runs", "retry", "--cause", CAUSE, "-o", "json").json() == []


def test_a_command_line_that_names_both_or_neither_is_refused(failed):
    assert failed.cli("runs", "retry", check=False).code == 2
    one = "01900000-0000-7000-8000-000000000000"
    assert failed.cli("runs", "retry", one, "--dry-run", check=False).code == 2
    assert failed.cli("runs", "retry", "--state", "running", check=False).code == 2
    assert failed.cli("runs", "retry", one, check=False).code == 3
