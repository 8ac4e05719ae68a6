"""Runs that sleep or wait for an answer: no process meanwhile, and each step is paid for once."""

from __future__ import annotations

import json
from typing import Any

from tests.acceptance.test_kill import alive
from tests.fakes.handlers import read_journal
from tests.fakes.site import Site, application, definition, wait_until


def begin(site: Site, handler: str, journal: Any = None, **params: Any) -> dict[str, Any]:
    """Start a run of this handler, and return it once it waits for an answer."""
    site.add_orgs(application("org_acme"))
    given = params if journal is None else {"journal": str(journal)} | params
    site.apply(definition("org_acme", "ask", handler, params=given))
    site.cli("definitions", "run", "org_acme", "ask")
    return waiting(site, "answer")


def waiting(site: Site, reason: str) -> dict[str, Any]:
    def found() -> bool:
        [run] = site.runs(definition="ask")
        assert run["state"] in ("waiting", "running"), run
        return (run["state"], run["reason"]) == ("waiting", reason)

    wait_until(found, f"the run to wait ({reason})", timeout=30)
    run = site.runs(definition="ask")[0]
    return run | {"id": str(run["id"])}


def answer(site: Site, run: dict[str, Any], data: Any, *more: str, check: bool = True) -> Any:
    return site.cli("runs", "answer", run["id"], "approval", "--data", json.dumps(data), *more, check=check)


def test_a_run_sleeps_waits_and_goes_on_where_it_was(short_site, journal):
    site = short_site
    site.start_worker()
    run = begin(site, "acme.approved", journal, sleep="1s")

    pids = {entry["pid"] for entry in read_journal(journal)}
    assert pids and not [pid for pid in pids if alive(pid)]
    why = json.loads(site.cli("runs", "why", run["id"], "-o", "json").out)
    assert why["next"] == f"runs answer {run['id']} approval --data JSON"
    shown = json.loads(site.cli("runs", "show", run["id"], "-o", "json").out)
    assert [(wait["name"], wait["kind"], wait["ask"]) for wait in shown["waits"]] == [
        ("sleep", "sleep", None),
        ("approval", "answer", {"publish": "draft"}),
    ]

    misspelt = site.cli("runs", "answer", run["id"], "aproval", "--data", "true", check=False)
    assert misspelt.code == 5 and "did you mean approval?" in misspelt.err
    answer(site, run, {"yes": True})

    ended = site.wait_for_state("ask", "succeeded", attempt=3, timeout=30)
    assert ended["result"] == {"answer": {"yes": True}, "published": "publish"}
    assert [entry["what"] for entry in read_journal(journal, "paid")] == ["draft", "publish"]
    assert [row["outcome"] for row in site.attempts(run["id"])] == ["parked", "parked", "succeeded"]
    late = answer(site, run, "too late", check=False)
    assert late.code == 5 and "has ended" in late.err


def test_a_killed_worker_loses_no_parked_run_and_no_answer(site_on_either, journal):
    site = site_on_either
    worker = site.start_worker()
    run = begin(site, "acme.approved", journal)
    worker.kill()
    worker.wait()

    answer(site, run, "yes")
    again = answer(site, run, "no", check=False)
    assert again.code == 5 and "answered already" in again.err

    site.start_worker()
    ended = site.wait_for_state("ask", "succeeded", attempt=2, timeout=30)
    assert ended["result"]["answer"] == "yes"
    assert len(read_journal(journal, "paid")) == 2


def test_a_blocking_handler_cannot_swallow_a_park(site, journal):
    site.start_worker()
    run = begin(site, "acme.approved_blocking", journal)

    answer(site, run, 7)

    assert site.wait_for_state("ask", "succeeded", attempt=2, timeout=30)["result"] == 7


def test_an_inline_run_waits_without_a_task(site):
    site.configure(execution='inline = ["acme-jobs"]')
    site.start_worker()
    run = begin(site, "acme.approved_inline")

    other = answer(site, run, "maybe", check=False)
    assert other.code == 2 and 'the answer to approval is one of "inline" / "other"' in other.err
    answer(site, run, "inline")

    assert site.wait_for_state("ask", "succeeded", attempt=2, timeout=30)["result"] == "inline"


def test_a_wait_that_nobody_answers_times_out(site):
    site.start_worker()
    site.add_orgs(application("org_acme"))
    site.apply(definition("org_acme", "ask", "acme.impatient"))
    site.cli("definitions", "run", "org_acme", "ask")

    assert site.wait_for_state("ask", "succeeded", attempt=2, timeout=30)["result"] == "nobody answered"


def test_an_early_answer_is_kept(site, journal):
    site.add_orgs(application("org_acme"))
    site.apply(definition("org_acme", "ask", "acme.approved", params={"journal": str(journal)}))
    site.cli("definitions", "run", "org_acme", "ask")
    answer(site, site.runs(definition="ask")[0], "early")

    site.start_worker()

    assert site.wait_for_state("ask", "succeeded", timeout=30)["result"]["answer"] == "early"
