"""A handler that exits, crashes or blocks for ever fails alone, with its own outcome."""

from __future__ import annotations

import pytest

from tests.fakes.site import application, definition

CASES = {
    "os-exit": ("acme.os_exit", "handler_exited", "3"),
    "sys-exit": ("acme.sys_exit", "handler_exited", "0"),
    "segfault": ("acme.segfault", "handler_exited", "SIGSEGV"),
    "block": ("acme.block", "timed_out", None),
}


@pytest.fixture(scope="module")
def site(shared_site):
    """All bad handlers have been started at once, beside a long run and before a new one."""
    site = shared_site('drain = "5s"')
    journal = str(site.out / "journal")
    site.add_orgs(application("org_bad"), application("org_good"))
    text = definition("org_good", "long", "acme.steps", params={"journal": journal, "steps": 60})
    text += definition("org_good", "after", "acme.note", params={"journal": journal})
    for name, (handler, _, _) in CASES.items():
        text += definition(
            "org_bad",
            name,
            handler,
            params={"journal": journal},
            max_attempts=1,
            timeout="2s",
            cancel_grace="1s",
        )
    site.apply(text)
    site.worker = site.start_worker()
    site.cli("definitions", "run", "org_good", "long")
    site.wait_for_state("long", "running")
    site.worker_zygote = site.zygote(site.worker).pid
    for name in CASES:
        site.cli("definitions", "run", "org_bad", name)
    return site


@pytest.mark.parametrize("name", CASES)
def test_a_bad_handler_has_its_own_outcome(site, name):
    _, reason, detail = CASES[name]

    run = site.wait_for_end(definition=name)

    assert (run["state"], run["reason"]) == ("failed", reason)
    assert detail is None or detail in run["detail"]
    [attempt] = site.attempts(run["id"])
    assert attempt["outcome"] == ("timed_out" if reason == "timed_out" else "failed")
    if reason == "timed_out":
        took = attempt["ended_at"], attempt["handler_started_at"]
        assert took[0] > took[1]


def test_the_neighbours_and_the_worker_go_on(site):
    for name in CASES:
        site.wait_for_end(definition=name)
    site.cli("definitions", "run", "org_good", "after")

    after = site.wait_for_end(definition="after")
    long = site.wait_for_end(definition="long", timeout=30)

    assert after["state"] == "succeeded"
    assert (long["state"], long["attempt"]) == ("succeeded", 1)
    assert site.worker.poll() is None
    assert site.zygote(site.worker).pid == site.worker_zygote
    assert site.stop_worker(site.worker) == 0
