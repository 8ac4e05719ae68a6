"""`runs logs` with a real worker: head and tail within the cap, a crash's last words, and following."""

from __future__ import annotations

import re
import subprocess
import time

import pytest

from tests.fakes.site import application, definition

CAP = 256 * 1024


@pytest.fixture(scope="module")
def site(shared_site):
    site = shared_site()
    site.add_orgs(application("org_a"))
    cases = {
        "flood": {"lines": 10_000},
        "crash": {"lines": 2, "crash": True},
        "slow": {"lines": 20, "pause": 0.1},
    }
    site.apply(
        "".join(definition("org_a", name, "acme.chatty", params=params) for name, params in cases.items())
    )
    site.start_worker()
    site.wait_for_handlers("acme.chatty")
    return site


def logged(site, run) -> list[dict]:
    return site.cli("runs", "logs", str(run["id"]), "-o", "json").json()


def test_a_flood_keeps_its_head_and_its_tail_and_says_how_much_is_gone(site):
    site.cli("definitions", "run", "org_a", "flood")
    run = site.wait_for_end(definition="flood")

    lines = logged(site, run)

    texts = [line["text"] for line in lines]
    size = sum(len(text) for text in texts)
    assert CAP * 0.7 < size <= CAP
    assert texts[0].startswith("line 0 ")
    assert texts[-1] == "these are my last words"
    [(place, dropped)] = [
        (number, int(found[1]))
        for number, text in enumerate(texts)
        if (found := re.match(r"(\d+) lines .* dropped", text))
    ]
    assert lines[place]["level"] == "warning"
    # All that was printed is there or counted: the lines of the run, without the words about the dropped.
    assert len(texts) - 1 + dropped == 10_001


def test_a_crash_keeps_its_last_words_and_names_its_signal(site):
    site.cli("definitions", "run", "org_a", "crash")
    run = site.wait_for_end(definition="crash")

    # At once: the end of a run is never seen before its log.
    lines = site.query("SELECT level, text FROM run_logs WHERE run_id = ? ORDER BY attempt, seq", run["id"])

    texts = [line["text"] for line in lines]
    assert texts.index("these are my last words") == 2
    assert "Fatal Python error: Segmentation fault" in texts
    assert lines[-1]["level"] == "error"
    assert "signal SIGSEGV" in texts[-1]
    assert run["detail"] == "signal SIGSEGV"


def test_following_prints_lines_as_they_come_and_ends_with_the_run(site):
    run = site.cli("definitions", "run", "org_a", "slow", "-o", "json").json()

    command = site.command("runs", "logs", run["id"], "-f")
    with subprocess.Popen(command, cwd=site.folder, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        first = following.stdout.readline()
        came_at = time.monotonic()
        rest = following.stdout.read().splitlines()

    assert following.returncode == 0
    assert "line 0 " in first
    assert "these are my last words" in rest[-1]
    assert len(rest) == 20
    assert time.monotonic() - came_at > 0.5
    assert site.runs(definition="slow")[0]["state"] == "succeeded"
