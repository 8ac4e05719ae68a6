"""`runs retry` with a real worker: from a checkpoint, and many at once with a canary before them."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.fakes.handlers import read_journal
from tests.fakes.site import application, definition, wait_until

ORGS = [f"org_{name}" for name in ("a", "b", "c", "d")]
CAUSE = "RuntimeError: no file at try <n>"


@pytest.fixture
def failed(site, journal, tmp_path):
    """A worker, and a run of each org that has failed for want of a file."""
    site.add_orgs(*(application(org) for org in ORGS))
    params = {"journal": str(journal), "file": str(tmp_path / "wanted")}
    site.apply("".join(definition(org, "wants", "acme.wants_file", params=params) for org in ORGS))
    site.start_worker()
    site.wait_for_handlers("acme.wants_file")
    for org in ORGS:
        site.cli("definitions", "run", org, "wants")
        assert site.wait_for_end(org)["state"] == "failed"
    return site


def test_a_retry_from_the_checkpoint_has_it_and_the_same_idempotency_key(failed, journal, tmp_path):
    (tmp_path / "wanted").touch()
    [old] = failed.runs("org_a")

    new = failed.cli("runs", "retry", str(old["id"]), "--from-checkpoint", "-o", "json").json()
    failed.wait_for_state("wants", "succeeded")

    first, *others, last = read_journal(journal, "wants_file")
    assert (last["org"], last["run"], last["attempt"]) == ("org_a", new["id"], 1)
    assert last["checkpoint"] == {"calls": 1}
    assert last["key"] == first["key"]
    assert all(entry["key"] != first["key"] for entry in others)


def test_the_rest_is_retried_only_once_the_canaries_have_succeeded(failed, tmp_path):
    listed = failed.cli("runs", "retry", "--cause", CAUSE, "--dry-run", "-o", "json").json()
    assert [row["org"] for row in listed] == ORGS
    assert len(failed.runs()) == 4

    done = failed.cli("runs", "retry", "--reason", "error", "--canary", "1", check=False)
    assert done.code == 1
    assert "did not succeed" in done.err
    assert "1 of 1 ended; run" in done.err
    assert len(failed.runs()) == 5

    (tmp_path / "wanted").touch()
    rows = failed.cli("runs", "retry", "--cause", CAUSE, "--canary", "2", "-o", "json").json()
    assert sorted(row["org"] for row in rows) == ORGS
    assert [row["state"] for row in rows] == ["succeeded", "succeeded", "waiting", "waiting"]
    assert len(failed.runs()) == 9
    ends = ("succeeded", 4), ("failed", 5)
    wait_until(lambda: Counter(run["state"] for run in failed.runs()) == dict(ends), "the other retries")
    assert failed.cli("runs", "retry", "--state", "failed", "-o", "json").json() == []


def test_a_command_line_that_names_both_or_neither_is_refused(site):
    assert site.cli("runs", "retry", check=False).code == 2
    one = "01900000-0000-7000-8000-000000000000"
    assert site.cli("runs", "retry", one, "--dry-run", check=False).code == 2
    assert site.cli("runs", "retry", "--state", "running", check=False).code == 2
    assert site.cli("runs", "retry", one, check=False).code == 3
