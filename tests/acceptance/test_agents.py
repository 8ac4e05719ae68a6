"""An agent of pydantic-ai in a real worker: a kill repeats at most the calls that were in flight."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from tests.fakes.handlers import read_journal
from tests.fakes.site import Site, application, definition, wait_until

CALLS = 5


def test_a_killed_worker_repeats_no_request_that_was_answered(short_site: Site, journal: Path):
    site = short_site
    site.add_orgs(application("org_acme"))
    params = {"journal": str(journal), "calls": CALLS, "pause": 0.1}
    site.apply(definition("org_acme", "agent", "acme.agent", params=params))
    site.cli("definitions", "run", "org_acme", "agent")
    worker = site.start_worker()
    wait_until(lambda: len(read_journal(journal, "request")) >= 3, "the third request", timeout=30)

    worker.kill()
    worker.wait()
    site.start_worker()

    run = site.wait_for_state("agent", "succeeded", attempt=2, timeout=30)
    assert run["result"] == f"done after {CALLS}"
    requests = Counter(entry["number"] for entry in read_journal(journal, "request"))
    tools = Counter(entry["what"] for entry in read_journal(journal, "tool"))
    assert set(requests) == set(range(CALLS + 1))
    assert set(tools) == {f"{number}{side}" for number in range(CALLS) for side in "ab"}
    # One request or the two tools of one response were in flight.
    again = [name for name, count in (requests + tools).items() if count > 1]
    assert len(again) <= 2
    assert set((requests + tools).values()) <= {1, 2}
    steps = Counter(row["name"] for row in site.query("SELECT name FROM steps"))
    assert steps == {"model:counter": CALLS + 1, "tool:look": 2 * CALLS}


def test_tools_that_need_approval_wait_for_it_without_a_process(short_site: Site, journal: Path):
    site = short_site
    site.add_orgs(application("org_acme"))
    site.apply(definition("org_acme", "agent", "acme.approving_agent", params={"journal": str(journal)}))
    site.cli("definitions", "run", "org_acme", "agent")
    site.start_worker()
    run = site.wait_for_state("agent", "waiting", timeout=30)

    id_ = str(run["id"])
    waits = site.cli("runs", "show", id_, "-o", "json").json()["waits"]
    for wait in waits:
        text = wait["ask"]["arguments"]["text"]
        site.cli("runs", "answer", id_, wait["name"], "--data", "true" if text == "one" else '"no"')

    def succeeded() -> list[dict[str, Any]]:
        # Attempt 2, or 3 if the first answer came alone.
        return [row for row in site.runs(definition="agent") if row["state"] == "succeeded"]

    [run] = wait_until(succeeded, "the run's success", timeout=30)
    assert run["result"] == "sent one, no"
    assert [entry["text"] for entry in read_journal(journal, "send")] == ["one"]
    assert len(read_journal(journal, "request")) == 2
    assert {wait["ask"]["tool"] for wait in waits} == {"send"}
