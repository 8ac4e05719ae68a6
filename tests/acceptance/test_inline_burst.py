"""300 inline runs that are due at once all succeed, each exactly once."""

from __future__ import annotations

from collections import Counter

from tests.fakes.handlers import read_journal
from tests.fakes.site import application, definition, wait_until

ORGS = 30
EACH = 10


def test_300_inline_runs_due_at_once_succeed_once_each(site_on_either, journal):
    site = site_on_either
    site.configure(execution='inline = ["acme-jobs"]')
    site.add_orgs(*(application(f"org_{number:02}") for number in range(ORGS)))
    worker = site.start_worker()
    site.wait_for_handlers("acme.inline")
    site.apply_for_soon(
        lambda schedule: "".join(
            definition(
                f"org_{number:02}",
                f"job-{each}",
                "acme.inline",
                schedule,
                params={"journal": str(journal)},
            )
            for number in range(ORGS)
            for each in range(EACH)
        )
    )

    def ended() -> bool:
        return site.query("SELECT COUNT(*) AS n FROM runs WHERE state IS NOT NULL")[0]["n"] >= ORGS * EACH

    wait_until(ended, "300 runs to end", timeout=60)

    runs = site.runs()
    assert Counter(run["state"] for run in runs) == {"succeeded": ORGS * EACH}
    assert len({run["definition_id"] for run in runs}) == ORGS * EACH
    outcomes = site.query("SELECT run_id, attempt, outcome FROM attempts")
    assert Counter((row["attempt"], row["outcome"]) for row in outcomes) == {(1, "succeeded"): ORGS * EACH}
    entries = read_journal(journal, "inline")
    assert Counter(Counter(entry["run"] for entry in entries).values()) == {1: ORGS * EACH}
    assert {entry["pid"] for entry in entries} == {worker.pid}
    assert site.query("SELECT * FROM live_runs") == []
    assert all(site.provider.token_requests[f"m2m-org_{number:02}"] == 1 for number in range(ORGS))
    site.provider.token_requests.clear()
    assert site.stop_worker(worker) == 0
