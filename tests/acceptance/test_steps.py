"""Steps in a real worker: a stored result is never computed again, whatever ended the attempt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fakes.handlers import read_journal
from tests.fakes.site import Site, application, definition, wait_until

RETRY = {"max_attempts": 3, "retry_backoff": "10ms", "retry_backoff_max": "10ms"}


def begin(site: Site, journal: Path, handler: str, **params: Any) -> None:
    site.add_orgs(application("org_acme"))
    given = {"journal": str(journal), **params}
    site.apply(definition("org_acme", "paid", handler, params=given, **RETRY))
    site.cli("definitions", "run", "org_acme", "paid")


def paid(journal: Path) -> list[int]:
    return [entry["number"] for entry in read_journal(journal, "pay")]


@pytest.mark.parametrize("handler", ["acme.paid", "acme.paid_inline", "acme.paid_blocking"])
def test_a_retry_calls_nothing_again(short_site: Site, journal: Path, handler: str) -> None:
    site = short_site
    site.configure(execution='lease = "4s"\nrenew = "500ms"\ninline = ["acme-jobs"]')
    begin(site, journal, handler, steps=5, fails=5)

    site.start_worker()

    run = site.wait_for_state("paid", "succeeded", attempt=2)
    assert run["result"] == {"attempts": [1] * 5 + [2] * 2}
    assert sorted(paid(journal)) == [1, 2, 3, 4, 5, 101, 102]
    rows = site.query("SELECT name, occurrence, seq, attempt, handler FROM steps ORDER BY seq")
    assert [(row["name"], row["occurrence"], row["attempt"]) for row in rows[:5]] == [
        ("pay", n, 1) for n in range(1, 6)
    ]
    assert sorted((row["name"], row["occurrence"], row["attempt"]) for row in rows[5:]) == [
        ("more", n, 2) for n in (1, 2)
    ]
    assert {row["handler"] for row in rows} == {handler}


def test_a_killed_worker_repeats_at_most_the_call_in_flight(site_on_either: Site, journal: Path) -> None:
    site = site_on_either
    begin(site, journal, "acme.paid", steps=12, pause=0.1)
    worker = site.start_worker()
    wait_until(lambda: len(paid(journal)) >= 4, "the fourth call", timeout=30)

    worker.kill()
    worker.wait()
    before = paid(journal)
    site.start_worker()

    run = site.wait_for_state("paid", "succeeded", attempt=2, timeout=30)
    assert set(paid(journal)) == {*range(1, 13), 101, 102}
    again = [number for number in paid(journal) if paid(journal).count(number) == 2]
    assert set(again) <= {before[-1]}
    assert run["result"]["attempts"][: len(before) - 1] == [1] * (len(before) - 1)
