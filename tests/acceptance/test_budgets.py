"""Budgets in a real worker: runs fail, wait or are held back at the limit, and go on when it is raised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fakes.handlers import read_journal
from tests.fakes.site import Site, application, definition

HANDLERS = ("acme.spender", "acme.spender_inline", "acme.spender_blocking")


def budget(limit: int, at_limit: str = "wait", meter: str = "llm_tokens", per: str = "day") -> str:
    return (
        f'[[budget]]\norg = "org_acme"\nmeter = "{meter}"\nlimit = {limit}\nper = "{per}"\n'
        f'at_limit = "{at_limit}"\n'
    )


def begin(site: Site, journal: Path, handler: str, file: str, steps: int = 4) -> None:
    site.configure(execution='inline = ["acme-jobs"]')
    site.add_orgs(application("org_acme"))
    params = {"journal": str(journal), "steps": steps}
    site.apply(definition("org_acme", "agent", handler, params=params) + file)
    site.start_worker()
    site.cli("definitions", "run", "org_acme", "agent")


def calls(journal: Path) -> list[int]:
    return [entry["number"] for entry in read_journal(journal, "call")]


def spent(site: Site) -> int:
    rows = json.loads(site.cli("usage", "list", "--org", "org_acme", "-o", "json").out)
    return sum(row["used"] for row in rows if row["meter"] == "llm_tokens")


@pytest.mark.parametrize("handler", HANDLERS)
def test_a_run_waits_without_a_process_until_its_budget_is_raised(
    site_on_either: Site, journal: Path, handler: str
):
    site = site_on_either
    begin(site, journal, handler, budget(25))

    run = site.wait_for_state("agent", "waiting", attempt=1, timeout=30)
    assert (run["reason"], run["detail"]) == ("budget", "budget:llm_tokens")
    assert (calls(journal), spent(site)) == ([0, 1, 2], 30)
    why = site.cli("runs", "why", str(run["id"])).out
    assert "budget" in why

    site.cli("budgets", "raise", "org_acme", "llm_tokens", "--by", "1000")
    run = site.wait_for_state("agent", "succeeded", attempt=2, timeout=30)

    # No call was made again, and each spend counts once.
    assert calls(journal) == [0, 1, 2, 3]
    assert run["result"] == {"results": [0, 1, 2, 3], "used": 41, "left": 984}
    assert spent(site) == 41


def test_a_run_fails_for_good_at_a_limit_that_says_so(site_on_either: Site, journal: Path):
    site = site_on_either
    begin(site, journal, "acme.spender", budget(25, "fail", per="run"))

    run = site.wait_for_state("agent", "failed", attempt=1, timeout=30)

    assert (run["reason"], calls(journal)) == ("budget", [0, 1, 2])
    assert "llm_tokens per run" in run["error"]["message"]
