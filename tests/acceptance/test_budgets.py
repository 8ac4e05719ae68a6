"""Budgets in a real worker: runs fail, wait or are held back at the limit, and go on when it is raised.

What the database decides is tested on both in tests/integration/store/test_spending.py; here only the
runs that are killed or held back.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.fakes.handlers import read_journal
from tests.fakes.site import Site, application, definition, wait_until

HANDLERS = ("acme.spender", "acme.spender_inline", "acme.spender_blocking")


def budget(limit: int, at_limit: str = "wait", meter: str = "llm_tokens", per: str = "day") -> str:
    return (
        f'[[budget]]\norg = "org_acme"\nmeter = "{meter}"\nlimit = {limit}\nper = "{per}"\n'
        f'at_limit = "{at_limit}"\n'
    )


def begin(
    site: Site, journal: Path, handler: str, file: str, steps: int = 4, pause: float = 0
) -> subprocess.Popen[bytes]:
    site.configure(execution='lease = "4s"\nrenew = "500ms"\ninline = ["acme-jobs"]')
    site.add_orgs(application("org_acme"))
    params = {"journal": str(journal), "steps": steps, "pause": pause}
    site.apply(definition("org_acme", "agent", handler, params=params, overlap="allow") + file)
    worker = site.start_worker()
    site.cli("definitions", "run", "org_acme", "agent")
    return worker


def calls(journal: Path) -> list[int]:
    return [entry["number"] for entry in read_journal(journal, "call")]


def spent(site: Site) -> int:
    rows = json.loads(site.cli("usage", "list", "--org", "org_acme", "-o", "json").out)
    return sum(row["used"] for row in rows if row["meter"] == "llm_tokens")


@pytest.mark.parametrize("handler", HANDLERS)
def test_a_run_waits_without_a_process_until_its_budget_is_raised(site: Site, journal: Path, handler: str):
    begin(site, journal, handler, budget(25))

    run = site.wait_for_state("agent", "waiting", attempt=1, timeout=30)
    assert (run["reason"], run["detail"]) == ("budget", "llm_tokens")
    assert (calls(journal), spent(site)) == ([0, 1, 2], 30)
    why = site.cli("runs", "why", str(run["id"])).out
    assert "budget" in why

    site.cli("budgets", "raise", "org_acme", "llm_tokens", "--by", "1000")
    run = site.wait_for_state("agent", "succeeded", attempt=2, timeout=30)

    # No call was made again, and each spend counts once.
    assert calls(journal) == [0, 1, 2, 3]
    assert run["result"] == {"results": [0, 1, 2, 3], "used": 41, "left": 984}
    assert spent(site) == 41


def test_a_run_fails_for_good_at_a_limit_that_says_so(site: Site, journal: Path):
    begin(site, journal, "acme.spender", budget(25, "fail", per="run"))

    run = site.wait_for_state("agent", "failed", attempt=1, timeout=30)

    assert (run["reason"], calls(journal)) == ("budget", [0, 1, 2])
    assert "llm_tokens per run" in run["error"]["message"]


def test_an_operator_answers_a_budget_that_asks(site: Site, journal: Path):
    begin(site, journal, "acme.spender", budget(25, "ask"))
    run = site.wait_for_state("agent", "waiting", attempt=1, timeout=30)

    assert "runs answer" in " ".join(site.cli("runs", "why", str(run["id"])).out.split())
    site.cli("runs", "answer", str(run["id"]), "budget:llm_tokens", "--data", '{"by": 5}')

    # It is used up all the same: the run asks again, and this is another question.
    run = site.wait_for_state("agent", "waiting", attempt=2, timeout=30)
    again = ("budget:llm_tokens", "--occurrence", "2", "--data")
    site.cli("runs", "answer", str(run["id"]), *again, '{"by": 1000}')
    site.wait_for_state("agent", "succeeded", attempt=3, timeout=30)
    assert (calls(journal), spent(site)) == ([0, 1, 2, 3], 41)


def test_a_no_fails_the_run(site: Site, journal: Path):
    begin(site, journal, "acme.spender", budget(25, "ask"))
    run = site.wait_for_state("agent", "waiting", attempt=1, timeout=30)

    site.cli("runs", "answer", str(run["id"]), "budget:llm_tokens", "--data", "false")

    run = site.wait_for_state("agent", "failed", attempt=2, timeout=30)
    assert run["reason"] == "budget"
    assert "did not raise" in run["error"]["message"]


def test_a_killed_worker_spends_nothing_twice(site_on_either: Site, journal: Path):
    site = site_on_either
    worker = begin(site, journal, "acme.spender", budget(10_000), steps=8, pause=0.2)
    wait_until(lambda: len(calls(journal)) >= 4, "the fourth call", timeout=30)

    worker.kill()
    worker.wait()
    site.start_worker()

    site.wait_for_state("agent", "succeeded", attempt=2, timeout=40)
    # The call in flight was made again; what it spent before it was stored is not counted.
    assert len(calls(journal)) <= 9
    assert spent(site) == 81
    rows = site.query("SELECT sum(amount) AS total FROM spends WHERE substr(key, 1, 5) = 'step:'")
    assert int(rows[0]["total"]) == 10 * len(site.query("SELECT seq FROM steps"))


def test_a_budget_of_runs_holds_the_others_before_they_start(site_on_either: Site, journal: Path):
    site = site_on_either
    begin(site, journal, "acme.spender", budget(2, meter="runs"), steps=1)
    for _ in range(2):
        site.cli("definitions", "run", "org_acme", "agent")

    wait_until(lambda: len(calls(journal)) == 2, "two runs", timeout=30)
    wait_until(lambda: held_back(site) == ["runs per day"], "the third to be held back", timeout=30)
    site.cli("budgets", "raise", "org_acme", "runs", "--by", "1")

    wait_until(lambda: len(calls(journal)) == 3, "the third run", timeout=30)


def held_back(site: Site) -> list[str]:
    rows = json.loads(site.cli("runs", "list", "--state", "waiting", "-o", "json").out)
    return [row["detail"] for row in rows if row["reason"] == "budget"]
