"""Runs wait for time, an answer, a budget or an approval: no process meanwhile, and no call made twice."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import Any

import pytest

from tests.acceptance.test_runs import alive
from tests.fakes.handlers import read_journal
from tests.fakes.site import Site, application, definition, wait_until
from worker.model.money import NANO

BUDGET = """\
[[budget]]
org = "org_spender"
meter = "llm_tokens"
limit = 25
per = "day"
at_limit = "ask"

[[budget]]
org = "org_payer"
meter = "money"
limit_from = "property:monthly_usd"
per = "month"
at_limit = "ask"
"""
# 0.1 USD a token.
PRICES = """
[[prices.own]]
model = "house-*"
input = 100000
"""


@pytest.fixture(scope="module")
def installed(shared_site: Callable[..., Site]) -> Site:
    """An installation whose worker is up; each test has an org and a definition of its own."""
    site = shared_site('lease = "4s"\nrenew = "500ms"' + PRICES)
    site.add_orgs(*(application(f"org_{name}") for name in ("approved", "spender", "agent")))
    site.add_orgs(application("org_payer", properties={"monthly_usd": "2.50"}))
    # A worker that is up learns of another one only later.
    site.apply(BUDGET)
    site.worker = site.start_worker()  # type: ignore[attr-defined]
    return site


def begin(site: Site, name: str, handler: str, **params: Any) -> dict[str, Any]:
    """Start a run of this handler, and return it once it waits for an answer."""
    given = params | {"journal": str(site.out / name)}
    site.apply(definition(f"org_{name}", name, handler, params=given))
    site.cli("definitions", "run", f"org_{name}", name)
    return waiting(site, name, 1)


def waiting(site: Site, name: str, attempt: int) -> dict[str, Any]:
    def found() -> bool:
        [run] = site.runs(definition=name)
        assert run["state"] in ("waiting", "running"), run
        asks = run["reason"] in ("answer", "budget")
        return asks and (run["state"], run["attempt"]) == ("waiting", attempt)

    wait_until(found, f"{site.runs(definition=name)} to wait for an answer", timeout=30)
    return site.runs(definition=name)[0]


def test_a_run_sleeps_and_waits_and_a_killed_worker_loses_neither_it_nor_its_answer(installed: Site) -> None:
    site, journal = installed, installed.out / "approved"
    site.apply(
        definition(
            "org_approved", "approved", "acme.approved", params={"journal": str(journal), "sleep": "1s"}
        )
    )
    site.cli("definitions", "run", "org_approved", "approved")
    run = str(waiting(site, "approved", 2)["id"])

    pids = {entry["pid"] for entry in read_journal(journal)}
    assert pids and not [pid for pid in pids if alive(pid)]
    why = site.cli("runs", "why", run, "-o", "json").json()
    assert why["next"] == f"runs answer {run} approval --data JSON"
    shown = site.cli("runs", "show", run, "-o", "json").json()
    assert [(wait["name"], wait["kind"], wait["ask"]) for wait in shown["waits"]] == [
        ("sleep", "sleep", None),
        ("approval", "answer", {"publish": "draft"}),
    ]
    site.worker.kill()  # type: ignore[attr-defined]
    site.worker.wait()  # type: ignore[attr-defined]
    site.cli("runs", "answer", run, "approval", "--data", '{"yes": true}')
    again = site.cli("runs", "answer", run, "approval", "--data", "false", check=False)
    assert again.code == 5 and "answered already" in again.err
    site.start_worker()

    ended = site.wait_for_state("approved", "succeeded", attempt=3, timeout=30)
    assert ended["result"] == {"answer": {"yes": True}, "published": "publish"}
    assert [entry["what"] for entry in read_journal(journal, "paid")] == ["draft", "publish"]
    assert [row["outcome"] for row in site.attempts(run)] == ["parked", "parked", "succeeded"]


def test_an_operator_answers_a_budget_that_asks(installed: Site) -> None:
    site = installed
    run = str(begin(site, "spender", "acme.spender", steps=4)["id"])
    assert "runs answer" in " ".join(site.cli("runs", "why", run).out.split())
    site.cli("runs", "answer", run, "budget:llm_tokens", "--data", '{"by": 5}')

    # It is used up all the same: the run asks again, and this is another question.
    waiting(site, "spender", 2)
    again = ("budget:llm_tokens", "--occurrence", "2", "--data")
    site.cli("runs", "answer", run, *again, '{"by": 1000}')

    ended = site.wait_for_state("spender", "succeeded", attempt=3, timeout=30)
    assert ended["result"] == {"results": [0, 1, 2, 3], "used": 41, "left": 989}
    assert [entry["number"] for entry in read_journal(site.out / "spender", "call")] == [0, 1, 2, 3]
    usage = site.cli("usage", "list", "--org", "org_spender", "-o", "json").json()
    assert sum(row["used"] for row in usage if row["meter"] == "llm_tokens") == 41


def test_a_budget_of_money_stops_a_run_that_no_budget_of_tokens_limits(installed: Site) -> None:
    """Its limit is a property of the org."""
    site = installed
    run = str(begin(site, "payer", "acme.spender", steps=4, model="house-1")["id"])
    assert len(read_journal(site.out / "payer", "call")) == 3
    [budget] = site.cli("budgets", "list", "--org", "org_payer", "-o", "json").json()
    assert (budget["limit"], budget["used"], budget["property"]) == (2_500_000_000, 3 * NANO, "monthly_usd")

    site.cli("runs", "answer", run, "budget:money", "--data", '{"by": "5 USD"}')

    ended = site.wait_for_state("payer", "succeeded", attempt=2, timeout=30)
    assert ended["result"]["used"] == 4 * NANO + NANO // 10
    assert ended["result"]["left"] == 7_500_000_000 - ended["result"]["used"]
    text = site.cli("usage", "--org", "org_payer", "--by", "org,model,definition,month", "-o", "csv").out
    [line] = csv.DictReader(io.StringIO(text))
    shown = [line[name] for name in ("model", "tokens", "amount", "currency")]
    assert shown == ["house-1", "41", "4.10", "USD"]


def test_tools_of_an_agent_that_need_approval_wait_for_it(installed: Site) -> None:
    site, journal = installed, installed.out / "agent"
    run = str(begin(site, "agent", "acme.approving_agent")["id"])
    waits = site.cli("runs", "show", run, "-o", "json").json()["waits"]
    for wait in waits:
        text = wait["ask"]["arguments"]["text"]
        site.cli("runs", "answer", run, wait["name"], "--data", "true" if text == "one" else '"no"')

    def succeeded() -> list[dict[str, Any]]:
        # Attempt 2, or 3 if the first answer came alone.
        return [row for row in site.runs(definition="agent") if row["state"] == "succeeded"]

    [ended] = wait_until(succeeded, "the run's success", timeout=30)
    assert ended["result"] == "sent one, no"
    assert [entry["text"] for entry in read_journal(journal, "send")] == ["one"]
    assert len(read_journal(journal, "request")) == 2
    assert {wait["ask"]["tool"] for wait in waits} == {"send"}
